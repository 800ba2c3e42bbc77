"""Perplexity: how far a layer's low-rank weight gradient is from the exact one, per energy (ASI, sec. 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.conversion.select import named_layers, weights_of
from lowrank.errors import ConversionError, NonFiniteError, SettingError
from lowrank.layers.arguments import input_among
from lowrank.layers.derived import Derivation
from lowrank.layers.layer import can_be_converted, computed_input, geometry_of, is_single
from lowrank.layers.lazy import real
from lowrank.layers.preserve import LossFunction, loss_of, preserved, tensors_in, without_graphs
from lowrank.layers.swap import stock_class
from lowrank.layers.token_mask import without_padding
from lowrank.methods.deriving import check_derive, measured_with
from lowrank.ranks.derivations import find_derivations
from lowrank.ranks.table import Candidates, Derived, Energy, LayerPerplexity, PerplexityTable, joined, kept_bytes
from lowrank.tensors.decompose import Spectrum, allowed_ranks, check_energy, project, spectra
from lowrank.tensors.eager import without_autocast
from lowrank.tensors.geometry import Geometry
from lowrank.tensors.gradients import weight_gradient
from lowrank.tensors.storage import Storage, check_storage, kept_ranks, restore, store
from lowrank.tensors.tucker import Tucker, mode_product

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
    storages: Sequence[Storage] = ("input",),
    derive: bool | int = False,
) -> PerplexityTable:
    """Perplexity of each layer at each energy, from one forward and one backward pass a batch.

    Each layer's input is decomposed once; the core at a lower energy is a corner of the core at the highest. The model
    is left as it was: parameters, gradients, buffers, flags and the random state.

    The papers cut all modes of a layer at one energy. But a rank costs one row of the mode's size, so that at the same
    bytes a small mode can often be cut less than a large one, and the gradient be closer. With `mode_energies`, further
    candidates are measured for each layer: from the lowest of these energies in every mode, one mode at a time goes to
    its next one and at last to being left whole, without a factor, always the mode that lowers the perplexity most for
    the bytes it adds, as long as those are less than the input's. Each trial on the way is a candidate; `select_ranks`
    chooses among all. A few dozen low-rank gradients a layer more, for each storage.

    With other storages than "input" the candidates are measured as they come back from them, each beside those in the
    input's own dtype.

    Args:
        model: any module, converted or not.
        names: `nn.Conv2d` and `nn.Linear` layers; each is called once in the forward pass.
        loss_fn: `loss_fn(model, batch) -> scalar tensor`.
        batch: whatever `loss_fn` takes.
        energies: shares of the squared singular values that each mode keeps.
        mode_energies: shares to choose from for each mode apart, such as `lowrank.MODE_ENERGIES`; none by default.
        further: more batches, whose inputs have the same shapes. Energies are turned into ranks on the first batch;
            perplexity at these ranks, and the norm of the exact gradient, is the mean over all batches.
        storages: of the Tucker form, see `lowrank.tensors.storage`.
        derive: True measures as well, of each candidate of a layer from whose input those of others follow (`derive` of
            `ASI`), the perplexity of all these layers together, for `select_ranks` with `derive`. One more
            forward pass a batch, and for each candidate the steps that give the others' inputs. A number: of methods
            that allow so many products.

    Raises:
        ConversionError: a layer that is unknown, not supported, not called, or called more than once.
        NonFiniteError: the loss is not finite.
        SettingError: energies, a storage or `derive` out of what is allowed.
    """
    energies, mode_energies = _ascending(energies), _ascending(mode_energies)
    if not energies:
        raise SettingError("no energy is given; give some above 0 and at most 1, such as (0.4, 0.6, 0.8)")
    for storage in storages:
        check_storage(storage)
    check_derive(derive)
    derive = measured_with(derive)
    layers = named_layers(model, names)
    for name, layer in layers.items():
        if not can_be_converted(layer) or not all(weight.numel() for weight in weights_of(layer)):
            raise ConversionError(f"layer {name!r} ({stock_class(layer).__name__}) has no perplexity here")
    rows: dict[str, list[LayerPerplexity]] = {name: [] for name in layers}
    batches = [batch, *further]
    with preserved(model), without_graphs():
        for layer in layers.values():
            layer.requires_grad_(True)
        for number, each in enumerate(batches, start=1):
            probes = {name: _Probe(name, energies, mode_energies, tuple(storages), rows[name]) for name in layers}
            if derive:
                for name, how in find_derivations(model, list(layers), loss_fn, each, derive).items():
                    probes[name].hand_to = partial(probes[how.ahead].take, name, how)
            _backward(model, layers, probes, loss_fn, each)
            missing = [name for name in layers if len(rows[name]) < number]
            if missing:
                raise ConversionError(f"the loss does not depend on {', '.join(map(repr, missing))}")
    shape = next((tuple(tensor.shape) for tensor in tensors_in(batch)), ())
    means = tuple(_mean(found) for found in rows.values())
    return PerplexityTable(type(model).__name__, shape, energies, means, len(batches), derive)


def _backward(
    model: nn.Module, layers: dict[str, nn.Module], probes: dict[str, _Probe], loss_fn: LossFunction, batch: Any
) -> None:
    """One forward and one backward pass, in which every layer has its probe."""
    handles = [layer.register_forward_hook(probes[name], with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            loss = loss_of(loss_fn, model, batch)
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
        derived=_mean_derived([row.derived for row in rows if row.derived is not None], len(rows)),
    )


def _mean_derived(found: Sequence[Derived], count: int) -> Derived | None:
    """Of all batches, on which the same has to follow."""
    if len(found) < count:
        return None
    return replace(found[0], perplexity=tuple(map(fmean, zip(*(each.perplexity for each in found), strict=True))))


class _Probe:
    """Forward hook of one layer; measures when the gradient of the layer's output arrives, and adds a row.

    The first row's ranks are those of the energies; further rows are at its ranks.
    """

    def __init__(
        self,
        name: str,
        energies: tuple[float, ...],
        mode_energies: tuple[float, ...],
        storages: tuple[Storage, ...],
        rows: list[LayerPerplexity],
    ) -> None:
        self.name, self.energies, self.mode_energies, self.rows = name, energies, mode_energies, rows
        self.storages, self.called = storages, False
        # Layers whose inputs follow from this one's; whom this one follows; neither, where that is not asked for.
        self.behind: dict[str, _Behind] = {}
        self.hand_to: Callable[[Tensor, Tensor, Geometry], None] | None = None

    def take(self, name: str, how: Derivation, x: Tensor, grad: Tensor, geometry: Geometry) -> None:
        """A layer behind this one has its gradient, as it has ahead of this one."""
        self.behind[name] = _Behind(how, tuple(x.shape), grad, geometry, geometry.weight_gradient(x, grad))

    def __call__(self, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        if self.called:
            again = torch._C._current_graph_task_id() != -1
            raise ConversionError(
                f"layer {self.name!r} is run again in the backward pass, as gradient checkpointing does; switch that "
                f"off while perplexity is measured"
                if again
                else f"layer {self.name!r} is called more than once in a forward pass"
            )
        self.called = True
        if not output.requires_grad:
            raise ConversionError(f"layer {self.name!r} is called without gradients, so it has no perplexity")
        input, geometry = input_among(given, named), geometry_of(layer)
        x, single = computed_input(layer, input.detach()), is_single(layer, input)
        x = without_padding(x.unsqueeze(0) if single else x, geometry)
        output.register_hook(lambda grad: self.measure(x, real(grad.unsqueeze(0) if single else grad), geometry))

    @torch.no_grad()
    def measure(self, x: Tensor, grad: Tensor, geometry: Geometry) -> None:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        # All of a mode, where candidates may be left whole, and on further batches, whatever their own energies.
        whole = bool(self.mode_energies or self.rows)
        with without_autocast(x.device.type):
            if self.hand_to is not None:
                self.hand_to(x.to(dtype), grad.to(dtype), geometry)
            gradients = _Gradients(x.to(dtype), grad.to(dtype), geometry, self.energies + self.mode_energies, whole)
            row = self._again(gradients) if self.rows else self._first(x, gradients)
            row = replace(row, derived=self._derived(gradients, row, x.dtype))
        if not all(map(math.isfinite, (*row.perplexity, *(row.mixed.perplexity if row.mixed else ())))):
            raise NonFiniteError(f"the weight gradient of layer {self.name!r} is not finite on the perplexity batch")
        self.rows.append(row)

    def _derived(self, gradients: _Gradients, row: LayerPerplexity, dtype: torch.dtype) -> Derived | None:
        """The perplexity of all that follows from this input, of this dtype, for each of a row's candidates."""
        if not self.behind:
            return None
        layers = list(self.behind.values())
        own = [gradients.together(gradients.corner(ranks), layers, dtype) for ranks in row.ranks]
        mixed = [] if row.mixed is None else list(zip(row.mixed.ranks, row.mixed.storages, strict=True))
        further = [gradients.together(gradients.form(*pair), layers, dtype) for pair in mixed]
        return Derived({name: layer.shape for name, layer in self.behind.items()}, (*own, *further))

    def _first(self, x: Tensor, gradients: _Gradients) -> LayerPerplexity:
        uniform = [tuple(mode.rank(energy) for mode in gradients.modes) for energy in self.energies]
        nbytes = tuple(_Trials(gradients, x, "input").nbytes(ranks) for ranks in uniform)
        further = []
        for storage in dict.fromkeys(self.storages):
            trials = _Trials(gradients, x, storage)
            if storage != "input":
                each = [(energy,) * x.ndim for energy in self.energies]
                further.append(trials.candidates(zip(each, uniform, strict=True)))
            if self.mode_energies:
                notches = [_notches(mode, self.mode_energies) for mode in gradients.modes]
                named = [(tuple(n[r] for n, r in zip(notches, at, strict=True)), at) for at in _climb(notches, trials)]
                further.append(trials.candidates(named))
        mixed = joined(further) if further else None
        measured = (tuple(uniform), nbytes, tuple(map(gradients.published, uniform)))
        return LayerPerplexity(self.name, gradients.shape, *measured, mixed, gradients.norm)

    def _again(self, gradients: _Gradients) -> LayerPerplexity:
        first = self.rows[0]
        if gradients.shape != first.input_shape:
            raise ConversionError(
                f"layer {self.name!r} has an input of shape {gradients.shape} on a further batch and of "
                f"{first.input_shape} on the first; perplexity is measured on batches of one shape"
            )
        mixed = first.mixed
        if mixed is not None:
            mixed = replace(mixed, perplexity=tuple(map(gradients.perplexity, mixed.ranks, mixed.storages)))
        measured = tuple(map(gradients.published, first.ranks))
        return replace(first, perplexity=measured, mixed=mixed, gradient_norm=gradients.norm)


