"""Perplexity: how far a layer's low-rank weight gradient is from the exact one, per energy (ASI, sec. 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.conversion.select import named_layers
from lowrank.errors import ConversionError, NonFiniteError
from lowrank.layers.layer import can_be_converted, geometry_of, is_single
from lowrank.layers.lazy import real
from lowrank.layers.preserve import LossFunction, preserved, tensors_in
from lowrank.layers.swap import stock_class
from lowrank.layers.token_mask import without_padding
from lowrank.ranks.table import Candidates, LayerPerplexity, PerplexityTable
from lowrank.tensors.costs import tucker_numel
from lowrank.tensors.decompose import Spectrum, check_energy, project, spectra
from lowrank.tensors.geometry import Geometry
from lowrank.tensors.gradients import weight_gradient
from lowrank.tensors.tucker import Tucker

ENERGIES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MODE_ENERGIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)

Ranks = tuple[int, ...]


def measure_perplexity(
    model: nn.Module,
    names: Iterable[str],
    loss_fn: LossFunction,
    batch: Any,
    energies: Sequence[float] = ENERGIES,
    mode_energies: Sequence[float] = (),
    further: Iterable[Any] = (),
) -> PerplexityTable:
    """Perplexity of each layer at each energy, from one forward and one backward pass a batch.

    Each layer's input is decomposed once; the core at a lower energy is a corner of the core at the highest. The model
    is left as it was: parameters, gradients, buffers, flags and the random state.

    The papers cut all modes of a layer at one energy. But a rank costs one row of the mode's size, so that at the same
    bytes a small mode can often be cut less than a large one, and the gradient be closer. With `mode_energies`, further
    candidates are measured for each layer: from the lowest of these energies in every mode, one mode at a time goes to
    its next one, always the mode that lowers the perplexity most for the bytes it adds, as long as the input is
    compressed. Each trial on the way is a candidate; `select_ranks` chooses among all. A few dozen low-rank gradients a
    layer more.

    Args:
        model: any module, converted or not.
        names: `nn.Conv2d` and `nn.Linear` layers; each is called once in the forward pass.
        loss_fn: `loss_fn(model, batch) -> scalar tensor`.
        batch: whatever `loss_fn` takes.
        energies: shares of the squared singular values that each mode keeps.
        mode_energies: shares to choose from for each mode apart, such as `lowrank.MODE_ENERGIES`; none by default.
        further: more batches, whose inputs have the same shapes. Energies are turned into ranks on the first batch;
            perplexity at these ranks, and the norm of the exact gradient, is the mean over all batches.

    Raises:
        ConversionError: a layer that is unknown, not supported, not called, or called more than once.
        NonFiniteError: the loss is not finite.
    """
    energies, mode_energies = (tuple(sorted(set(given))) for given in (energies, mode_energies))
    for energy in energies + mode_energies:
        check_energy(energy)
    layers = named_layers(model, names)
    for name, layer in layers.items():
        if not can_be_converted(layer):
            raise ConversionError(f"layer {name!r} ({stock_class(layer).__name__}) has no perplexity here")
    rows: dict[str, list[LayerPerplexity]] = {name: [] for name in layers}
    batches = [batch, *further]
    with preserved(model):
        for layer in layers.values():
            layer.requires_grad_(True)
        for number, each in enumerate(batches, start=1):
            probes = {name: _Probe(name, energies, mode_energies, rows[name]) for name in layers}
            _backward(model, layers, probes, loss_fn, each)
            missing = [name for name in layers if len(rows[name]) < number]
            if missing:
                raise ConversionError(f"the loss does not depend on {', '.join(map(repr, missing))}")
    shape = next((tuple(tensor.shape) for tensor in tensors_in(batch)), ())
    means = tuple(_mean(found) for found in rows.values())
    return PerplexityTable(type(model).__name__, shape, energies, means, len(batches))


def _backward(
    model: nn.Module, layers: dict[str, nn.Module], probes: dict[str, _Probe], loss_fn: LossFunction, batch: Any
) -> None:
    """One forward and one backward pass, in which every layer has its probe."""
    handles = [layer.register_forward_hook(probes[name]) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            loss = loss_fn(model, batch)
            if not torch.isfinite(loss).all():
                raise NonFiniteError("the loss of the perplexity batch is not finite; look for NaN in the batch")
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()


def _mean(rows: Sequence[LayerPerplexity]) -> LayerPerplexity:
    """One layer's mean over batches, at the ranks of the first."""
    first, mixed = rows[0], [row.mixed for row in rows if row.mixed is not None]
    if len(rows) == 1:
        return first
    return replace(
        first,
        perplexity=tuple(map(fmean, zip(*(row.perplexity for row in rows), strict=True))),
        mixed=replace(mixed[0], perplexity=tuple(map(fmean, zip(*(row.perplexity for row in mixed), strict=True))))
        if mixed
        else None,
        gradient_norm=fmean(row.gradient_norm for row in rows if row.gradient_norm is not None),
    )


