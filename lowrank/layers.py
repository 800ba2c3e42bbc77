"""Converted layers: the stock module with another `forward`, around one `autograd.Function`.

A converted layer is the same Python object with the same parameters, hooks and name; only its class changes. So
optimizers, aliases and hooks that hold it go on working, and its state dict keys stay as they were. A method's state,
such as the bases of ASI, lies beside the parameters in buffers named `lowrank_state_0`, `_1`, ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank.errors import LowRankError
from lowrank.geometry import ConvGeometry, Geometry, LinearGeometry
from lowrank.methods import Method, Tensors

STATE_PREFIX = "lowrank_state_"


class _LowRankFunction(torch.autograd.Function):
    """The layer's own forward pass; gradients from what the method kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        method: Method,
        *kept: Tensor | None,
    ) -> Tensor:
        ctx.geometry, ctx.method = geometry, method
        ctx.shape, ctx.weight_shape = tuple(x.shape), tuple(weight.shape)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *kept)
        return geometry.forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, *kept = ctx.saved_tensors
        geometry, method, shape = ctx.geometry, ctx.method, ctx.shape
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_x = method.input_gradient(grad, weight, geometry, shape) if wants_x else None
        grad_weight = None
        if wants_weight:
            grad_weight = (
                method.weight_gradient(tuple(kept), grad, geometry, shape)
                if kept
                else grad.new_zeros(ctx.weight_shape)  # only an empty batch keeps nothing
            )
        grad_bias = geometry.bias_gradient(grad) if wants_bias else None
        return (grad_x, grad_weight, grad_bias, None, None, *[None] * len(kept))


class LowRankLayer(nn.Module):
    """What every converted layer has in common.

    Attributes:
        method: how the input is kept.
        layer_name: the layer's name in its model, for messages.
        kept_bytes: bytes kept of the input in the latest training forward pass.
        formula_bytes: the same by the method's formula.
    """

    stock_class: type[Any]
    smallest_ndim: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    method: Method
    geometry: Geometry
    layer_name: str
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
        """Output of the stock layer; in training, keeps what the method keeps."""
        if not torch.is_grad_enabled():
            return super().forward(input)
        x = input
        self.kept_bytes = self.formula_bytes = 0
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        device = x.device.type
        outside = contextlib.nullcontext()
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, weight = _cast(x, dtype), _cast(weight, dtype)
            bias = None if bias is None else _cast(bias, dtype)
            outside = torch.autocast(device, enabled=False)  # type: ignore[assignment]
        with outside:
            batched = self.batched(x)
            kept = self._compress(batched.detach()) if weight.requires_grad else ()
            y = _LowRankFunction.apply(batched, weight, bias, self.geometry, self.method, *kept)
        return y if batched is x else y.squeeze(0)

    @torch.no_grad()
    def _compress(self, x: Tensor) -> Tensors:
        if x.numel() == 0:
            return ()
        try:
            kept, state = self.method.compress(x, self.geometry, self._state(), self.layer_name)
        except LowRankError as error:
            raise type(error)(f"layer {self.layer_name!r}: {error}") from None
        if self.training:
            self._set_state(state)
        self.kept_bytes = sum(tensor.nbytes for tensor in kept if tensor is not None)
        self.formula_bytes = self.method.formula_bytes(kept, tuple(x.shape))
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
            empty = None if tensor is None else torch.empty_like(tensor, device=self.weight.device)
            self.register_buffer(f"{STATE_PREFIX}{index}", empty)
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)

    def extra_repr(self) -> str:
        """The stock description and the method."""
        return f"{super().extra_repr()}, method={self.method}"


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


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


def adopt(layer: nn.Module, method: Method, name: str) -> None:
    """Turn a stock layer into a converted one, in place."""
    family = FAMILIES[type(layer)]
    layer.__class__ = family
    assert isinstance(layer, LowRankLayer)
    layer.geometry = family.geometry_of(layer)
    layer.method, layer.layer_name = method, name
    layer.kept_bytes = layer.formula_bytes = 0


def release(layer: LowRankLayer) -> None:
    """Turn a converted layer back into the stock one, in place."""
    for name in layer._state_names():
        del layer._buffers[name]
    for attribute in ("geometry", "method", "layer_name", "kept_bytes", "formula_bytes"):
        delattr(layer, attribute)
    layer.__class__ = layer.stock_class


def converted_layers(model: nn.Module) -> Iterator[LowRankLayer]:
    """Every converted layer of a model, in the model's order."""
    return (module for module in model.modules() if isinstance(module, LowRankLayer))


def stock_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the methods' state: what the stock model's own `state_dict()` would be.

    Example:
        stock_model.load_state_dict(lowrank.stock_state_dict(torch.load("converted.pt")))
    """
    return {key: value for key, value in state_dict.items() if not key.rpartition(".")[2].startswith(STATE_PREFIX)}