@dataclass(frozen=True)
class _Behind:
    """A layer whose input follows from another's.

    Attributes:
        how: it follows.
        shape: of the input.
        grad: of the layer's output.
        geometry: of the layer.
        exact: its weight gradient.
    """

    how: Derivation
    shape: Ranks
    grad: Tensor
    geometry: Geometry
    exact: Tensor

    def lacks(self, x: Tensor) -> float:
        """Frobenius norm of what the gradient lacks where the other layer's input is `x`."""
        near = self.how(x).to(self.grad.dtype)
        return float(torch.linalg.vector_norm(self.geometry.weight_gradient(near, self.grad) - self.exact))


class _Gradients:
    """Weight gradients of one layer from its input truncated at various ranks, decomposed once."""

    def __init__(self, x: Tensor, grad: Tensor, geometry: Geometry, energies: tuple[float, ...], whole: bool) -> None:
        self.x, self.grad, self.geometry, self.shape = x, grad, geometry, tuple(x.shape)
        self.exact = geometry.weight_gradient(x, grad)
        self.norm = float(torch.linalg.vector_norm(self.exact))
        self.modes = spectra(x, exact=max(energies) >= 1)
        uniform = [tuple(mode.rank(energy) for mode in self.modes) for energy in energies]
        kept = zip(*map(self.kept, uniform), strict=True)
        ranks = [
            len(mode.energies) if whole or size in needed else mode.rank(max(energies))
            for mode, size, needed in zip(self.modes, self.shape, kept, strict=True)
        ]
        self.largest = project(x, [mode.basis(rank) for mode, rank in zip(self.modes, ranks, strict=True)])

    def kept(self, ranks: Ranks, storage: Storage = "input") -> Ranks:
        """The ranks at which ASI with these keeps the input."""
        return kept_ranks(self.shape, allowed_ranks(self.shape, ranks), storage)

    def perplexity(self, ranks: Ranks, storage: Storage) -> float:
        """Frobenius norm of what the gradient lacks where ASI has these ranks, in this storage."""
        return self._lacks(self.form(ranks, storage))

    def form(self, ranks: Ranks, storage: Storage) -> Tucker:
        """What ASI with these ranks has of the input in the backward pass, but for its iteration."""
        tucker = self.corner(self.kept(ranks, storage))
        return tucker if storage == "input" else restore(store(self.x, tucker, storage), self.grad.dtype)

    def together(self, tucker: Tucker, layers: Sequence[_Behind], dtype: torch.dtype) -> float:
        """What the gradient lacks with this form, and those of layers whose inputs follow from it in this dtype."""
        x = tucker.dense().to(dtype)
        return self._lacks(tucker) + sum(layer.lacks(x) for layer in layers)

    def published(self, ranks: Ranks) -> float:
        """The same of the HOSVD at these ranks (ASI, sec. 3.3), also where ASI leaves a mode whole."""
        return self._lacks(self.corner(ranks))

    def _lacks(self, tucker: Tucker) -> float:
        low = weight_gradient(tucker, self.grad, self.geometry)
        return float(torch.linalg.vector_norm(low - self.exact))

    def corner(self, ranks: Ranks) -> Tucker:
        """The form at lower ranks; a mode of full rank is left whole."""
        core = self.largest.core[tuple(slice(rank) for rank in ranks)].contiguous()
        factors: list[Tensor | None] = []
        for mode, (factor, rank) in enumerate(zip(self.largest.factors, ranks, strict=True)):
            assert factor is not None
            whole = rank == self.shape[mode]
            core = mode_product(core, factor, mode) if whole else core
            factors.append(None if whole else factor[:, :rank])
        return Tucker(core, tuple(factors))


