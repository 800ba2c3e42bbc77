"""The perplexity table: per layer, what each candidate for its ranks takes and how good it is; kept as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lowrank.errors import SettingError, TableError
from lowrank.methods.deriving import check_derive
from lowrank.tensors.costs import tucker_numel
from lowrank.tensors.decompose import allowed_ranks
from lowrank.tensors.storage import STORAGES, Storage, kept_ranks, stored_bytes

SCHEMA = 1
Energy = float | tuple[float, ...]


@dataclass(frozen=True)
class Candidates:
    """Ways to truncate a layer's input: equally long tuples, one entry a candidate.

    Attributes:
        energies: the share of squared singular values that is kept: a number for all modes, or one for each.
        ranks: one rank a mode.
        nbytes: bytes that are kept.
        perplexity: the Frobenius norm of the difference between the two weight gradients.
        storages: the storage that was measured, see `lowrank.tensors.storage`; "input" by default.
    """

    energies: tuple[Energy, ...]
    ranks: tuple[tuple[int, ...], ...]
    nbytes: tuple[int, ...]
    perplexity: tuple[float, ...]
    storages: tuple[Storage, ...] = ()

    def __post_init__(self) -> None:
        if not self.storages:
            object.__setattr__(self, "storages", ("input",) * len(self.ranks))

    def where(self, kept: Iterable[bool]) -> Candidates:
        """Some of them."""
        places = [at for at, keep in enumerate(kept) if keep]
        return Candidates(*(tuple(getattr(self, f.name)[at] for at in places) for f in fields(self)))


def joined(parts: Sequence[Candidates]) -> Candidates:
    """All of some candidates."""
    return Candidates(
        *(tuple(chain.from_iterable(getattr(part, f.name) for part in parts)) for f in fields(Candidates))
    )


@dataclass(frozen=True)
class Derived:
    """The layers whose inputs follow from what one layer keeps of its own, see `derive` of `ASI`.

    Attributes:
        shapes: of their inputs, per layer name.
        perplexity: for each candidate of the one layer, the sum of its own perplexity and of theirs.
    """

    shapes: dict[str, tuple[int, ...]]
    perplexity: tuple[float, ...]


@dataclass(frozen=True)
class LayerPerplexity:
    """One layer's row: for each energy of the table its ranks, bytes and perplexity, in the input's own dtype.

    Attributes:
        name: the layer.
        input_shape: shape of its input in the batch that was measured.
        ranks: per energy, one rank per mode of the input.
        nbytes: per energy, bytes that are kept; tables of before count a factor of a mode left whole as well.
        perplexity: per energy, the Frobenius norm of the difference between the two weight gradients.
        mixed: further candidates, with an energy of its own for each mode, or in another storage; None if they were not
            measured.
        gradient_norm: Frobenius norm of the exact weight gradient; None in tables of before it was stored.
        derived: what follows from this layer's input; None: nothing does, or it was not measured.
    """

    name: str
    input_shape: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    nbytes: tuple[int, ...]
    perplexity: tuple[float, ...]
    mixed: Candidates | None = None
    gradient_norm: float | None = None
    derived: Derived | None = None

    def together(self) -> LayerPerplexity:
        """The row with the perplexity of all that follows from its input in the place of its own."""
        if self.derived is None:
            return self
        own, further = self.derived.perplexity[: len(self.ranks)], self.derived.perplexity[len(self.ranks) :]
        mixed = None if self.mixed is None else replace(self.mixed, perplexity=further)
        return replace(self, perplexity=own, mixed=mixed, derived=None)


@dataclass(frozen=True)
class PerplexityTable:
    """Perplexity of layers at several energies, measured on one batch, or as the mean over several.

    Attributes:
        model: name of the model's class.
        batch_shape: shape of the batch's first tensor.
        energies: ascending.
        layers: one row each, in the model's order.
        batches: number of batches.
        derives: whether it was measured which inputs follow from which, or by how many products, see `derive` of
            `measure_perplexity`.
    """

    model: str
    batch_shape: tuple[int, ...]
    energies: tuple[float, ...]
    layers: tuple[LayerPerplexity, ...]
    batches: int = 1
    derives: bool | int = False

    @property
    def names(self) -> list[str]:
        """Names of the layers."""
        return [layer.name for layer in self.layers]

    def only(self, names: Iterable[str]) -> PerplexityTable:
        """The table of some of its layers. What follows from one of these is told where all of it is among them: its
        perplexity is a sum.

        Raises:
            TableError: a layer that the table does not have.
        """
        names = list(names)
        rows = {layer.name: layer for layer in self.layers}
        missing = [name for name in names if name not in rows]
        if missing:
            raise TableError(
                f"the perplexity table has no layer {', '.join(map(repr, missing))}; "
                f"it has {', '.join(rows)}. Measure it again for the layers that are trained"
            )
        return replace(self, layers=tuple(_among(rows[name], names) for name in names))

    def without_mixed(self) -> PerplexityTable:
        """The table with one energy for all modes of a layer, as published (ASI, sec. 3.3), in the input's dtype."""
        return replace(self, layers=tuple(map(_without_mixed, self.layers)))

    def candidates(self, layer: LayerPerplexity) -> Candidates:
        """All candidates of one of the table's layers: one for each energy of the table, then the mixed ones."""
        own = Candidates(self.energies, layer.ranks, layer.nbytes, layer.perplexity)
        return own if layer.mixed is None else joined([own, layer.mixed])

    def stored_as(self, storages: Iterable[Storage]) -> dict[str, Candidates]:
        """Per layer the candidates in one of these storages.

        Raises:
            TableError: a layer has none.
        """
        wanted, found = set(storages), {}
        for layer in self.layers:
            candidates = self.candidates(layer)
            fits = [storage in wanted for storage in candidates.storages]
            found[layer.name] = candidates if all(fits) else candidates.where(fits)
            if not any(fits):
                raise TableError(
                    f"the perplexity table has no candidate in storage {', '.join(sorted(wanted))} for layer "
                    f"{layer.name!r}; measure it again with storages={sorted(wanted)}"
                )
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, whole or not at all.

        Raises:
            TableError: that cannot be; says why.
        """
        target = Path(path)
        part = target.with_name(f"{target.name}.part")
        content = {"schema": SCHEMA, **asdict(self)}
        for row in content["layers"]:
            for key in ("mixed", "gradient_norm", "derived"):
                if row[key] is None:
                    del row[key]
            if "mixed" in row and set(row["mixed"]["storages"]) <= {"input"}:
                del row["mixed"]["storages"]
        if self.batches == 1:
            del content["batches"]
        if not self.derives:
            del content["derives"]
        try:
            part.write_text(json.dumps(content, indent=1) + "\n")
            part.replace(target)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise TableError(f"perplexity table {path} cannot be written: {error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PerplexityTable:
        """Read a table.

        Raises:
            TableError: the file is missing, damaged, or not a perplexity table; says where.
        """
        try:
            return _parse(json.loads(Path(path).read_text()))
        except TableError as error:
            raise TableError(f"perplexity table {path}: {error}; measure it again") from None
        except (OSError, UnicodeDecodeError) as error:
            raise TableError(f"perplexity table {path} cannot be read: {error}") from None
        except (ValueError, RecursionError) as error:  # of JSON that is cut, nested beyond reason, of endless numbers
            raise TableError(f"perplexity table {path} is not whole JSON ({error}); measure it again") from None


def _among(row: LayerPerplexity, names: Collection[str]) -> LayerPerplexity:
    behind = () if row.derived is None else row.derived.shapes
    return row if all(name in names for name in behind) else replace(row, derived=None)


def _without_mixed(row: LayerPerplexity) -> LayerPerplexity:
    derived = row.derived
    if derived is not None:
        derived = replace(derived, perplexity=derived.perplexity[: len(row.ranks)])
    return replace(row, mixed=None, derived=derived)


def _parse(content: Any) -> PerplexityTable:
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise TableError(f"not a perplexity table of schema {SCHEMA}")
    energies = _numbers(content, "energies")
    if list(energies) != sorted(set(energies)) or not all(0 < energy <= 1 for energy in energies):
        raise TableError("'energies' must ascend and lie above 0 and at most at 1")
    rows = content.get("layers")
    if not isinstance(rows, list) or not rows:
        raise TableError("'layers' must be a list that is not empty")
    layers = tuple(_parse_layer(row, len(energies)) for row in rows)
    if len({layer.name for layer in layers}) != len(layers):
        raise TableError("a layer is named twice")
    model, batch_shape = content.get("model"), content.get("batch_shape")
    if not isinstance(model, str):
        raise TableError("'model' must be a text")
    shape = () if batch_shape == [] else _whole(content, "batch_shape")
    (batches,) = _whole({"batches": [content.get("batches", 1)]}, "batches")
    derives = content.get("derives", False)
    try:
        check_derive(derives)
    except SettingError:
        derives = None
    if derives is None or isinstance(derives, str):  # a method's "slopes" is no way to measure
        raise TableError("'derives' must be true, false or a number of products")
    rows_of = {layer.name: layer for layer in layers}
    for layer in layers:
        for name, own in (layer.derived.shapes if derives and layer.derived else {}).items():
            if name not in rows_of or rows_of[name].input_shape != own or rows_of[name].derived is not None:
                raise TableError(f"what follows from layer {layer.name!r} is no layer {name!r} of shape {own}")
    return PerplexityTable(model, shape, energies, layers, batches, derives)


def _parse_layer(row: Any, count: int) -> LayerPerplexity:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise TableError("an entry of 'layers' has no name")
    name, mixed, norm = row["name"], row.get("mixed"), row.get("gradient_norm")
    try:
        shape = _whole(row, "input_shape")
        measured = _parse_entries(row, shape, count)
        if norm is not None and _numbers({"gradient_norm": [norm]}, "gradient_norm") < (0,):
            raise TableError("'gradient_norm' is negative")
        found = LayerPerplexity(name, shape, *measured, None if mixed is None else _parse_mixed(mixed, shape), norm)
        return replace(found, derived=_parse_derived(row.get("derived"), found))
    except TableError as error:
        raise TableError(f"layer {name!r}: {error}") from None


def _parse_mixed(row: Any, shape: tuple[int, ...]) -> Candidates:
    if not isinstance(row, dict):
        raise TableError("'mixed' must have 'energies', 'ranks', 'nbytes' and 'perplexity'")
    energies = tuple(_numbers({"energies": entry}, "energies") for entry in _list(row, "energies"))
    for entry in energies:
        if len(entry) != len(shape) or not all(0 < energy <= 1 for energy in entry):
            raise TableError(f"mixed energies {entry} must be one a mode, above 0 and at most 1")
    storages = row.get("storages", ["input"] * len(energies))
    if not isinstance(storages, list) or not all(storage in STORAGES for storage in storages):
        raise TableError(f"'storages' must be a list; allowed in it: {', '.join(STORAGES)}")
    return Candidates(energies, *_parse_entries(row, shape, len(energies), storages), tuple(storages))


def _parse_derived(row: Any, layer: LayerPerplexity) -> Derived | None:
    if row is None:
        return None
    shapes = row.get("shapes") if isinstance(row, dict) else None
    if not isinstance(shapes, dict) or not shapes or not all(isinstance(name, str) for name in shapes):
        raise TableError("'derived' must have 'shapes', one a layer, and 'perplexity'")
    perplexity = _numbers(row, "perplexity")
    count = len(layer.ranks) + (0 if layer.mixed is None else len(layer.mixed.ranks))
    if len(perplexity) != count or min(perplexity) < 0:
        raise TableError(f"the perplexity of 'derived' needs {count} entries, none of them negative")
    return Derived({name: _whole(shapes, name) for name in shapes}, perplexity)


Entries = tuple[tuple[tuple[int, ...], ...], tuple[int, ...], tuple[float, ...]]


def _parse_entries(
    row: dict[str, Any], shape: tuple[int, ...], count: int, storages: Sequence[Storage] | None = None
) -> Entries:
    """Ranks, bytes and perplexity of `count` candidates, in the input's own dtype by default."""
    storages = ["input"] * count if storages is None else storages
    ranks = tuple(_whole({"ranks": entry}, "ranks") for entry in _list(row, "ranks"))
    nbytes, perplexity = _whole(row, "nbytes"), _numbers(row, "perplexity")
    if not len(ranks) == len(nbytes) == len(perplexity) == len(storages) == count:
        raise TableError("'ranks', 'nbytes' and 'perplexity' need one entry for each energy")
    for entry, size, storage in zip(ranks, nbytes, storages, strict=True):
        if len(entry) != len(shape) or any(r > n for r, n in zip(entry, shape, strict=True)):
            raise TableError(f"ranks {entry} do not fit the input shape {shape}")
        if size not in _possible_bytes(shape, entry, storage):
            raise TableError(f"{size} bytes do not fit ranks {entry} of the input shape {shape}")
    if min(perplexity) < 0:
        raise TableError("a perplexity is negative")
    return ranks, nbytes, perplexity


