"""Converted layers: the stock module with another `forward`, around the one `autograd.Function` of `nodes`.

A converted layer is the same Python object with the same parameters, hooks and name; only its class changes. So
optimizers, aliases and hooks that hold it go on working, and its state dict keys stay as they were. A method's state,
such as the bases of ASI, lies beside the parameters in buffers named `lowrank_state_0`, `_1`, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.errors import ConversionError, LowRankError
from lowrank.exact.onednn import forward_activated
from lowrank.exact.recompute import Rebuild, known_origin, note_linear
from lowrank.layers.autograd_function import LowRankFunction, forward_scaled, per_output, scale_and_shift, scales_output
from lowrank.layers.shared_inputs import SHARED_INPUTS
from lowrank.layers.token_mask import without_padding
from lowrank.methods.base import Method, Tensors, Vanilla
from lowrank.tensors.geometry import ConvGeometry, Geometry, LinearGeometry, Shape

STATE_PREFIX = "lowrank_state_"
IN_PROJECTION = "lowrank_in_proj"  # child of an opened nn.MultiheadAttention: queries, keys and values in one layer
LEFT, RIGHT = "lowrank_left", "lowrank_right"  # parameters of a weight that is held as two factors


class LeanBatchNorm2d(nn.BatchNorm2d):
    """A batch normalisation that does not keep its input while it uses its stored statistics.

    Where a convolution includes it, that one's output is the normalised one, and this module passes it on. Elsewhere it
    keeps one number per channel, if its scale is frozen. In all other cases it works, and keeps its input, as the stock
    module.
    """

    awaiting: bool | None  # a convolution has included this module, which was not called since; None: none includes it

    @property
    def included(self) -> bool:
        """Whether a convolution includes this normalisation, by the mode it is in."""
        return self.awaiting is not None and self.uses_stored_statistics

    @property
    def uses_stored_statistics(self) -> bool:
        """Whether it normalises with the same numbers in every step."""
        return not self.training and self.running_mean is not None

    def forward(self, input: Tensor) -> Tensor:
        if self.awaiting is None:
            return self._alone(input)
        if not self.included:
            return super().forward(input)
        if not self.awaiting:
            raise ConversionError(
                "a batch normalisation was called without the convolution that includes it; convert with fuse=False"
            )
        self.awaiting = False
        return input

    def _alone(self, input: Tensor) -> Tensor:
        scale_is_trained = self.weight is not None and self.weight.requires_grad
        if scale_is_trained or not self.uses_stored_statistics or not (input.requires_grad and input.ndim == 4):
            return super().forward(input)
        mean, variance, eps = _statistics(self)
        scale = torch.rsqrt(variance + eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        # Keeps the scale alone, since only the input and the shift want a gradient.
        return torch.addcmul(per_output(shift, 4), input, per_output(scale, 4)).to(input.dtype)


class LowRankLayer(nn.Module):
    """What every converted layer has in common.

    Attributes:
        method: how the input is kept.
        layer_name: the layer's name in its model, for messages.
        chosen: whether `convert` was given this layer's name; others are there to keep less than the stock layer.
        norm: the normalisation whose work it does while that uses stored statistics.
        activation: the activation whose work it does as well while no gradient is needed.
        activated: whether the latest output is activated and has not reached the activation.
        kept_bytes: bytes kept of the input in the latest training forward pass; 0 if another layer keeps them.
        formula_bytes: the same by the method's formula.
    """

    stock_class: type[Any]
    smallest_ndim: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    method: Method
    geometry: Geometry
    layer_name: str
    chosen: bool
    norm: LeanBatchNorm2d | None = None
    activation: nn.Module | None = None
    activated: bool = False
    kept_bytes: int
    formula_bytes: int

    @classmethod
    def batched(cls, x: Tensor) -> Tensor:
        """An input or output with its batch dimension, which a single sample may come without."""
        return x if x.ndim >= cls.smallest_ndim else x.unsqueeze(0)

    @staticmethod
    def geometry_of(layer: Any) -> Geometry:
        """The geometry of a stock layer of this family."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Output of the stock layer and of the normalisation that it includes; keeps what the method keeps."""
        norm = self.included_norm()
        gamma, beta = (None, None) if norm is None else (norm.weight, norm.bias)
        parameters = (self.weight, self.bias, gamma, beta)
        tracked = input.requires_grad or any(p is not None and p.requires_grad for p in parameters)
        if torch.is_grad_enabled() and tracked:
            y = self._tracked(input, norm, parameters)
        elif norm is None:
            y = super().forward(input)
        else:
            y = self._folded(input, *scale_and_shift(*parameters[1:], *_statistics(norm)))
        if norm is not None:
            norm.awaiting = True
        return y

    def included_norm(self) -> LeanBatchNorm2d | None:
        """The normalisation that the coming output includes, if any."""
        norm: LeanBatchNorm2d | None = self.norm
        if norm is None or not norm.included:
            return None
        if norm.awaiting:
            raise ConversionError(
                f"layer {self.layer_name!r}: the normalisation behind it was not called; it may have been replaced "
                f"since the conversion. Call lowrank.revert before changing a model, or convert with fuse=False"
            )
        return norm

    def _folded(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Output of convolution and normalisation, activated where that takes no more memory."""
        if self.activated:
            raise ConversionError(
                f"layer {self.layer_name!r}: the activation behind it was not called; it may have been replaced since "
                f"the conversion. Call lowrank.revert before changing a model, or convert with fuse=False"
            )
        if scales_output(self.weight, self.geometry, tuple(x.shape)):
            return forward_scaled(x, self.weight, scale, shift, self.geometry)
        weight = self.weight * per_output(scale, 4, 0)
        y = None if self.activation is None else forward_activated(self, self.geometry, x, weight, shift)
        return self.geometry.forward(x, weight, shift) if y is None else y

    def take_over(self) -> None:
        """What a family does with the parameters when a layer becomes one of it: nothing."""

    def give_back(self) -> None:
        """Undo `take_over`."""

    def _begin(self, input: Tensor) -> tuple[Tensor, torch.dtype, AbstractContextManager[Any]]:
        """The input as the layer computes with it, the dtype to compute in, and a context without autocast."""
        x, dtype, device = input, next(self.parameters(recurse=False)).dtype, input.device.type
        self.kept_bytes = self.formula_bytes = 0
        outside: AbstractContextManager[Any] = nullcontext()
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
            x = x.to(dtype)
            outside = torch.autocast(device, enabled=False)
        return x, dtype, outside

    def _tracked(self, input: Tensor, norm: LeanBatchNorm2d | None, parameters: tuple[Tensor | None, ...]) -> Tensor:
        x, dtype, outside = self._begin(input)
        _, _, gamma, _ = parameters
        statistics = (None, None, 0.0) if norm is None else _statistics(norm)
        with outside:
            batched = self.batched(x)
            needed = self.weight.requires_grad or (gamma is not None and gamma.requires_grad)
            kept = self._keep(input, batched.detach()) if needed else ()
            method, kept = _kept_elsewhere(self.method, input, kept) if batched is input else (self.method, kept)
            y = LowRankFunction.apply(batched, *parameters, *statistics, dtype, self.geometry, method, *kept)
        if batched is input and isinstance(self.geometry, LinearGeometry):
            note_linear(input, y, F.linear, (self.weight, self.bias), bool(kept) and self.method.keeps_input)
        return y if batched is x else y.squeeze(0)

    @torch.no_grad()
    def _keep(self, input: Tensor, x: Tensor) -> Tensors:
        """What the method keeps of `x`; made once for all layers that are given the same input."""
        kept = SHARED_INPUTS.find(input, x, self.method)
        if kept is None:
            kept = self._compress(x if self.method.keeps_input else without_padding(x))
            SHARED_INPUTS.add(input, x, self.method, kept)
            if not torch.compiler.is_compiling():
                self.kept_bytes = sum(tensor.nbytes for tensor in kept if tensor is not None)
        if kept and not torch.compiler.is_compiling():
            self.formula_bytes = self.method.formula_bytes(kept, tuple(x.shape))
        return kept

    def _compress(self, x: Tensor) -> Tensors:
        if x.numel() == 0:
            return ()
        try:
            kept, state = self.method.compress(x, self.geometry, self._state(), self.layer_name)
        except LowRankError as error:
            raise type(error)(f"layer {self.layer_name!r}: {error}") from None
        if self.training:
            self._set_state(state)
        return kept

    def _state_names(self) -> list[str]:
        return [name for name in self._buffers if name.startswith(STATE_PREFIX)]

    def _state(self) -> Tensors:
        return tuple(self._buffers[name] for name in self._state_names())

    def _set_state(self, state: Tensors) -> None:
        # Each step's tensor replaces the one before, which the backward pass of that step may still need unchanged.
        for index, tensor in enumerate(state):
            self.register_buffer(f"{STATE_PREFIX}{index}", tensor)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *arguments: Any, **options: Any
    ) -> None:
        """Load the method's state at whatever shape it has; without one, as in a stock checkpoint, start afresh."""
        for name in self._state_names():
            del self._buffers[name]
        saved = [key for key in state_dict if key.startswith(prefix + STATE_PREFIX)]
        count = 1 + max((int(key.rpartition("_")[2]) for key in saved), default=-1)
        for index in range(count):
            tensor = state_dict.get(f"{prefix}{STATE_PREFIX}{index}")
            device = next(self.parameters(recurse=False)).device
            empty = None if tensor is None else torch.empty_like(tensor, device=device)
            self.register_buffer(f"{STATE_PREFIX}{index}", empty)
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)

    def extra_repr(self) -> str:
        """The stock description and the method."""
        return f"{super().extra_repr()}, method={self.method}"


