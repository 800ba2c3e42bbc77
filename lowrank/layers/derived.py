"""Inputs that are computed again from what a layer ahead keeps of its own, in whatever form: as near as that form is.

In an inverted bottleneck a narrow tensor goes through a 1 x 1 convolution, a depthwise one and another 1 x 1, with
normalisations and activations between them. The last two have inputs six times as large, which follow from the narrow
one by few products. Where the first layer keeps its input as a form, these need none of their own: all bytes serve the
narrow input, at ranks that are many times as high.

The ways are those of `lowrank.exact.near`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from torch import Tensor

from lowrank.exact.near import near_of, start
from lowrank.exact.slots import in_checkpoint
from lowrank.exact.sources import NearOrigin, Origin, Source, version_of
from lowrank.exact.steps import Step
from lowrank.layers.shared_inputs import form_of
from lowrank.tensors.again import BUDGET, LAYER


@dataclass(frozen=True)
class Derivation:
    """How the input of a layer follows from another layer's; as of one forward pass, whose tensors it holds.

    Attributes:
        ahead: name of the other layer.
        source: the step that stands for its input.
        step: the step that gives the input.
        others: what else it is computed from, such as parameters.
    """

    ahead: str
    source: Step
    step: Step
    others: dict[Step, Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """The input that follows from `x` in the place of the other layer's."""
        return self.step.value({**self.others, self.source: x})


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
    near = near_of(x)
    kept = None if near is None or near.step is near.root.step else near.root.kept()
    if near is None or kept is None:
        return None
    noted = _NOTED.get()
    if noted is not None:
        others = {other.step: other.tensor for other in near.others}
        noted[name] = Derivation(near.root.name, near.root.step, near.step, others)
    sources = list(near.others)
    tensors = [tensor for tensor in kept if tensor is not None]
    for step, tensor in zip(near.root.step.inputs, tensors, strict=True):
        sources.append(Source(step, tensor, True, version_of(tensor)))
    return Origin(near.step, tuple(sources), place=near.place), near.root.name


def near_ahead(x: Tensor, near: NearOrigin | None, derives: bool) -> NearOrigin | None:
    """From which form what is behind a layer may follow: the first one on the way to its input `x`, or the one of that.

    The latter also where a choice of ranks counts on it. `derives`: whether the layer's method does; one that does not
    leaves the way open for those behind it, such as a shortcut that has its input in common with a layer that does.
    """
    form = form_of(x)
    if form is None or not (derives or form.method.derive) or not form.is_kept() or in_checkpoint():
        return near
    return start(x, form) if near is None or form.method.leads else near


def within_reach(near: NearOrigin, x: Tensor, y: Tensor, cost: int, dear: bool) -> NearOrigin | None:
    """The way on by a layer from `x` to `y` of such a cost, see `lowrank.tensors.again`; None: that is too much.

    `dear`: whether the layer is too much by itself for a way without `reach`.
    """
    near.step.given = max(near.step.given, x.nbytes)
    further = near.step.cost % LAYER + cost > BUDGET or near.root.nbytes > y.nbytes
    if not dear and (cost == LAYER or not further):
        return near
    # What is far larger than all that layers are given, such as a stem's output, is not there once more for this.
    reach = near.root.reach if near.step.widest <= 2 * near.step.given else 0
    return replace(near, reach=reach) if reach else None
