"""The graph of a module's own code, where it is the same in training and in evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import fx, nn


class TraceError(Exception):
    """Why a module's code has no graph."""


class _Tracer(fx.Tracer):
    def __init__(self, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.is_leaf = is_leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.is_leaf(m)


def trace(module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> fx.Graph:
    """The graph of a module's forward pass, arguments with a default taken at their default.

    Args:
        module: the module; its hooks and mode stay as they are.
        is_leaf: which modules inside are one node instead of their code.

    Raises:
        TraceError: the code depends on values, or on the mode, or fails.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    fixed = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    try:
        graph = _Tracer(is_leaf).trace(module, fixed)
        with evaluating(module):
            in_evaluation = _Tracer(is_leaf).trace(module, fixed)
    except Exception as error:  # tracing runs the module's own code
        raise TraceError(f"its code cannot be traced ({' '.join(str(error).split())})") from error
    if str(graph) != str(in_evaluation):
        raise TraceError("it takes another path in training than in evaluation")
    return graph


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in evaluation mode; at the end every module inside is in the mode that it was in."""
    modes = {inner: inner.training for inner in module.modules()}
    for inner in modes:
        inner.training = False
    try:
        yield
    finally:
        for inner, training in modes.items():
            inner.training = training
