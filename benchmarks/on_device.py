"""Latency, energy and memory of fine-tuning on the machine at hand: a training step and an inference pass per method.

    python -m benchmarks.on_device [--help]

Every row is one network, method and energy: the median and the spread of the times of whole steps (forward, backward,
optimizer) and of whole inference passes, after warm-up, in one process with a stated number of threads; energy where
the machine has a meter; memory of the trained layers by formula, of their weights in training and of what autograd
keeps as measured. With --pairs also the ratio to vanilla's times, from steps that alternate with vanilla's, which is
what to go by on a machine that does other work too. A method's name with _unfused behind it compresses the trained
layers alone; without, the rest of the network keeps less too, and computes parts of its forward pass again for it.
Nothing but this package's requirements is needed.

Where no trained weights are given, the weights of the trained linear layers are random with singular values that fall
as j^(-1/2): at energy 0.9 their rank is about half of the full one, roughly that of trained transformers. Ranks of
activations are those at which the energy is reached in each mode on the batch itself; for the mode of the channels, on
its first 32 images.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import lowrank
from benchmarks.energy import measured, meter_name
from benchmarks.networks import Batch, batch_of, loss_of
from benchmarks.pairs import ratio
from classification.backbones import build_model
from experiment.files import write_whole
from lowrank.tensors.decompose import spectrum

NETWORKS = ("vit_b_32", "swin_t", "mcunet", "vit_mini", "swin_mini")
ENERGIES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WITHOUT_ENERGY = ("vanilla", "vanilla_fused")
UNFUSED = "_unfused"
METHODS = (*WITHOUT_ENERGY, "hosvd", "asi", "wsi", "wasi", f"asi{UNFUSED}", f"wsi{UNFUSED}", f"wasi{UNFUSED}")
CHANNEL_IMAGES = 32
SEED = 233

Ranks = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Setting:
    """What is measured: sizes, and how often."""

    batch: int
    size: int
    layers: str
    warmup: int
    repeats: int
    pairs: int = 0


def build(network: str, layers: str) -> tuple[nn.Module, list[str]]:
    """A network with everything ahead of its trained layers frozen, and their names."""
    torch.manual_seed(SEED)
    model = build_model(network)
    kind: Any = "conv" if network == "mcunet" else "linear"
    part: Any = "all" if network == "mcunet" else "mlp"
    names = lowrank.trailing_layers(model, "all" if layers == "all" else int(layers), kind, part)
    lowrank.freeze_before(model, names)
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            give_decaying_spectrum(layer.weight)
    for layer in model.modules():
        if type(layer).__name__ == "StochasticDepth":
            layer.p = 0.0  # the same work in every step
    return in_training(model), names


def in_training(model: nn.Module) -> nn.Module:
    """The network in the mode in which it trains: batch normalisation with its stored statistics."""
    for layer in model.train().modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    return model


@torch.no_grad()
def give_decaying_spectrum(weight: Tensor, exponent: float = 0.5) -> None:
    """Replace the singular values of a random weight (O, I) by j^(-exponent), in place, at the same norm."""
    norm = torch.linalg.vector_norm(weight)
    rank = min(weight.shape)
    left, right = (torch.linalg.qr(torch.randn(size, rank))[0] for size in weight.shape)
    values = torch.arange(1, rank + 1).float() ** -exponent
    weight.copy_(left * values @ right.mT * (norm / torch.linalg.vector_norm(values)))


@torch.no_grad()
def ranks_at(model: nn.Module, names: list[str], batch: Batch, energies: tuple[float, ...]) -> dict[float, Ranks]:
    """Per energy and layer, the ranks at which every mode of the layer's input holds that share of it."""
    found: dict[float, Ranks] = {energy: {} for energy in energies}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x, channel = inputs[0], 1 if isinstance(layer, nn.Conv2d) else inputs[0].ndim - 1
            modes = [spectrum(x[:CHANNEL_IMAGES] if mode == channel else x, mode) for mode in range(x.ndim)]
            for energy in energies:
                found[energy][name] = tuple(mode.rank(energy) for mode in modes)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names]
    try:
        model(batch[0])
    finally:
        for handle in handles:
            handle.remove()
    return found


def converted(model: nn.Module, names: list[str], method: str, energy: float | None, ranks: Ranks) -> nn.Module:
    """The network as a method trains it."""
    methods: dict[str, Callable[[], lowrank.Method]] = {
        "vanilla_fused": lowrank.Vanilla,
        "hosvd": lambda: lowrank.HOSVD(energy or 1.0),
        "asi": lambda: lowrank.ASI(ranks=ranks),
        "wsi": lambda: lowrank.WSI(energy=energy or 1.0),
        "wasi": lambda: lowrank.WASI(energy=energy or 1.0, ranks=ranks),
    }
    if method == "vanilla":
        return model
    name = method.removesuffix(UNFUSED)
    return lowrank.convert(model, names, methods[name](), fuse=name == method)