class _Trials:
    """Candidates of one layer in one storage, each measured once."""

    def __init__(self, gradients: _Gradients, x: Tensor, storage: Storage) -> None:
        self.gradients, self.shape, self.dtype, self.storage = gradients, tuple(x.shape), x.dtype, storage
        self._found: dict[Ranks, float] = {}

    def perplexity(self, ranks: Ranks) -> float:
        """At these ranks."""
        if ranks not in self._found:
            self._found[ranks] = self.gradients.perplexity(ranks, self.storage)
        return self._found[ranks]

    def nbytes(self, ranks: Ranks) -> int:
        """Bytes that are kept at these ranks."""
        return kept_bytes(self.shape, ranks, self.dtype, self.storage)

    def candidates(self, named: Iterable[tuple[Energy, Ranks]]) -> Candidates:
        """Those of some energies, each with its ranks."""
        energies, ranks = zip(*named, strict=True)
        nbytes, perplexity = tuple(map(self.nbytes, ranks)), tuple(map(self.perplexity, ranks))
        return Candidates(energies, ranks, nbytes, perplexity, (self.storage,) * len(ranks))


def _ascending(energies: Iterable[float]) -> tuple[float, ...]:
    """Each energy once."""
    given = list(energies) if isinstance(energies, Iterable) else [energies]
    for energy in given:
        check_energy(energy)
    return tuple(sorted(set(given)))


