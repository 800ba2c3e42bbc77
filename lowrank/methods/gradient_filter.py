"""The gradient filter (CVPR 2023): sums over square patches in place of the input, and both gradients from these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.errors import SettingError
from lowrank.methods.base import Method, Tensors
from lowrank.tensors import costs
from lowrank.tensors.costs import LayerCost
from lowrank.tensors.geometry import ConvGeometry, Geometry, Shape
from lowrank.tensors.memory_layout import channels_last, is_channels_last


@dataclass(frozen=True)
class GradientFilter(Method):
    """Keep sums over square patches; both gradients are approximated (Yang et al., CVPR 2023). Convolutions only.

    The output gradient is taken as constant on each patch and the kernel as its spatial sum. The patch of the input
    that belongs to a patch of outputs is centred on them and, for a stride s, s times as wide.

    Args:
        patch: side of a patch in output pixels, at least 1; R2, R4 and R7 in the paper; or a mapping with one per layer
            name. Larger: less memory, a coarser gradient.
    """

    carries: ClassVar[bool] = False
    patch: int | Mapping[str, int]

    def __post_init__(self) -> None:
        for patch in self.patch.values() if isinstance(self.patch, Mapping) else (self.patch,):
            if type(patch) is bool or not isinstance(patch, int) or patch < 1:
                raise SettingError(f"patch is {patch!r}; allowed is a whole number from 1, such as 2")

    @property
    def tag(self) -> str:
        return "gradient_filter" if isinstance(self.patch, Mapping) else f"gradient_filter_r{self.patch}"

    def for_layer(self, name: str) -> GradientFilter:
        if not isinstance(self.patch, Mapping):
            return self
        if name not in self.patch:
            raise SettingError(f"the patches name no layer {name!r}; they name {', '.join(self.patch) or 'none'}")
        return replace(self, patch=self.patch[name])

    @property
    def _side(self) -> int:
        assert isinstance(self.patch, int)
        return self.patch

    def reason_against(self, layer: nn.Module) -> str | None:
        if isinstance(layer, nn.Conv2d):
            return None
        return "the gradient filter pools over the plane of an image, which a convolution of two dimensions alone has"

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        assert isinstance(geometry, ConvGeometry)
        patch = (self._side * geometry.stride[0], self._side * geometry.stride[1])
        aligned = F.pad(x, self._alignment(geometry, tuple(x.shape)))
        sums = F.avg_pool2d(aligned, patch, ceil_mode=True, divisor_override=1)
        return (sums / prod(geometry.stride),), ()

    @staticmethod
    def _alignment(geometry: ConvGeometry, shape: Shape) -> tuple[int, int, int, int]:
        """Rows and columns to add (or, if negative, to cut) so that output (i, j) is centred on input (i s, j s)."""
        _, _, rows, columns = geometry.output_shape(shape, 1)
        pads: list[int] = []
        for axis, outputs in ((1, columns), (0, rows)):
            reach = geometry.dilation[axis] * (geometry.kernel[axis] - 1)
            before = geometry.padding[2 * axis] - reach // 2
            after = outputs * geometry.stride[axis] - shape[2 + axis] - before
            pads += [before, after]
        return pads[0], pads[1], pads[2], pads[3]

    def _pool(self, grad: Tensor) -> Tensor:
        return F.avg_pool2d(grad, self._side, ceil_mode=True, count_include_pad=False)

    def weight_gradient(self, kept: Tensors, grad: Tensor, geometry: Geometry, shape: Shape) -> Tensor:
        assert isinstance(geometry, ConvGeometry)
        (sums,) = kept
        assert sums is not None
        pointwise = replace(geometry, kernel=(1, 1), stride=(1, 1), dilation=(1, 1), padding=(0, 0, 0, 0))
        places = pointwise.weight_gradient(sums, self._pool(grad)).expand(-1, -1, *geometry.kernel)
        return channels_last(places) if is_channels_last(grad) else places.contiguous()

    def input_gradient(self, grad: Tensor, weight: Tensor, geometry: Geometry, shape: Shape) -> Tensor:
        assert isinstance(geometry, ConvGeometry)
        kernel_sum = weight.sum((2, 3), keepdim=True) / prod(geometry.stride)
        coarse = F.conv_transpose2d(self._pool(grad), kernel_sum, groups=geometry.groups)
        for axis in (0, 1):
            outputs, stride = grad.shape[2 + axis], geometry.stride[axis]
            coarse = coarse.repeat_interleave(self._side * stride, dim=2 + axis)
            coarse = coarse.narrow(2 + axis, 0, outputs * stride)
        left, right, top, bottom = self._alignment(geometry, shape)
        return F.pad(coarse, (-left, -right, -top, -bottom))

    def cost(self, x: Tensor, geometry: Geometry, out_channels: int, input_gradient: bool) -> LayerCost:
        assert isinstance(geometry, ConvGeometry)
        shape = tuple(x.shape)
        batch, channels, height, width = shape
        _, _, rows, columns = geometry.output_shape(shape, out_channels)
        patches = -(-rows // self._side) * -(-columns // self._side)
        square = self._side**2
        paper_pass = costs.paper_forward(geometry, shape, out_channels)
        small_gradient = 2 * batch * out_channels * (channels // geometry.groups) * patches
        return LayerCost(
            activation_bytes=batch * channels * patches * x.element_size(),
            flops_paper=round(
                2 * paper_pass  # the released count charges the backward pass like a full forward pass
                + height * width / square * (square - 1) * channels * batch
                + 2 * batch * out_channels * rows * columns / square
                + out_channels * channels * (prod(geometry.kernel) - 1)
            ),
            flops=2 * geometry.macs(shape, out_channels)
            + x.numel()
            + batch * out_channels * rows * columns
            + small_gradient * (2 if input_gradient else 1)
            + (out_channels * channels // geometry.groups * prod(geometry.kernel) if input_gradient else 0),
        )
