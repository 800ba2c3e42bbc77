"""Converted layers: the stock module with another `forward`, around one `autograd.Function`.

A converted layer is the same Python object with the same parameters, hooks and name; only its class changes. So
optimizers, aliases and hooks that hold it go on working, and its state dict keys stay as they were. A method's state,
such as the bases of ASI, lies beside the parameters in buffers named `lowrank_state_0`, `_1`, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from lowrank.errors import ConversionError, LowRankError
from lowrank.geometry import ConvGeometry, Geometry, LinearGeometry
from lowrank.methods import Method, Tensors

STATE_PREFIX = "lowrank_state_"


class _SharedInputs:
    """What was kept of an input, for further layers that are given the same tensor, such as a block's shortcut.

    Holds nothing alive: an entry ends with its input, or with the backward pass that needed what was kept.
    """

    def __init__(self) -> None:
        self._entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def find(self, input: Tensor, x: Tensor, method: Method) -> Tensors | None:
        """What another layer keeps of this input, if `method` can use it."""
        if torch.compiler.is_compiling() or input not in self._entries:
            return None
        version, dtype, other, references = self._entries[input]
        if (version, dtype) != (input._version, x.dtype) or not method.can_use(other, tuple(x.shape)):
            return None
        kept = tuple(reference and reference() for reference in references)
        lost = any(reference is not None and tensor is None for reference, tensor in zip(references, kept, strict=True))
        return None if lost else kept

    def add(self, input: Tensor, x: Tensor, method: Method, kept: Tensors) -> None:
        """Remember what a layer keeps of this input."""
        if not kept or torch.compiler.is_compiling() or input.is_inference():
            return
        references = [tensor if tensor is None else TensorWeakRef(tensor) for tensor in kept]
        self._entries[input] = (input._version, x.dtype, method, references)


SHARED_INPUTS = _SharedInputs()


class LeanBatchNorm2d(nn.BatchNorm2d):
    """A batch normalisation whose convolution includes it while it uses its stored statistics.

    Then the convolution's output is the normalised one, and this module passes it on. With batch statistics it works,
    and keeps its input, as the stock module does.
    """

    awaiting: bool  # the convolution has included this module, which has not been called since

    @property
    def included(self) -> bool:
        """Whether the convolution includes this normalisation, by the mode it is in."""
        return not self.training and self.running_mean is not None

    def forward(self, input: Tensor) -> Tensor:
        if not self.included:
            return super().forward(input)
        if not self.awaiting:
            raise ConversionError(
                "a batch normalisation was called without the convolution that includes it; convert with fuse=False"
            )
        self.awaiting = False
        return input


def _per_output(vector: Tensor) -> Tensor:
    return vector.view(-1, 1, 1, 1)


class _LowRankFunction(torch.autograd.Function):
    """The layer's own forward pass, with the normalisation behind it if there is one; gradients from what was kept.

    With g the gradient of the output, G the weight gradient for g, s = 1 / sqrt(variance + eps) and scale = gamma s:
    dW = scale G, dbeta = sum g, dbias = scale dbeta and, as the normalised output is linear in W and the bias,
    dgamma = s (<W, G> - (mean - bias) dbeta). So nothing has to be kept for the normalisation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        geometry: Geometry,
        method: Method,
        *kept: Tensor | None,
    ) -> Tensor:
        ctx.geometry, ctx.method, ctx.eps = geometry, method, eps
        ctx.shape, ctx.weight_shape = tuple(x.shape), tuple(weight.shape)
        wants_weight_itself = ctx.needs_input_grad[0] or ctx.needs_input_grad[3]
        own = (weight if wants_weight_itself else None, None if mean is None else bias)
        ctx.save_for_backward(*own, gamma, mean, variance, *kept)
        if mean is not None and variance is not None:
            weight, bias = fold(weight, bias, gamma, beta, mean, variance, eps)
        return geometry.forward(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, bias, gamma, mean, variance, *kept = ctx.saved_tensors
        geometry, method, shape = ctx.geometry, ctx.method, ctx.shape
        wants_x, wants_weight, wants_bias, wants_gamma, wants_beta = ctx.needs_input_grad[:5]
        deviation = None if variance is None else torch.rsqrt(variance + ctx.eps)
        scale = deviation if deviation is None or gamma is None else gamma * deviation
        grad_x = grad_weight = grad_bias = grad_gamma = grad_beta = None
        if wants_x:
            scaled = weight if scale is None else weight * _per_output(scale)
            grad_x = method.input_gradient(grad, scaled.to(grad.dtype), geometry, shape)
        if wants_weight or wants_gamma:
            # Only an empty batch keeps nothing.
            kept_something = any(tensor is not None for tensor in kept)
            grad_weight = (
                method.weight_gradient(tuple(kept), grad, geometry, shape)
                if kept_something
                else grad.new_zeros(ctx.weight_shape)
            )
        if wants_bias or wants_beta or wants_gamma:
            grad_bias = grad_beta = geometry.bias_gradient(grad)
        if scale is not None and deviation is not None:
            if wants_gamma:
                centre = mean if bias is None else mean - bias
                grad_gamma = deviation * ((weight * grad_weight).flatten(1).sum(1) - centre * grad_beta)
            grad_weight = grad_weight * _per_output(scale) if wants_weight else None  # type: ignore[operator]
            grad_bias = grad_bias * scale if wants_bias else None  # type: ignore[operator]
        gradients = (grad_x, grad_weight, grad_bias if wants_bias else None, grad_gamma)
        return (*gradients, grad_beta if wants_beta else None, *[None] * (6 + len(kept)))


def fold(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does what the convolution and the normalisation behind it do.

    Args:
        weight: (O, C/g, K_h, K_w).
        bias: (O,), of the convolution.
        gamma, beta: (O,), of the normalisation, if it has any.
        mean, variance: (O,), stored.
        eps: added to the variance.
    """
    deviation = torch.rsqrt(variance + eps)
    scale = deviation if gamma is None else gamma * deviation
    shift = (-mean if bias is None else bias - mean) * scale
    return weight * _per_output(scale), shift if beta is None else shift + beta


class LowRankLayer(nn.Module):
    """What every converted layer has in common.

    Attributes:
        method: how the input is kept.
        layer_name: the layer's name in its model, for messages.
        chosen: whether `convert` was given this layer's name; others are there to keep less than the stock layer.
        norm: the normalisation whose work it does while that uses stored statistics.
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
            y = self.geometry.forward(input, *fold(*parameters, *_statistics(norm)))
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

    def _tracked(self, input: Tensor, norm: LeanBatchNorm2d | None, parameters: tuple[Tensor | None, ...]) -> Tensor:
        x, dtype, device = input, self.weight.dtype, input.device.type
        self.kept_bytes = self.formula_bytes = 0
        outside: AbstractContextManager[Any] = nullcontext()
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
            x = x.to(dtype)
            outside = torch.autocast(device, enabled=False)
        _, _, gamma, _ = parameters
        statistics = (None, None, 0.0) if norm is None else _statistics(norm)
        with outside:
            batched = self.batched(x)
            needed = self.weight.requires_grad or (gamma is not None and gamma.requires_grad)
            kept = self._keep(input, batched.detach()) if needed else ()
            y = _LowRankFunction.apply(batched, *parameters, *statistics, dtype, self.geometry, self.method, *kept)
        return y if batched is x else y.squeeze(0)

    @torch.no_grad()
    def _keep(self, input: Tensor, x: Tensor) -> Tensors:
        """What the method keeps of `x`; made once for all layers that are given the same input."""
        kept = SHARED_INPUTS.find(input, x, self.method)
        if kept is None:
            kept = self._compress(x)
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
            empty = None if tensor is None else torch.empty_like(tensor, device=self.weight.device)
            self.register_buffer(f"{STATE_PREFIX}{index}", empty)
        super()._load_from_state_dict(state_dict, prefix, *arguments, **options)

    def extra_repr(self) -> str:
        """The stock description and the method."""
        return f"{super().extra_repr()}, method={self.method}"


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
    family = FAMILIES[type(layer)]
    layer.__class__ = family
    assert isinstance(layer, LowRankLayer)
    layer.geometry = family.geometry_of(layer)
    layer.method, layer.layer_name, layer.chosen = method, name, chosen
    layer.kept_bytes = layer.formula_bytes = 0


def release(layer: LowRankLayer) -> None:
    """Turn a converted layer back into the stock one, in place."""
    for name in layer._state_names():
        del layer._buffers[name]
    for attribute in ("geometry", "method", "layer_name", "chosen", "kept_bytes", "formula_bytes"):
        delattr(layer, attribute)
    include(layer, None)
    layer.__class__ = layer.stock_class


def include(layer: LowRankLayer, norm: nn.BatchNorm2d | None) -> None:
    """Make a convolution do the work of the normalisation behind it, in place; None takes that back."""
    before = layer.__dict__.pop("norm", None)
    if before is not None:
        before.__class__ = nn.BatchNorm2d
        del before.awaiting
    if norm is not None:
        norm.__class__ = LeanBatchNorm2d
        norm.awaiting = False  # type: ignore[assignment]
        layer.__dict__["norm"] = norm  # not a child: it has its place in the model already


@contextmanager
def norms_apart(model: nn.Module) -> Iterator[None]:
    """Within it, every convolution gives its own output, and the normalisation behind it does its own work."""
    pairs = [(layer, layer.norm) for layer in model.modules() if isinstance(layer, LowRankLayer)]
    for layer, _ in pairs:
        include(layer, None)
    try:
        yield
    finally:
        for layer, norm in pairs:
            include(layer, norm)


def converted_layers(model: nn.Module) -> Iterator[LowRankLayer]:
    """Every layer that was converted by name, in the model's order."""
    return (module for module in model.modules() if isinstance(module, LowRankLayer) and module.chosen)


def stock_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the methods' state: what the stock model's own `state_dict()` would be.

    Example:
        stock_model.load_state_dict(lowrank.stock_state_dict(torch.load("converted.pt")))
    """
    return {key: value for key, value in state_dict.items() if not key.rpartition(".")[2].startswith(STATE_PREFIX)}
