"""Inputs that are computed again from what a layer ahead keeps of its own, in whatever form: as near as that form is.

In an inverted bottleneck a narrow tensor goes through a 1 x 1 convolution, a depthwise one and another 1 x 1, with
normalisations and activations between them. The last two have inputs six times as large, which follow from the narrow
one by few products. Where the first layer keeps its input as a form, these need none of their own: all bytes serve the
narrow input, at ranks that are many times as high.

The steps are those of `lowrank.exact.origins`, with the form in the place of the exact source. They are steps of their
own: whoever asks for the exact tensor must not be given one that is near it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lowrank.exact.origins import Origin, Source, find, itself, version_of
from lowrank.exact.slots import here, in_checkpoint
from lowrank.exact.steps import Step
from lowrank.layers.shared_inputs import Form, form_of
from lowrank.methods.base import Tensors
from lowrank.methods.deriving import reach


@dataclass(frozen=True)
class Derivation:
    """How the input of a layer follows from another layer's; as of one forward pass, whose tensors it holds.

    Attributes:
        ahead: name of the other layer.
        sources: the steps that stand for its input.
        step: the step that gives the input.
        others: what else it is computed from, such as parameters.
    """

    ahead: str
    sources: tuple[Step, ...]
    step: Step
    others: dict[Step, Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """The input that follows from `x` in the place of the other layer's."""
        return self.step.value({**self.others, **dict.fromkeys(self.sources, x)})


_NOTED: ContextVar[dict[str, Derivation] | None] = ContextVar("derivations", default=None)


@contextmanager
def derivations_noted() -> Iterator[dict[str, Derivation]]:
    """Within it, every layer's derivation is put into the dictionary, by its name."""
    found: dict[str, Derivation] = {}
    token = _NOTED.set(found)
    try:
        yield found
    finally:
        _NOTED.reset(token)


def derived(x: Tensor, name: str) -> tuple[Origin, str] | None:
    """How the input of the layer `name` comes about from what is kept in any case, one form of another layer's input
    among it, and that layer's name.

    None: something on the way is not kept, or the way is not known.
    """
    exact = find(x)
    if exact is None:
        return None
    if all(source.kept for source in exact.sources):
        return _from_whole(exact)
    found = derived_from(exact)
    if found is None:
        return None
    missing, form = _only_form(exact)
    assert form is not None
    noted = _NOTED.get()
    if noted is not None:
        others = {other.step: other.tensor for other in exact.sources if other.kept}
        noted[name] = Derivation(form.name, missing, exact.step, others)
    return found, form.name


def _from_whole(exact: Origin) -> tuple[Origin, str] | None:
    """The same of an input that comes about from what a layer keeps of its own as it is, since a form of that would
    take no less: so it is exact."""
    form = _whole_form(exact)
    return None if form is None or in_checkpoint() else (exact, form.name)


def _whole_form(exact: Origin) -> Form | None:
    forms = [form_of(source.tensor) for source in exact.sources if source.kept]
    return next((form for form in forms if form is not None and form.whole), None)


def derived_from(origin: Origin) -> Origin | None:
    """The same of a tensor that comes about so."""
    missing, form = _only_form(origin)
    # A checkpoint drops at first what a layer keeps, and has it there when it runs again: both have to save the same.
    if form is None or form.place != here() or in_checkpoint():
        return None
    kept = form.kept()
    if kept is None:
        return None
    if form.restored is None:
        leaves = [Step(None) for tensor in kept if tensor is not None]
        form.restored = Step(_restoring(form, kept), leaves)
        form.steps = {}
    form.steps.update(dict.fromkeys(missing, form.restored))
    sources = [source for source in origin.sources if source.kept]
    tensors = [tensor for tensor in kept if tensor is not None]
    for step, tensor in zip(form.restored.inputs, tensors, strict=True):
        sources.append(Source(step, tensor, True, version_of(tensor)))
    return Origin(_through(origin.step, form.steps), tuple(sources), place=origin.place)


def nearest(x: Tensor, origin: Origin, everywhere: bool, derive: bool, stream: bool) -> tuple[Origin, int]:
    """From where others may be derived, of a tensor and its origin, and the bytes that keeping by it adds.

    That is the origin, where it is exact and takes nothing, unless forms are to be used `everywhere`, or where a form
    may stand for its source; the tensor itself, where only the form that is kept of that can stand for it. A layer
    that does not `derive` leaves the way open for those behind it, if the one ahead keeps its form for others. A form
    that a choice of ranks counts on comes first.
    `stream`: of what is made of the tensor itself, see `Origin`.
    """
    computed = origin.step.function is not None and not _leads(x)
    if not derive and not (computed and _is_for_others(origin)):
        return origin, origin.nbytes
    if computed and ((origin.nbytes == 0 and not everywhere) or derived_from(origin) is not None):
        return origin, 0
    if not derive:
        return origin, origin.nbytes
    own = replace(itself(x), parts=True, stream=stream)  # which is noted of a tensor that is no larger, too
    return (origin, origin.nbytes) if derived_from(own) is None else (own, 0)


def is_kept_for_others(x: Tensor) -> bool:
    """Whether a layer keeps a form of this very tensor that others may be derived from."""
    form = form_of(x)
    return form is not None and bool(form.method.derive)


def _leads(x: Tensor) -> bool:
    """Whether a choice of ranks counts on the form of this tensor for those behind it."""
    form = form_of(x)
    return form is not None and bool(getattr(form.method, "leads", False))


def _is_for_others(origin: Origin) -> bool:
    form = _only_form(origin)[1]
    return form is not None and bool(form.method.derive)


def reach_of(origin: Origin) -> int:
    """The products per number that may be spent on what follows from a tensor of this origin, if a form stands for its
    source; 0: no more than on any other, see `lowrank.tensors.again`."""
    form = _only_form(origin)[1] or _whole_form(origin)
    return 0 if form is None else reach(form.method.derive)


def _only_form(origin: Origin) -> tuple[tuple[Step, ...], Form | None]:
    """The steps of an origin's source that is not kept, if there is one, and what a layer keeps of that."""
    missing = [source for source in origin.sources if not source.kept]
    one = bool(missing) and all(source.tensor is missing[0].tensor for source in missing)
    return tuple(source.step for source in missing), form_of(missing[0].tensor) if one else None


def _restoring(form: Form, kept: Tensors) -> Callable[..., Tensor]:
    return partial(_restored, form.method.restored, [tensor is not None for tensor in kept], form.dtype)


def _restored(
    restored: Callable[[Tensors, torch.dtype], Tensor], places: list[bool], dtype: torch.dtype, *kept: Tensor
) -> Tensor:
    given = iter(kept)
    return restored(tuple(next(given) if there else None for there in places), dtype)


def _through(step: Step, known: dict[Step, Step]) -> Step:
    """The same step with others in the place of known ones; itself, where none of these is on the way."""
    if step not in known:
        inputs = [_through(ahead, known) for ahead in step.inputs]
        if all(new is old for new, old in zip(inputs, step.inputs, strict=True)):
            return step
        own = step.cost - max(ahead.cost for ahead in step.inputs)
        known[step] = Step(step.function, inputs, own, step.change, step.fresh, step.link)
    return known[step]
