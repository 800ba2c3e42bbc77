"""What a module's code names, read from the code as it lies there; nothing of it is run.

It decides what is worth doing, such as to watch outputs for functions called on them, and what is said to the user. No
output and no gradient depends on it.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import CodeType, FunctionType

from torch import nn

from lowrank.exact.functions import LEAN_FUNCTIONS

_NAMES = {function.__name__ for function in LEAN_FUNCTIONS}
_BY_OTHER_NAMES = {"children", "named_children", "modules", "named_modules", "_modules", "getattr", "get_submodule"}
_LOADS = {"LOAD_ATTR", "LOAD_METHOD"}


class FunctionCalls:
    """Where a module's own code names an activation, a pooling or the like as a function."""

    def __init__(self, module: nn.Module) -> None:
        held = [value for value in vars(module).values() if callable(value)]
        self._everywhere = any(value is function for value in held for function in LEAN_FUNCTIONS)
        own = not type(module).__module__.startswith("torch.nn.")  # the layers themselves
        self._steps = [_steps_of(code) for code in _codes(type(module))] if own else []
        self._named = any(_is_named(step) for steps in self._steps for step in steps)

    def __bool__(self) -> bool:
        return self._everywhere or self._named

    def reach(self, child: str) -> bool:
        """Whether such a function may be called with what a child gives: it is named behind the child, or in its line.

        So the last layer of a model is left out, whose output goes to the model's caller.
        """
        if self._everywhere:
            return True
        named = [
            (steps, at)
            for steps in self._steps
            for at, step in enumerate(steps)
            if step.opname in _LOADS and step.argval == child
        ]
        return not named or any(_is_behind(steps, at) for steps, at in named)


def _is_named(step: dis.Instruction) -> bool:
    if step.opname == "BINARY_OP":  # sums and products
        return True
    return step.argval in _NAMES and step.opname.startswith("LOAD_")


def _is_behind(steps: Sequence[dis.Instruction], at: int) -> bool:
    """Whether such a name comes behind the call of what is loaded here, or around it; not in its arguments."""
    loops = any(step.opname.startswith("FOR_ITER") for step in steps)
    call = next((step for step in steps[at:] if step.opname.startswith("CALL") and _starts_as(step, steps[at])), None)
    return loops or any(
        _is_named(step)
        and (place > at or _line(step) == _line(steps[at]))
        and not (call is not None and _is_within(step, call))
        for place, step in enumerate(steps)
    )


def _starts_as(call: dis.Instruction, loaded: dis.Instruction) -> bool:
    a, b = call.positions, loaded.positions
    return a is not None and b is not None and (a.lineno, a.col_offset) == (b.lineno, b.col_offset)


def _is_within(step: dis.Instruction, call: dis.Instruction) -> bool:
    a, b = step.positions, call.positions
    if a is None or b is None or None in (*a, *b):
        return False
    return (b.lineno, b.col_offset) <= (a.lineno, a.col_offset) and (a.end_lineno, a.end_col_offset) <= (
        b.end_lineno,
        b.end_col_offset,
    )


def _line(step: dis.Instruction) -> int | None:
    return None if step.positions is None else step.positions.lineno


def only_hands_on(owner: nn.Module, child: str) -> bool:
    """Whether a module's code reads the weight of its child of this name, and does nothing else with it."""
    weight = other = 0
    for code in _codes(type(owner)):
        if _BY_OTHER_NAMES & set(code.co_names):
            return False
        steps = _steps_of(code)
        for step, after in pairwise(steps):
            if step.opname in _LOADS and step.argval == child:
                handed = after.opname in _LOADS and after.argval in ("weight", "bias")
                weight += handed and after.argval == "weight"
                other += not handed
    return weight > 0 and not other


def _codes(kind: type) -> Iterator[CodeType]:
    """The code of a class's functions but the constructor, its bases' included that are no part of PyTorch."""
    for base in kind.__mro__:
        if base.__module__.startswith("torch.nn.") or base is object:
            continue
        for name, function in vars(base).items():
            if isinstance(function, FunctionType) and name != "__init__":
                yield from _nested(function.__code__)


def _steps_of(code: CodeType) -> Sequence[dis.Instruction]:
    return _read(code, code.co_linetable)


@functools.lru_cache(maxsize=4096)  # a network has many modules of few classes
def _read(code: CodeType, _positions: bytes) -> tuple[dis.Instruction, ...]:
    """The instructions of code; given its positions as well, which not every Python compares with the rest of it."""
    return tuple(dis.get_instructions(code))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
