"""Perplexity: how far a layer's low-rank weight gradient is from the exact one, per energy (ASI, sec. 3.3)."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.convert import named_layers, stock_type
from lowrank.costs import tucker_numel
from lowrank.decompose import check_energy, project, spectra
from lowrank.errors import ConversionError, NonFiniteError, TableError
from lowrank.geometry import Geometry
from lowrank.gradients import weight_gradient
from lowrank.layers import FAMILIES, norms_apart
from lowrank.padding import without_padding
from lowrank.preserve import preserved, tensors_in
from lowrank.tucker import Tucker

ENERGIES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SCHEMA = 1

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class LayerPerplexity:
    """One layer's row: for each energy of the table its ranks, bytes and perplexity.

    Attributes:
        name: the layer.
        input_shape: shape of its input in the batch that was measured.
        ranks: per energy, one rank per mode of the input.
        nbytes: per energy, bytes of the Tucker form.
        perplexity: per energy, the Frobenius norm of the difference between the two weight gradients.
    """

    name: str
    input_shape: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    nbytes: tuple[int, ...]
    perplexity: tuple[float, ...]


@dataclass(frozen=True)
class PerplexityTable:
    """Perplexity of layers at several energies, measured on one batch.

    Attributes:
        model: name of the model's class.
        batch_shape: shape of the batch's first tensor.
        energies: ascending.
        layers: one row each, in the model's order.
    """

    model: str
    batch_shape: tuple[int, ...]
    energies: tuple[float, ...]
    layers: tuple[LayerPerplexity, ...]

    @property
    def names(self) -> list[str]:
        """Names of the layers."""
        return [layer.name for layer in self.layers]

    def only(self, names: Iterable[str]) -> PerplexityTable:
        """The table of some of its layers.

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
        return PerplexityTable(self.model, self.batch_shape, self.energies, tuple(rows[name] for name in names))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, whole or not at all."""
        target = Path(path)
        part = target.with_name(f"{target.name}.part")
        part.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n")
        part.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PerplexityTable:
        """Read a table.

        Raises:
            TableError: the file is missing, damaged, or not a perplexity table; says where.
        """
        try:
            content = json.loads(Path(path).read_text())
            return _parse(content)
        except (OSError, UnicodeDecodeError) as error:
            raise TableError(f"perplexity table {path} cannot be read: {error}") from None
        except json.JSONDecodeError as error:
            raise TableError(f"perplexity table {path} is not whole JSON ({error}); measure it again") from None
        except TableError as error:
            raise TableError(f"perplexity table {path}: {error}; measure it again") from None


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
    return PerplexityTable(model, () if batch_shape == [] else _whole(content, "batch_shape"), energies, layers)


def _parse_layer(row: Any, count: int) -> LayerPerplexity:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise TableError("an entry of 'layers' has no name")
    name = row["name"]
    try:
        shape = _whole(row, "input_shape")
        entries = row.get("ranks")
        if not isinstance(entries, list):
            raise TableError("'ranks' must be a list of lists")
        ranks = tuple(_whole({"ranks": entry}, "ranks") for entry in entries)
        nbytes, perplexity = _whole(row, "nbytes"), _numbers(row, "perplexity")
    except TableError as error:
        raise TableError(f"layer {name!r}: {error}") from None
    if not len(ranks) == len(nbytes) == len(perplexity) == count:
        raise TableError(f"layer {name!r}: 'ranks', 'nbytes' and 'perplexity' need one entry for each energy")
    for entry, size in zip(ranks, nbytes, strict=True):
        if len(entry) != len(shape) or any(r > n for r, n in zip(entry, shape, strict=True)):
            raise TableError(f"layer {name!r}: ranks {entry} do not fit the input shape {shape}")
        if size % tucker_numel(shape, entry):
            raise TableError(f"layer {name!r}: {size} bytes do not fit ranks {entry} of the input shape {shape}")
    if min(perplexity) < 0:
        raise TableError(f"layer {name!r}: a perplexity is negative")
    return LayerPerplexity(name, shape, ranks, nbytes, perplexity)


def _numbers(row: dict[str, Any], key: str) -> tuple[float, ...]:
    values = row.get(key)
    if not isinstance(values, list) or not values:
        raise TableError(f"{key!r} must be a list of numbers")
    if not all(type(v) in (int, float) and abs(v) <= sys.float_info.max for v in values):
        raise TableError(f"{key!r} must hold finite numbers only")
    return tuple(values)


def _whole(row: dict[str, Any], key: str) -> tuple[int, ...]:
    values = row.get(key)
    if not isinstance(values, list) or not values or not all(type(v) is int and v > 0 for v in values):
        raise TableError(f"{key!r} must be a list of whole numbers from 1")
    return tuple(values)


def measure_perplexity(
    model: nn.Module,
    names: Iterable[str],
    loss_fn: LossFunction,
    batch: Any,
    energies: Sequence[float] = ENERGIES,
) -> PerplexityTable:
    """Perplexity of each layer at each energy, from one forward and one backward pass.

    Each layer's input is decomposed once; the core at a lower energy is a corner of the core at the highest. The model
    is left as it was: parameters, gradients, buffers, flags and the random state.

    Args:
        model: any module, converted or not.
        names: `nn.Conv2d` and `nn.Linear` layers; each is called once in the forward pass.
        loss_fn: `loss_fn(model, batch) -> scalar tensor`.
        batch: whatever `loss_fn` takes.
        energies: shares of the squared singular values that each mode keeps.

    Raises:
        ConversionError: a layer that is unknown, not supported, not called, or called more than once.
        NonFiniteError: the loss is not finite.
    """
    energies = tuple(sorted(set(energies)))
    for energy in energies:
        check_energy(energy)
    layers = named_layers(model, names)
    for name, layer in layers.items():
        if stock_type(layer) not in FAMILIES:
            raise ConversionError(f"layer {name!r} ({stock_type(layer).__name__}) has no perplexity here")
    rows: dict[str, LayerPerplexity] = {}
    with preserved(model), norms_apart(model):
        for layer in layers.values():
            layer.requires_grad_(True)
        handles = [layer.register_forward_hook(_Probe(name, energies, rows)) for name, layer in layers.items()]
        try:
            with torch.enable_grad():
                loss = loss_fn(model, batch)
                if not torch.isfinite(loss).all():
                    raise NonFiniteError("the loss of the perplexity batch is not finite; look for NaN in the batch")
                loss.backward()
        finally:
            for handle in handles:
                handle.remove()
    missing = [name for name in layers if name not in rows]
    if missing:
        raise ConversionError(f"the loss does not depend on {', '.join(map(repr, missing))}")
    shape = next((tuple(tensor.shape) for tensor in tensors_in(batch)), ())
    return PerplexityTable(type(model).__name__, shape, energies, tuple(rows[name] for name in layers))


class _Probe:
    """Forward hook of one layer; measures when the gradient of the layer's output arrives."""

    def __init__(self, name: str, energies: Sequence[float], rows: dict[str, LayerPerplexity]) -> None:
        self.name, self.energies, self.rows = name, energies, rows
        self.called = False

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.called:
            raise ConversionError(f"layer {self.name!r} is called more than once in a forward pass")
        self.called = True
        if not output.requires_grad:
            raise ConversionError(f"layer {self.name!r} is called without gradients, so it has no perplexity")
        family = FAMILIES[stock_type(layer)]
        geometry = family.geometry_of(layer)
        x = without_padding(family.batched(inputs[0].detach()))
        output.register_hook(lambda grad: self.measure(x, family.batched(grad), geometry))

    @torch.no_grad()
    def measure(self, x: Tensor, grad: Tensor, geometry: Geometry) -> None:
        element_size = x.element_size()
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, grad = x.to(dtype), grad.to(dtype)
        exact = geometry.weight_gradient(x, grad)
        modes = spectra(x, exact=self.energies[-1] >= 1)
        ranks = [tuple(mode.rank(energy) for mode in modes) for energy in self.energies]
        largest = project(x, [mode.basis(rank) for mode, rank in zip(modes, ranks[-1], strict=True)])
        perplexity = []
        for entry in ranks:
            low = weight_gradient(_corner(largest, entry), grad, geometry)
            perplexity.append(float(torch.linalg.vector_norm(low - exact)))
        if not all(map(math.isfinite, perplexity)):
            raise NonFiniteError(f"the weight gradient of layer {self.name!r} is not finite on the perplexity batch")
        shape = tuple(x.shape)
        nbytes = tuple(tucker_numel(shape, entry) * element_size for entry in ranks)
        self.rows[self.name] = LayerPerplexity(self.name, shape, tuple(ranks), nbytes, tuple(perplexity))


def _corner(tucker: Tucker, ranks: Sequence[int]) -> Tucker:
    core = tucker.core[tuple(slice(rank) for rank in ranks)].contiguous()
    factors = (factor[:, :rank] for factor, rank in zip(tucker.factors, ranks, strict=True) if factor is not None)
    return Tucker(core, tuple(factors))
