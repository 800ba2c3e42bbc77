"""Activations, pooling, dropout and normalisations that keep less: the stock modules with another class."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from lowrank.exact.watched import LeanFunctions, Watched, watch
from lowrank.layers import normalisation  # noqa: F401 - its function is among those that keep less
from lowrank.layers.held import Held, let_go
from lowrank.layers.lazy import Lazy
from lowrank.layers.swap import Changed
from lowrank.tensors.eager import trains_plainly


class LeanModule(Changed):
    """The stock forward pass, in which the functions that it calls on its input give way to those that keep less."""

    _lowrank_watched = False  # whether the code around it calls activations and the like as functions

    def forward(self, input: Tensor) -> Any:
        if isinstance(self, nn.Embedding):  # of indices; what counts is that its output is watched
            y = super().forward(input)
            return watch(y) if self._lowrank_watched and trains_plainly(y) else y
        if type(input) not in (Tensor, Watched, Held, Lazy) or not trains_plainly(input):
            return super().forward(input)
        if getattr(self, "inplace", False):
            let_go(input)
        watched = self._lowrank_watched or type(input) is Watched
        with nullcontext() if type(input) is Lazy else LeanFunctions():  # a lazy tensor does so itself
            y = super().forward(input)
        return watch(y) if watched else y


def lean_class(stock: type[nn.Module]) -> type[LeanModule]:
    """The class that stands in for a stock one."""
    return LEAN_MODULES[stock]


def _own(stock: type[nn.Module]) -> dict[str, Any]:
    return {"stock_class": stock, "_place": (__name__, "lean_class"), "__module__": stock.__module__}


_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
CURVES = (nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.Softmax)
RECOMPUTED = (*_NORMS, *CURVES)  # behind or in front of which tensors are computed again
LEAN_MODULES: dict[type[nn.Module], type[LeanModule]] = {
    stock: type(f"Lean{stock.__name__}", (LeanModule, stock), _own(stock))
    for stock in (
        *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid, nn.LeakyReLU, nn.Dropout),
        *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Embedding, *RECOMPUTED),
    )
}
