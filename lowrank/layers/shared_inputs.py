"""What layers keep of their inputs, for the others that it serves.

Layers that are given the same input, such as a block's first convolution and its shortcut, keep it once. Those whose
input follows from it need not keep that, see `derived`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from lowrank.exact.slots import here, in_checkpoint
from lowrank.exact.steps import Step
from lowrank.layers.token_mask import current_mask
from lowrank.methods.base import Method, Tensors
from lowrank.methods.deriving import reach
from lowrank.tensors.eager import in_compiled_graph
from lowrank.tensors.geometry import Shape
from lowrank.tensors.notes import Glimpse, Notes


@dataclass
class Form:
    """What a layer keeps of an input; holds none of it alive.

    Attributes:
        name: of the layer.
        dtype: that the layer computes with.
        mask: of padding, which it leaves out.
        method: that keeps it.
        place: where it is kept, see `lowrank.exact.slots.here`.
        nbytes: of the input.
    """

    name: str
    dtype: torch.dtype
    mask: Tensor | None
    method: Method
    glimpses: tuple[Glimpse | None, ...]
    place: int
    nbytes: int

    @property
    def reach(self) -> int:
        """See `lowrank.exact.sources.Root`."""
        return reach(self.method.derive)

    @cached_property
    def step(self) -> Step:
        """The step that gives the input again."""
        there = [glimpse is not None for glimpse in self.glimpses]
        restored = partial(_restored, self.method.restored, there, self.dtype)
        step = Step(restored, [Step(None) for _ in range(sum(there))])
        step.widest = step.given = self.nbytes
        step.depth = 1  # as of the input
        return step

    def is_kept(self) -> bool:
        """Whether all of it is kept to this moment, and here."""
        return self.place == here() and all(glimpse is None or glimpse.is_there() for glimpse in self.glimpses)

    def kept(self) -> Tensors | None:
        """The tensors, if all of them are kept to this moment."""
        kept = tuple(None if glimpse is None else glimpse.tensor() for glimpse in self.glimpses)
        gone = any(glimpse is not None and tensor is None for glimpse, tensor in zip(self.glimpses, kept, strict=True))
        return None if gone else kept


def _restored(
    restored: Callable[[Tensors, torch.dtype], Tensor], places: list[bool], dtype: torch.dtype, *kept: Tensor
) -> Tensor:
    given = iter(kept)
    return restored(tuple(next(given) if there else None for there in places), dtype)


_FORMS: Notes[Form] = Notes()
_FIRST: Notes[Form] = Notes()  # of several layers with one input the first one's, which choices of ranks count on
_HELD: ContextVar[list[Tensors] | None] = ContextVar("held_forms", default=None)


@contextmanager
def forms_held() -> Iterator[None]:
    """Within it what layers keep stays, whoever drops what autograd saves."""
    token = _HELD.set([])
    try:
        yield
    finally:
        _HELD.reset(token)


def form_of(input: Tensor) -> Form | None:
    """What a layer keeps of this very input, padding and all, if something is known of it and it can be restored; of
    several layers, what the first one keeps."""
    return _FIRST.find(input)


def find_kept(input: Tensor, x: Tensor, method: Method) -> Tensors | None:
    """What another layer keeps of this input, if `method` can use it and it is kept to this moment.

    Args:
        input: the tensor that the layers are given.
        x: the same as the layer computes with it.
        method: of the layer that asks.
    """
    if torch.compiler.is_compiling():
        return _kept_in_graph(input, x, method)
    known = _FORMS.find(input)
    if known is None or known.dtype != x.dtype or known.mask is not current_mask():
        return None
    return known.kept() if _serves(known.method, method, tuple(x.shape)) else None


def _serves(found: Method, method: Method, shape: Shape) -> bool:
    """Whether what one method keeps serves another one. In a checkpoint, which drops it at first and has it there when
    it runs again, both have to keep the same."""
    if not method.can_use(found, shape):
        return False
    return torch.compiler.is_compiling() or not in_checkpoint() or found.can_use(method, shape)


def note_kept(name: str, input: Tensor, x: Tensor, method: Method, kept: Tensors) -> None:
    """Remember what the layer `name` keeps of this input."""
    if torch.compiler.is_compiling():
        _note_in_graph(input, x, method, kept)
        return
    held = _HELD.get()
    if held is not None:
        held.append(kept)
    own = x.untyped_storage()._cdata  # of which a form may be a part, and which its owner may change
    glimpses = tuple(
        None if tensor is None else Glimpse(tensor, tensor.untyped_storage()._cdata == own) for tensor in kept
    )
    form = Form(name, x.dtype, current_mask(), method, glimpses, here(), x.nbytes)
    if kept[0] is not x:  # whoever keeps it as it is as well finds that by itself
        _FORMS.note(input, form)
    restorable = method.restores and form.mask is None and x.dtype == input.dtype and x.shape == input.shape
    if restorable and not _is_behind(form, _FIRST.find(input)):
        _FIRST.note(input, form)


def _kept_in_graph(input: Tensor, x: Tensor, method: Method) -> Tensors | None:
    if not in_compiled_graph():
        return None
    from lowrank.layers import graph_notes

    found = graph_notes.noted(input)
    if found is None:
        return None
    dtype, known, kept = found
    return kept if dtype == x.dtype and _serves(known, method, tuple(x.shape)) else None


def _note_in_graph(input: Tensor, x: Tensor, method: Method, kept: Tensors) -> None:
    if in_compiled_graph() and kept[0] is not x:
        from lowrank.layers import graph_notes

        graph_notes.note(input, (x.dtype, method, kept))


def _is_behind(form: Form, first: Form | None) -> bool:
    """Whether another layer keeps the input, in the same place and to this moment, ahead of the one of this form."""
    if first is None or first.name == form.name or first.place != form.place:
        return False
    return first.kept() is not None
