"""What a run takes, measured once it is trained, and how far its layers' low-rank gradients are from the exact ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from experiment.allocator import keep_freed_memory
from experiment.files import write_whole
from experiment.folder import RunFolder
from experiment.history import History
from experiment.leavings import as_text, curves, memory_of, ranks_of
from experiment.processes import noted, place
from experiment.provenance import provenance, untold
from experiment.record import CODE, CURVES, FURTHER, MEMORY, RANKS, SETTINGS, Record, Run
from lowrank import Method, account, explain, measure_perplexity, peak_bytes, weight_memory

Loss = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Trained:
    """A trained network and what measuring it needs.

    Attributes:
        network: in the mode in which it trains.
        names: of the layers that are trained with the run's method.
        loss_fn: `loss_fn(network, batch) -> scalar tensor`, as it is trained.
        infer: `infer(network, batch)`, as it is used.
        batch: one of training.
        optimizer: the one that trained it.
        method: of the run, with the ranks that were chosen for its layers; None where nothing was converted.
    """

    network: nn.Module
    names: Sequence[str]
    loss_fn: Loss
    infer: Loss
    batch: Any
    optimizer: Optimizer
    method: Method | None = None


def recipe_of(batch_size: int, limit: float | None, **told: Any) -> dict[str, Any]:
    """How a run is trained, as its record says it; see `experiment.Record`.

    Args:
        batch_size: of each process.
        limit: of the training samples, if there is one.
        told: epochs, steps, learning_rate, image_size and precision.
    """
    sizes = {"batch_size": batch_size, "processes": place().count, "joined_batch_size": batch_size * place().count}
    return {**told, **sizes, **({"limit": limit} if limit is not None else {})}


def record_of(
    run: Run,
    folder: RunFolder,
    trained: Trained,
    history: History,
    accuracy: Mapping[str, float],
    recipe: Mapping[str, Any],
    further: Mapping[str, Any],
    beside: Mapping[str, Any] | None = None,
) -> Record:
    """The record of a finished run, to be saved, and what it leaves for people to look at, which is written.

    The folder knows the run's data; the network is left in evaluation mode. `further` has the settings that neither the
    run nor its recipe says, by which the record can be told from others, and `beside` what not even the run's identity
    tells, such as how the perplexity was measured that ranks were chosen by. See `experiment.leavings` for the files.
    """
    assert folder.data_fingerprint is not None
    network, loss_fn, batch = trained.network, trained.loss_fn, trained.batch
    kept = explain(network, loss_fn, batch)
    left: dict[str, str | bytes] = {MEMORY: as_text(memory_of(kept)), CURVES: curves(history.rows, str(run))}
    memory = {
        "activation_formula": history.activation_bytes,
        "saved_measured": kept.nbytes,
        "peak_measured": peak_bytes(network, loss_fn, batch),
    }
    flops = {}
    if trained.names:
        costs = account(network, trained.names, batch, forward=loss_fn)
        flops = {"paper": costs.total.flops_paper, "corrected": costs.total.flops}
        left[RANKS] = as_text(ranks_of(network, loss_fn, batch, costs, trained.method))
        memory |= _weights(trained)
    memory["peak_inference"] = peak_bytes(network.eval(), trained.infer, batch, backward=False)
    for name, content in left.items():
        write_whole(folder.path / name, content)
    history.save()  # a resumed run has rows of its checkpoint, and may have added none to a file that was lost
    return Record(
        run=run,
        accuracy=dict(accuracy),
        memory_bytes=memory,
        flops=flops,
        time_s=history.times,
        provenance=provenance(folder.identity_hash, folder.data_fingerprint, keep_freed_memory())
        | {"repeated_test_images": folder.repeated, FURTHER: dict(further)}
        | {CODE: {what: source["hash"] for what, source in folder.sources.items()}}
        | {SETTINGS: untold(folder.identity, further) | dict(beside or {})}
        | noted(),
        recipe=dict(recipe),
        loss={"train_last": history.rows[-1]["train_loss"]},
    )


def _weights(trained: Trained) -> dict[str, int]:
    found = weight_memory(trained.network, trained.names, trained.loss_fn, trained.batch, trained.optimizer)
    held = {
        "weight_measured": found.weight,
        "weight_gradient_measured": found.gradient,
        "weight_optimizer_measured": found.optimizer,
    }
    return held | ({"weight_emulated_formula": found.emulated} if found.emulated else {})


def write_table(
    run: Run,
    folder: RunFolder,
    network: nn.Module,
    names: Sequence[str],
    loss_fn: Loss,
    batches: Sequence[Any],
    settings: Mapping[str, Any],
) -> Path:
    """Measure the perplexity of layers and write the table, where the run's folder has its result.

    Args:
        run: names the network in the table.
        folder: of the run, locked.
        network, names, loss_fn: see `lowrank.measure_perplexity`.
        batches: one or more of training; the table has their mean.
        settings: further arguments of `lowrank.measure_perplexity`, such as energies.
    """
    table = measure_perplexity(network, names, loss_fn, batches[0], further=batches[1:], **settings)
    replace(table, model=run.model).save(folder.result)
    print(f"perplexity of {len(table.layers)} layer{'s' * (len(table.layers) > 1)} in {folder.result}", flush=True)
    return folder.result
