"""What a choice of ranks is made among: of each layer its candidates.

Of a layer and those whose inputs follow from its own: all ways in which each keeps for itself, and all in which the one
keeps for them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lowrank.errors import TableError
from lowrank.methods.deriving import reach
from lowrank.ranks.table import Candidates, Energy, PerplexityTable
from lowrank.tensors.storage import Storage


@dataclass(frozen=True)
class Pick:
    """What is chosen for one layer.

    Attributes:
        name: the layer.
        ranks, energy, storage, nbytes, perplexity: see `Candidates`; of a derived layer ranks are its input's shape,
            bytes and perplexity zero: both count for the other layer.
        ahead: name of the layer from whose input this one's is derived; None: it keeps its own.
    """

    name: str
    ranks: tuple[int, ...]
    energy: Energy
    storage: Storage
    nbytes: int
    perplexity: float
    ahead: str | None = None


Way = tuple[Pick, ...]  # one for each layer of a group


@dataclass(frozen=True)
class Group:
    """Layers that are chosen for together, and the ways to do it of which no other is as small and as good.

    Attributes:
        nbytes: of each way, ascending.
        perplexity: of each way, descending.
        ways: what is chosen.
    """

    nbytes: np.ndarray
    perplexity: np.ndarray
    ways: tuple[Way, ...]

    @classmethod
    def of(cls, ways: Sequence[Way]) -> Group:
        """The best of some ways."""
        nbytes = np.array([sum(pick.nbytes for pick in way) for way in ways], dtype=np.int64)
        perplexity = np.array([sum(pick.perplexity for pick in way) for way in ways], dtype=np.float64)
        kept = pareto(nbytes, perplexity)
        return cls(nbytes[kept], perplexity[kept], tuple(ways[place] for place in kept))

    def beside(self, other: Group) -> Group:
        """Two groups as one, without anything in common."""
        nbytes = np.add.outer(self.nbytes, other.nbytes).ravel()
        perplexity = np.add.outer(self.perplexity, other.perplexity).ravel()
        kept = pareto(nbytes, perplexity)
        pairs = [divmod(int(place), len(other.ways)) for place in kept]
        return Group(nbytes[kept], perplexity[kept], tuple((*self.ways[a], *other.ways[b]) for a, b in pairs))


def pick_of(name: str, candidates: Candidates, at: int) -> Pick:
    """One of a layer's candidates."""
    keys = ("ranks", "energies", "storages", "nbytes", "perplexity")
    return Pick(name, *[getattr(candidates, key)[at] for key in keys])


def pareto(nbytes: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Indices of the points with no other point at most as large and at most as costly; sizes ascending."""
    order = np.lexsort((cost, nbytes))
    best = np.minimum.accumulate(cost[order])
    improves = np.concatenate(([True], cost[order][1:] < best[:-1]))
    return order[improves]


def groups_of(table: PerplexityTable, storages: Iterable[Storage], derive: bool | int) -> list[Group]:
    """The groups of a table's layers, with the candidates in these storages.

    Raises:
        TableError: a layer has none, a perplexity is not finite, or `derive` is given and what follows from what was
            not measured.
    """
    if derive and not table.derives:
        raise TableError("the perplexity table does not say what follows from what; measure it with derive=True")
    if reach(derive) and table.derives != derive:
        told = table.derives if reach(table.derives) else "the usual number"
        raise TableError(f"derive is {derive}, and the perplexity table was measured by {told} of products")
    storages = tuple(storages)
    own = {name: _single(name, candidates) for name, candidates in table.stored_as(storages).items()}
    if not derive:
        return list(own.values())
    shapes = {row.name: row.input_shape for row in table.layers}
    together = replace(table, layers=tuple(row.together() for row in table.layers)).stored_as(storages)
    found = []
    for row in table.layers:
        behind = [name for name in (row.derived.shapes if row.derived else ()) if name in own]
        if not behind:
            continue
        apart = own.pop(row.name)
        for name in behind:
            apart = apart.beside(own.pop(name))
        ways = _single(row.name, together[row.name]).ways
        derived = [(pick, *[_behind(pick, name, shapes[name]) for name in behind]) for (pick,) in ways]
        found.append(Group.of([*apart.ways, *derived]))
    return [*found, *own.values()]


def _single(name: str, candidates: Candidates) -> Group:
    if not np.isfinite(candidates.perplexity).all():
        raise TableError(f"the perplexity of layer {name!r} is not finite; measure it again")
    best = pareto(np.array(candidates.nbytes, dtype=np.int64), np.array(candidates.perplexity, dtype=np.float64))
    return Group.of([(pick_of(name, candidates, int(at)),) for at in best])


def _behind(pick: Pick, name: str, shape: tuple[int, ...]) -> Pick:
    return Pick(name, shape, 1.0, pick.storage, 0, 0.0, ahead=pick.name)
