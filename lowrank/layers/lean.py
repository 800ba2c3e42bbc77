"""Activations, pooling, dropout and normalisations that keep less: the stock modules with another class."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.exact.functions import LEAN_FUNCTIONS
from lowrank.exact.watched import LeanFunctions, Watched, watch
from lowrank.layers import gates, normalisation  # noqa: F401 - their functions are among those that keep less
from lowrank.layers.autograd_function import Call
from lowrank.layers.direct import DIRECT, nothing
from lowrank.layers.held import Held, let_go
from lowrank.layers.lazy import Lazy, read, unread
from lowrank.layers.swap import Changed
from lowrank.tensors.eager import in_compiled_graph, trains_plainly
from lowrank.tensors.worth import bits_are_worth


class LeanModule(Changed):
    """The stock forward pass, in which the functions that it calls on its input give way to those that keep less."""

    _lowrank_watched = False  # whether the code around it calls activations and the like as functions
    _lowrank_smallest = 0.0  # bytes that keeping less has to save for each operator call
    _direct: Any = nothing

    def forward(self, input: Tensor) -> Any:
        kind = type(input)
        if kind is Tensor and (self._wants_nothing(input) or not bits_are_worth(input, self._lowrank_smallest)):
            y = self._direct(input)
            return super().forward(input) if y is None else y
        if kind is not Lazy and (kind not in _OWN or not trains_plainly(input)):
            y = self._compiled(input) if in_compiled_graph() else None
            return super().forward(input) if y is None else y
        if kind is Held and getattr(self, "inplace", False):
            let_go(input)
        if kind is Lazy and self.training and isinstance(self, nn.BatchNorm2d):
            call = unread(input, Call)
            if call is not None and call.note_reader is not None:
                call.note_reader(self)
        if kind is not Lazy and self._lowrank_smallest and not _are_worth(input, self._lowrank_smallest):
            with torch._C.DisableTorchFunctionSubclass():
                y = super().forward(input)
        elif (called := _called(self, input)) is None:
            with nullcontext() if kind is Lazy else LeanFunctions():  # a lazy tensor does so itself
                y = super().forward(input)
        elif kind is Lazy:
            y = read(called[0], (input, *called[1:]))
        else:
            with torch._C.DisableTorchFunctionSubclass():
                y = LEAN_FUNCTIONS[called[0]](input, *called[1:])
        return watch(y) if self._lowrank_watched or kind is Watched else y

    def _compiled(self, input: Tensor) -> Tensor | None:
        """In a graph that is compiled; None: as the stock module."""
        if isinstance(self, nn.BatchNorm2d):
            from lowrank.layers.merged_in_graph import normalised

            return normalised(self, input)
        called = CALLS[self.stock_class](self) if self.stock_class in _TWO_SLOPES else None
        return None if called is None else LEAN_FUNCTIONS[called[0]](input, *called[1:])

    def _wants_nothing(self, input: Tensor) -> bool:
        """Whether no gradient passes here, so that stock keeps nothing, and who reads the output knows it."""
        if input.requires_grad:
            return False
        return not any(own is not None and own.requires_grad for own in self._parameters.values())


class _LeanEmbedding(LeanModule):
    """Of indices; what counts is that its output is watched."""

    def forward(self, input: Tensor) -> Any:
        y = super(LeanModule, self).forward(input)
        return watch(y) if self._lowrank_watched and trains_plainly(y) else y


def _are_worth(input: Tensor, smallest: float) -> bool:
    with torch._C.DisableTorchFunctionSubclass():  # which would be asked for the size
        return bits_are_worth(input, smallest)


def lean_class(stock: type[nn.Module]) -> type[LeanModule]:
    """The class that stands in for a stock one."""
    return LEAN_MODULES[stock]


def _own(stock: type[nn.Module]) -> dict[str, Any]:
    own = {"stock_class": stock, "_place": (__name__, "lean_class"), "__module__": stock.__module__}
    return {**own, "_direct": DIRECT.get(stock, nothing)}


def _called(module: Any, input: Tensor) -> tuple[Any, ...] | None:
    """The function that a stock module calls, and with what behind its input; None: its forward pass says."""
    if module.stock_class is nn.BatchNorm2d and input.ndim != 4:  # which the stock forward pass refuses
        return None
    return CALLS[module.stock_class](module) if module.stock_class in CALLS else None


def _batch_norm(m: Any) -> tuple[Any, ...] | None:
    if m.running_mean is None or m.running_var is None:
        return None
    if m.training and (m.momentum is None or not m.track_running_stats):  # what these do, the stock forward pass knows
        return None
    if m.training and m.num_batches_tracked is not None:
        m.num_batches_tracked.add_(1)
    return F.batch_norm, m.running_mean, m.running_var, m.weight, m.bias, m.training, m.momentum or 0.0, m.eps


def _hardtanh(m: Any) -> tuple[Any, ...]:
    return F.hardtanh, m.min_val, m.max_val, m.inplace


def _max_pool(m: Any) -> tuple[Any, ...]:
    return F.max_pool2d, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices


def _average_pool(m: Any) -> tuple[Any, ...]:
    return F.avg_pool2d, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override


_OWN = (Tensor, Watched, Held)
# The function that the stock module calls, and with what behind its input: a short way. Others take the stock forward.
CALLS: dict[type[nn.Module], Callable[[Any], tuple[Any, ...] | None]] = {
    nn.ReLU: lambda m: (F.relu, m.inplace),
    nn.ReLU6: _hardtanh,
    nn.Hardtanh: _hardtanh,
    nn.Hardsigmoid: lambda m: (F.hardsigmoid, m.inplace),
    nn.LeakyReLU: lambda m: (F.leaky_relu, m.negative_slope, m.inplace),
    nn.Dropout: lambda m: (F.dropout, m.p, m.training, m.inplace),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: lambda m: (F.adaptive_avg_pool2d, m.output_size),
    nn.BatchNorm2d: _batch_norm,
    nn.LayerNorm: lambda m: (F.layer_norm, m.normalized_shape, m.weight, m.bias, m.eps),
    nn.GELU: lambda m: (F.gelu, m.approximate),
    nn.SiLU: lambda m: (F.silu, m.inplace),
}
_TWO_SLOPES = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid, nn.LeakyReLU)
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
CURVES = (nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.Softmax)
RECOMPUTED = (*_NORMS, *CURVES)  # behind or in front of which tensors are computed again
LEAN_MODULES: dict[type[nn.Module], type[LeanModule]] = {
    stock: type(f"Lean{stock.__name__}", (_LeanEmbedding if stock is nn.Embedding else LeanModule, stock), _own(stock))
    for stock in (
        *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid, nn.LeakyReLU, nn.Dropout),
        *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Embedding, *RECOMPUTED),
    )
}