class _Probe:
    """Forward hook of one layer; measures when the gradient of the layer's output arrives, and adds a row.

    The first row's ranks are those of the energies; further rows are at its ranks.
    """

    def __init__(
        self,
        name: str,
        energies: tuple[float, ...],
        mode_energies: tuple[float, ...],
        rows: list[LayerPerplexity],
    ) -> None:
        self.name, self.energies, self.mode_energies, self.rows = name, energies, mode_energies, rows
        self.called = False

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.called:
            raise ConversionError(f"layer {self.name!r} is called more than once in a forward pass")
        self.called = True
        if not output.requires_grad:
            raise ConversionError(f"layer {self.name!r} is called without gradients, so it has no perplexity")
        x, geometry, single = inputs[0].detach(), geometry_of(layer), is_single(layer, inputs[0])
        x = without_padding(x.unsqueeze(0) if single else x)
        output.register_hook(lambda grad: self.measure(x, real(grad.unsqueeze(0) if single else grad), geometry))

    @torch.no_grad()
    def measure(self, x: Tensor, grad: Tensor, geometry: Geometry) -> None:
        element_size = x.element_size()
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, grad = x.to(dtype), grad.to(dtype)
        row = self._again(x, grad, geometry) if self.rows else self._first(x, grad, geometry, element_size)
        if not all(map(math.isfinite, (*row.perplexity, *(row.mixed.perplexity if row.mixed else ())))):
            raise NonFiniteError(f"the weight gradient of layer {self.name!r} is not finite on the perplexity batch")
        self.rows.append(row)

    def _first(self, x: Tensor, grad: Tensor, geometry: Geometry, element_size: int) -> LayerPerplexity:
        gradients = _Gradients(x, grad, geometry, max(self.energies + self.mode_energies))
        shape, modes = tuple(x.shape), gradients.modes
        ranks = tuple(tuple(mode.rank(energy) for mode in modes) for energy in self.energies)
        measured = _entries(shape, element_size, [(entry, gradients.perplexity(entry)) for entry in ranks])
        notches = [_notches(mode, self.mode_energies) for mode in modes]
        mixed = _climb(shape, notches, gradients.perplexity) if self.mode_energies else {}
        chosen = (tuple(notch[rank] for notch, rank in zip(notches, entry, strict=True)) for entry in mixed)
        further = Candidates(tuple(chosen), *_entries(shape, element_size, list(mixed.items()))) if mixed else None
        return LayerPerplexity(self.name, shape, *measured, further, gradients.norm)

    def _again(self, x: Tensor, grad: Tensor, geometry: Geometry) -> LayerPerplexity:
        first = self.rows[0]
        if tuple(x.shape) != first.input_shape:
            raise ConversionError(
                f"layer {self.name!r} has an input of shape {tuple(x.shape)} on a further batch and of "
                f"{first.input_shape} on the first; perplexity is measured on batches of one shape"
            )
        every = first.ranks + (first.mixed.ranks if first.mixed else ())
        energy = max(self.energies + self.mode_energies)
        gradients = _Gradients(x, grad, geometry, energy, tuple(map(max, zip(*every, strict=True))))
        mixed = first.mixed and replace(first.mixed, perplexity=tuple(map(gradients.perplexity, first.mixed.ranks)))
        measured = tuple(map(gradients.perplexity, first.ranks))
        return replace(first, perplexity=measured, mixed=mixed, gradient_norm=gradients.norm)