def seconds_and_joules(work: Callable[[], None], setting: Setting, device: torch.device) -> dict[str, float | None]:
    """Median time of one piece of work, the least and the most, and its mean energy."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(setting.warmup):
        work()
    times = []
    finish()
    with measured() as energy:
        for _ in range(setting.repeats):
            start = time.perf_counter()
            work()
            finish()
            times.append(time.perf_counter() - start)
    joules = None if energy.joules is None else energy.joules / setting.repeats
    return {"s": statistics.median(times), "s_least": min(times), "s_most": max(times), "joules": joules}


def memory(model: nn.Module, names: list[str], batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Bytes of the trained layers by formula, of their weights in training, and what autograd keeps in all."""
    cost = lowrank.account(model, names, batch).total
    weights = lowrank.weight_memory(model, names, loss_of, batch, optimizer)
    return {
        "activation_formula": cost.activation_bytes,
        "weight_formula": cost.weight_bytes,
        "weight_measured": weights.weight,
        "weight_training_measured": weights.total,
        "weight_emulated_formula": weights.emulated,
        "kept_measured": lowrank.saved_bytes(model, loss_of, batch),
    }


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Forward, backward and optimizer."""
    optimizer.zero_grad()
    loss_of(in_training(model), batch).backward()
    optimizer.step()


@torch.no_grad()
def inference(model: nn.Module, batch: Batch) -> None:
    """One forward pass."""
    model.eval()
    model(batch[0])


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """The papers' optimizer: SGD without momentum."""
    return lowrank.SGD([p for p in model.parameters() if p.requires_grad], 1e-4)


def over_vanilla(
    network: str, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, setting: Setting
) -> dict[str, float]:
    """Times over vanilla's: medians of pairs that alternate, and the lowest and the highest pair."""
    stock = build(network, setting.layers)[0].to(batch[0].device)
    own = optimizer_of(stock)
    step = ratio(
        lambda: training_step(model, optimizer, batch), lambda: training_step(stock, own, batch), setting.pairs
    )
    passes = ratio(lambda: inference(model, batch), lambda: inference(stock, batch), setting.pairs)
    found = {"step": step, "inference": passes}
    return {
        f"{name}_over_vanilla{suffix}": value
        for name, times in found.items()
        for suffix, value in (("", times.median), ("_low", times.low), ("_high", times.high))
    }


def measure(
    network: str, method: str, energy: float | None, ranks: Ranks, setting: Setting, device: torch.device
) -> dict[str, Any]:
    """One row."""
    model, names = build(network, setting.layers)
    model = converted(model, names, method, energy, ranks).to(device)
    images, labels = (tensor.to(device) for tensor in batch_of(setting.batch, setting.size))
    batch, optimizer = (images, labels), optimizer_of(model)
    row: dict[str, Any] = {"network": network, "layers": setting.layers, "method": method, "energy": energy}
    row |= {"batch": setting.batch, "size": setting.size, "threads": torch.get_num_threads()}
    row |= {"device": device.type, "meter": meter_name(), "repeats": setting.repeats}
    row |= memory(model, names, batch, optimizer)
    if setting.repeats:
        works = {"step": partial(training_step, model, optimizer, batch), "inference": partial(inference, model, batch)}
        for name, work in works.items():
            times = seconds_and_joules(work, setting, device)
            row |= {f"{name}_{key}": value for key, value in times.items()}
    if setting.pairs and method != "vanilla":
        row |= over_vanilla(network, model, optimizer, batch, setting)
    return row


def run(
    networks: list[str],
    methods: list[str],
    energies: tuple[float, ...],
    setting: Setting,
    device: torch.device,
    table: Path,
) -> pd.DataFrame:
    """Measure everything; the table is written anew after each row."""
    rows: list[dict[str, Any]] = []
    for network in networks:
        model, names = build(network, setting.layers)
        needed = any(method.removesuffix(UNFUSED) in ("asi", "wasi") for method in methods)
        ranks = ranks_at(model.eval(), names, batch_of(setting.batch, setting.size), energies) if needed else {}
        for method in methods:
            if network == "mcunet" and method.startswith(("wsi", "wasi")):
                continue  # these hold weights of linear layers
            for energy in (None,) if method in WITHOUT_ENERGY else energies:
                own = {} if energy is None else ranks.get(energy, {})
                rows.append(measure(network, method, energy, own, setting, device))
                print(_line(rows[-1]), flush=True)
                table.parent.mkdir(parents=True, exist_ok=True)
                write_whole(table, pd.DataFrame(rows).to_csv(index=False))
    return pd.DataFrame(rows)


def _line(row: dict[str, Any]) -> str:
    energy = "" if row["energy"] is None else f" {row['energy']:g}"
    formula = (row["activation_formula"] + row["weight_formula"]) / 2**20
    kept = row["kept_measured"] / 2**20
    text = f"{row['network']} {row['method']}{energy}: formula {formula:.1f} MiB, kept {kept:.1f} MiB"
    if "step_s" in row:
        text += f", step {row['step_s']:.2f} s, inference {row['inference_s']:.2f} s"
    if "step_over_vanilla" in row:
        text += f", over vanilla {row['step_over_vanilla']:.2f} and {row['inference_over_vanilla']:.2f}"
    return text


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["vit_b_32", "mcunet"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["vanilla", "asi", "wasi"])
    parser.add_argument("--energies", nargs="+", type=float, default=list(ENERGIES), metavar="ENERGY")
    parser.add_argument("--layers", default="all", metavar="N", help="trailing layers that are trained, or 'all'")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--warmup", type=int, default=1, help="steps that are not timed")
    parser.add_argument("--repeats", type=int, default=5, help="steps that are timed; 0 measures memory alone")
    parser.add_argument("--pairs", type=int, default=0, help="pairs of steps that alternate with vanilla's")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: PyTorch's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("runs") / "on_device.csv")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    setting = Setting(options.batch, options.size, options.layers, options.warmup, options.repeats, options.pairs)
    device = torch.device(options.device)
    print(f"energy meter: {meter_name()}; threads: {torch.get_num_threads()}", flush=True)
    run(options.networks, options.methods, tuple(options.energies), setting, device, options.output)
    print(options.output)


if __name__ == "__main__":
    main()