def kept_bytes(shape: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype, storage: Storage) -> int:
    """Bytes that ASI keeps of an input at these ranks, which are cut to what a tensor can have."""
    return stored_bytes(shape, kept_ranks(shape, allowed_ranks(shape, ranks), storage), dtype, storage)


def _possible_bytes(shape: tuple[int, ...], ranks: tuple[int, ...], storage: Storage) -> set[int]:
    """What a candidate may take, in any dtype of the input; also as tables of before count, with more factors."""
    dtypes, cut = (torch.float16, torch.float32, torch.float64), allowed_ranks(shape, ranks)
    found = {kept_bytes(shape, ranks, dtype, storage) for dtype in dtypes}
    found |= {stored_bytes(shape, cut, dtype, storage) for dtype in dtypes}
    before = {tucker_numel(shape, ranks) * itemsize for itemsize in (2, 4, 8)} if storage == "input" else set()
    return found | before


def _list(row: dict[str, Any], key: str) -> list[Any]:
    values = row.get(key)
    if not isinstance(values, list):
        raise TableError(f"{key!r} must be a list of lists")
    return values


def _numbers(row: dict[str, Any], key: str) -> tuple[float, ...]:
    values = row.get(key)
    if not isinstance(values, list) or not values:
        raise TableError(f"{key!r} must be a list of numbers")
    if not all(type(v) in (int, float) and abs(v) <= sys.float_info.max for v in values):
        raise TableError(f"{key!r} must hold finite numbers only")
    return tuple(map(float, values))


def _whole(row: dict[str, Any], key: str) -> tuple[int, ...]:
    values = row.get(key)
    if not isinstance(values, list) or not values or not all(type(v) is int and v > 0 for v in values):
        raise TableError(f"{key!r} must be a list of whole numbers from 1")
    return tuple(values)