class _Gradients:
    """Weight gradients of one layer from its input truncated at various ranks, decomposed once.

    Args:
        x, grad, geometry: the layer's input, the gradient of its output, and the layer.
        energy: the highest that is asked for.
        largest: the highest ranks that are asked for; by default those of that energy.
    """

    def __init__(
        self, x: Tensor, grad: Tensor, geometry: Geometry, energy: float, largest: Ranks | None = None
    ) -> None:
        self.grad, self.geometry = grad, geometry
        self.exact = geometry.weight_gradient(x, grad)
        self.norm = float(torch.linalg.vector_norm(self.exact))
        self.modes = spectra(x, exact=energy >= 1)
        ranks = largest or tuple(mode.rank(energy) for mode in self.modes)
        self.largest = project(x, [mode.basis(rank) for mode, rank in zip(self.modes, ranks, strict=True)])

    def perplexity(self, ranks: Ranks) -> float:
        """Frobenius norm of what the gradient at these ranks lacks."""
        low = weight_gradient(_corner(self.largest, ranks), self.grad, self.geometry)
        return float(torch.linalg.vector_norm(low - self.exact))


def _corner(tucker: Tucker, ranks: Ranks) -> Tucker:
    core = tucker.core[tuple(slice(rank) for rank in ranks)].contiguous()
    factors = (factor[:, :rank] for factor, rank in zip(tucker.factors, ranks, strict=True) if factor is not None)
    return Tucker(core, tuple(factors))


def _entries(
    shape: tuple[int, ...], element_size: int, measured: list[tuple[Ranks, float]]
) -> tuple[tuple[Ranks, ...], tuple[int, ...], tuple[float, ...]]:
    """Ranks, bytes and perplexity, each as a tuple."""
    nbytes = tuple(tucker_numel(shape, ranks) * element_size for ranks, _ in measured)
    return tuple(ranks for ranks, _ in measured), nbytes, tuple(perplexity for _, perplexity in measured)


def _notches(mode: Spectrum, energies: tuple[float, ...]) -> dict[int, float]:
    """The ranks that a mode can take, ascending, and the lowest of the energies that gives each."""
    ranks: dict[int, float] = {}
    for energy in energies:
        ranks.setdefault(mode.rank(energy), energy)
    return ranks


def _climb(
    shape: tuple[int, ...], notches: Sequence[Iterable[int]], perplexity: Callable[[Ranks], float]
) -> dict[Ranks, float]:
    """Perplexity of ranks on and beside the steepest way up from the lowest; `measure_perplexity` describes it."""
    ladder = [list(ranks) for ranks in notches]
    above = [dict(pairwise(ranks)) for ranks in ladder]
    at = tuple(ranks[0] for ranks in ladder)
    found = {at: perplexity(at)}

    def gain(step: Ranks) -> float:
        return (found[at] - found[step]) / (tucker_numel(shape, step) - tucker_numel(shape, at))

    while True:
        raised = [(mode, above[mode].get(rank)) for mode, rank in enumerate(at)]
        steps = [(*at[:mode], rank, *at[mode + 1 :]) for mode, rank in raised if rank is not None]
        steps = [step for step in steps if tucker_numel(shape, step) < math.prod(shape)]
        if not steps:
            return found
        found.update((step, perplexity(step)) for step in steps)
        at = max(steps, key=gain)
