"""Single operations by which a tensor comes about from what is kept; see `lowrank.exact.origins`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lowrank.exact import chains

Rebuild = Callable[..., Tensor]


class Step:
    """One operation on the way to a tensor. It refers to no tensor, but to one that a backward pass has just made.

    Attributes:
        function: of what the inputs give; None of a source.
        inputs: the steps ahead of it.
        change: the same function, which writes its result to its first argument; None: there is none.
        link: what it is of a chain that is computed in one pass, see `chains`; None: nothing.
        fresh: whether what it gives is new memory, that nothing else refers to.
        readers: backward nodes that have still to read it, and steps that such nodes need and that need it.
        cost: of the layers on the costliest way to it, see `lowrank.tensors.again`.
        widest, given: bytes of the largest tensor on the way, and of the largest that a layer is given.
    """

    __slots__ = ("change", "cost", "depth", "fresh", "function", "given", "inputs", "link", "made", "readers", "widest")

    def __init__(
        self,
        function: Rebuild | None,
        inputs: Sequence[Step] = (),
        cost: int = 0,
        change: Rebuild | None = None,
        fresh: bool = False,
        link: Any = None,
    ) -> None:
        self.function, self.inputs, self.readers = function, tuple(inputs), 0
        self.change, self.fresh, self.link = change, fresh, link
        depth = costs = widest = given = 0
        for step in inputs:
            depth, costs = max(depth, step.depth), max(costs, step.cost)
            widest, given = max(widest, step.widest), max(given, step.given)
        self.widest: int = widest
        self.given: int = given
        self.depth: int = 1 + depth
        self.cost: int = cost + costs
        self.made: Tensor | None = None

    def value(self, known: dict[Step, Tensor]) -> Tensor:
        """What it gives for these sources, which it is written to as well."""
        found = known.get(self, self.made)
        if found is None:
            found = None if self.link is None else chains.joined(self, known)
            if found is None:
                found = self._alone(known)
            if self.readers > 0:
                self.made = found
                for step in self.inputs:
                    step.release()
        known[self] = found
        return found

    def _alone(self, known: dict[Step, Tensor]) -> Tensor:
        if self.change is not None and self.inputs[0].is_for_one(known):
            first, *others = self.inputs
            return self.change(first.anew(known), *[step.value(known) for step in others])
        return self.anew(known)

    def anew(self, known: dict[Step, Tensor]) -> Tensor:
        """The same, which is not written anywhere."""
        assert self.function is not None
        return self.function(*[step.value(known) for step in self.inputs])

    def is_for_one(self, known: dict[Step, Tensor]) -> bool:
        """Whether who asks now may change what it gives: nobody else has asked for it or will."""
        return self.fresh and self.readers <= 1 and self.made is None and self not in known

    def is_free(self) -> bool:
        """Whether nobody will ask any more for what it has given, which is new memory."""
        return self.fresh and self.readers == 0 and self.made is None

    def followed(self, known: dict[Step, Tensor]) -> Tensor:
        """The same, anew, for a backward pass that is itself differentiated and keeps it: nobody may change it."""
        if self not in known:
            assert self.function is not None
            known[self] = self.function(*(step.followed(known) for step in self.inputs))
        return known[self]

    def need(self) -> None:
        """One reader more; the first one needs what it is computed from."""
        self.readers += 1
        if self.readers == 1:
            for step in self.inputs:
                step.need()

    def release(self) -> None:
        """One reader less; the last one takes what was made."""
        if self.readers == 1 and self.made is None:
            for step in self.inputs:
                step.release()
        self.readers = max(0, self.readers - 1)
        if not self.readers:
            self.made = None
