"""What tensors are computed from: the data of `lowrank.exact.origins` and `lowrank.exact.near`."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lowrank.exact.steps import Step


@dataclass(slots=True, eq=False)
class Source:
    """A tensor that others are computed from, or a reference to one that nothing may keep.

    Attributes:
        step: the step that gives it.
        held: the tensor; a weak reference, where what is computed from it is as large.
        kept: whether a backward node keeps it in any case.
        version: of the tensor.
    """

    step: Step
    held: Tensor | weakref.ref[Tensor]
    kept: bool
    version: int

    @property
    def tensor(self) -> Tensor:
        if type(self.held) is not weakref.ref:
            return self.held  # type: ignore[return-value]
        found = self.held()
        assert found is not None, "whoever finds an origin has all of its sources"
        return found


@dataclass(slots=True, eq=False)
class Origin:
    """The step that gives a tensor, and the sources of that.

    Attributes:
        parts: whether the tensor is put together of sources that others may keep too; then these are kept even where
            that takes as much as the tensor.
        stream: whether it is of the size of its one source, such as a depthwise convolution's output; of use to a
            normalisation, which has to keep one of the two: from its source more can be computed.
        place: where it was noted, such as within a checkpoint, which keeps nothing after all.
        near: the way from a form of another tensor, see `lowrank.exact.near`; exact readers never take it.
    """

    step: Step
    sources: tuple[Source, ...]
    parts: bool = False
    place: int = 0
    stream: bool = False
    near: NearOrigin | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that keeping it adds: none if all sources are kept in any case."""
        sizes: dict[int, int] = {}
        for source in self.sources:
            if not source.kept:
                storage = source.tensor.untyped_storage()
                sizes[storage._cdata] = storage.nbytes()
        return sum(sizes.values()) if sizes else 0

    def as_kept(self) -> Origin:
        """The same, now that its sources are kept."""
        for source in self.sources:
            if not source.kept:
                break
        else:
            return self
        kept = tuple(
            source if source.kept else Source(source.step, source.tensor, True, source.version)
            for source in self.sources
        )
        return Origin(self.step, kept, self.parts, self.place, self.stream, self.near)

    def holds(self) -> bool:
        """Whether its sources are there, and as they were."""
        return _hold(self.sources)


class Root(Protocol):
    """A form that a layer keeps, as what stands for the tensor that it is of.

    Attributes:
        name: of the layer.
        nbytes: of the tensor.
        reach: products per number that ways from it may take beyond `BUDGET`; 0: no more.
        step: the step that gives the tensor again; its inputs are sources, which `kept` gives.
    """

    name: str
    nbytes: int

    @property
    def reach(self) -> int: ...

    @property
    def step(self) -> Step: ...

    def is_kept(self) -> bool:
        """Whether it is kept to this moment, and can be read here."""

    def kept(self) -> tuple[Tensor | None, ...] | None:
        """What it is kept as; None: it is not kept any more."""


@dataclass(slots=True, eq=False)
class NearOrigin:
    """The step that gives a tensor, from a form of another one: as near as that is.

    Attributes:
        root: the form.
        others: what else it is computed from, all of it kept in any case.
        reach: as of `Root`, of ways that need it.
        place: as of `Origin`.
    """

    step: Step
    root: Root
    others: tuple[Source, ...] = ()
    reach: int = 0
    place: int = 0

    def holds(self) -> bool:
        """Whether all is there, and as it was."""
        return self.root.is_kept() and _hold(self.others)


def _hold(sources: tuple[Source, ...]) -> bool:
    for source in sources:
        found = source.held() if type(source.held) is weakref.ref else source.held
        if found is None or (source.version >= 0 and source.version != found._version):  # type: ignore[union-attr]
            return False
    return True


def version_of(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version