def _kept_elsewhere(method: Method, input: Tensor, kept: Tensors) -> tuple[Method, Tensors]:
    """In place of an input that a method keeps as it is, what another layer keeps that it can be computed from.

    Of an input that is a small part of a larger tensor, such as a class token, a copy, so that the rest is freed.
    """
    if not (kept and method.keeps_input) or torch.compiler.is_compiling():
        return method, kept
    origin = known_origin(input)
    if origin is not None:
        return _Rebuilt(origin.rebuild), origin.sources
    small = 2 * input.nbytes <= input.untyped_storage().nbytes()
    return method, (input.detach().clone(),) if small else kept


@dataclass(frozen=True)
class _Rebuilt(Vanilla):
    """The input as it is, computed again when it is needed."""

    rebuild: Rebuild

    def weight_gradient(self, kept: Tensors, grad: Tensor, geometry: Geometry, shape: Shape) -> Tensor:
        return geometry.weight_gradient(self.rebuild(*kept), grad)


def _statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, float]:
    """Stored mean and variance, each (O,), and eps."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var, norm.eps


class LowRankConv2d(LowRankLayer, nn.Conv2d):  # type: ignore[misc]
    """A converted `nn.Conv2d`."""

    stock_class = nn.Conv2d
    smallest_ndim = 4
    geometry_of = ConvGeometry.of


class LowRankLinear(LowRankLayer, nn.Linear):  # type: ignore[misc]
    """A converted `nn.Linear`."""

    stock_class = nn.Linear
    smallest_ndim = 2
    geometry_of = LinearGeometry.of


FAMILIES: dict[type[nn.Module], type[LowRankLayer]] = {
    family.stock_class: family for family in (LowRankConv2d, LowRankLinear)
}


def adopt(layer: nn.Module, method: Method, name: str, chosen: bool = True) -> None:
    """Turn a stock layer into a converted one, in place."""
    family = method.layer_family or FAMILIES[type(layer)]
    layer.__class__ = family
    assert isinstance(layer, LowRankLayer)
    layer.geometry = layer.geometry_of(layer)
    layer.method, layer.layer_name, layer.chosen = method, name, chosen
    layer.kept_bytes = layer.formula_bytes = 0
    layer.take_over()


def release(layer: LowRankLayer) -> None:
    """Turn a converted layer back into the stock one, in place."""
    layer.give_back()
    for name in layer._state_names():
        del layer._buffers[name]
    for attribute in ("geometry", "method", "layer_name", "chosen", "kept_bytes", "formula_bytes"):
        delattr(layer, attribute)
    include(layer, None)
    layer.__class__ = layer.stock_class


def include(layer: LowRankLayer, norm: nn.BatchNorm2d | None, activation: nn.Module | None = None) -> None:
    """Make a convolution do the work of what is behind it, in place; None takes that back."""
    before = layer.__dict__.pop("norm", None)
    for name in ("activation", "activated"):
        layer.__dict__.pop(name, None)
    if before is not None:
        stock_norm(before)
    if norm is not None:
        lean_norm(norm).awaiting = False
        layer.__dict__.update(norm=norm, activation=activation)  # no children: they have their places in the model


def lean_norm(norm: nn.BatchNorm2d) -> LeanBatchNorm2d:
    """Turn a normalisation into a lean one that no convolution includes, in place."""
    norm.__class__ = LeanBatchNorm2d
    assert isinstance(norm, LeanBatchNorm2d)
    norm.awaiting = None
    return norm


def stock_norm(norm: nn.Module) -> None:
    """Turn a lean normalisation back into the stock one, in place."""
    norm.__class__ = nn.BatchNorm2d
    del norm.awaiting


@contextmanager
def norms_apart(model: nn.Module) -> Iterator[None]:
    """Within it, every convolution gives its own output, and the normalisation behind it does its own work."""
    pairs = [(layer, layer.norm, layer.activation) for layer in model.modules() if isinstance(layer, LowRankLayer)]
    for layer, _, _ in pairs:
        include(layer, None)
    try:
        yield
    finally:
        for layer, norm, activation in pairs:
            include(layer, norm, activation)


def converted_layers(model: nn.Module) -> Iterator[LowRankLayer]:
    """Every layer that was converted by name, in the model's order."""
    return (module for module in model.modules() if isinstance(module, LowRankLayer) and module.chosen)


def stock_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the methods' state, weights dense: what the stock model's own `state_dict()` would be.

    Example:
        stock_model.load_state_dict(lowrank.stock_state_dict(torch.load("converted.pt")))
    """
    stock: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        layer, dot, name = key.rpartition(".")
        if name == LEFT:
            attention = layer.removesuffix(IN_PROJECTION)
            weight = f"{layer}{dot}weight" if attention == layer else f"{attention}in_proj_weight"
            stock[weight] = value @ state_dict[f"{layer}{dot}{RIGHT}"]
        elif name != RIGHT and not name.startswith(STATE_PREFIX):
            stock[key] = value
    return stock