def _notches(mode: Spectrum, energies: tuple[float, ...]) -> dict[int, float]:
    """The ranks that a mode can take, ascending, up to all of them, and the lowest of the energies that gives each."""
    ranks: dict[int, float] = {}
    for energy in energies:
        ranks.setdefault(mode.rank(energy), energy)
    ranks.setdefault(len(mode.energies), 1.0)
    return ranks


def _climb(notches: Sequence[Iterable[int]], trials: _Trials) -> list[Ranks]:
    """Ranks on and beside the steepest way up from the lowest; `measure_perplexity` describes it."""
    ladder = [list(ranks) for ranks in notches]
    above = [dict(pairwise(ranks)) for ranks in ladder]
    at = tuple(ranks[0] for ranks in ladder)
    found = {at: None}
    most = trials.nbytes(trials.shape)

    def gain(step: Ranks) -> float:
        # A mode that is left whole, or a rank that the other modes do not allow, may add nothing.
        return (trials.perplexity(at) - trials.perplexity(step)) / max(trials.nbytes(step) - trials.nbytes(at), 1)

    while True:
        raised = [(mode, above[mode].get(rank)) for mode, rank in enumerate(at)]
        steps = [(*at[:mode], rank, *at[mode + 1 :]) for mode, rank in raised if rank is not None]
        steps = [step for step in steps if trials.nbytes(step) < most]
        if not steps:
            break
        found.update(dict.fromkeys(steps))
        at = max(steps, key=gain)
    if trials.storage != "input":  # rounded and not truncated
        found[tuple(ranks[-1] for ranks in ladder)] = None
    return list(found)
