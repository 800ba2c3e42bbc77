"""How far low-rank weight gradients are from exact ones at the same bytes, and what a step takes: ASI in its storages.

    python -m benchmarks.gradient_error --root data --weights efficientnet_lite0=FILE [--help]

On Fashion-MNIST at 96 pixels, batches of 64, the last 8 convolutions. Networks without a weights file are trained here
first, on 4,000 images. ASI's budget is a part of what the inputs of the 8 layers take. Error: norm of the difference
over that of the exact gradient, mean over fresh batches behind a few to settle; per network the geometric mean over the
layers. Step: processor time over that of ordinary training of the same layers, median of alternating pairs.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank
from benchmarks.fashion import CLASSES, MOMENTUM, Part, balanced, batches, network, pictures
from benchmarks.pairs import ratio
from classification.backbones import build_model
from classification.data import load_splits
from experiment.files import write_whole
from lowrank import ASI, MODE_ENERGIES, RankPlan, Storage

NETWORKS = ("efficientnet_lite0", "resnet18", "mobilenet_v2")
LAYERS, PARTS, SETTLE, MEASURED, PAIRS = 8, (20, 50), 6, 4, 15
STORAGES: tuple[Storage, ...] = ("input", "bfloat16", "int8")
KEY = ["network", "part", "method", "layer"]


def loss_of(model: nn.Module, batch: Part) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def pretrained(name: str, images: Part, folder: Path) -> str:
    """A weights file of a network that was trained on these images; made if it is not there."""
    path = folder / f"{name}.pt"
    if path.exists():
        return str(path)
    torch.manual_seed(233)
    model = build_model(name, CLASSES).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, MOMENTUM, weight_decay=1e-4)
    for epoch in range(3):
        for batch in batches(images, epoch):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return str(path)


def gradients(model: nn.Module, names: list[str], batch: Part) -> dict[str, Tensor]:
    """Weight gradients of layers."""
    model.zero_grad()
    loss_of(model, batch).backward()
    found = {name: model.get_submodule(name).weight.grad for name in names}
    return {name: grad.clone() for name, grad in found.items() if isinstance(grad, Tensor)}


def errors(model: nn.Module, names: list[str], plan: RankPlan, images: Part) -> dict[str, float]:
    """Mean relative error of each layer's gradient on fresh batches, once the bases have settled."""
    low = lowrank.convert(copy.deepcopy(model), names, ASI(plan))
    total = dict.fromkeys(names, 0.0)
    for number, batch in zip(range(SETTLE + MEASURED), shuffled(images), strict=False):
        found, exact = gradients(low, names, batch), gradients(model, names, batch) if number >= SETTLE else {}
        for name, grad in exact.items():
            total[name] += float((found[name] - grad).norm() / grad.norm()) / MEASURED
    return total


def shuffled(images: Part) -> Iterator[Part]:
    """Fresh batches without end."""
    epoch = 0
    while True:
        yield from batches(images, epoch)
        epoch += 1


def step_ratio(model: nn.Module, names: list[str], plan: RankPlan, images: Part) -> float:
    """Processor time of a step over that of ordinary training."""
    low, source = lowrank.convert(copy.deepcopy(model), names, ASI(plan)), shuffled(images)

    def step(network: nn.Module) -> Callable[[], float]:
        def run() -> float:
            batch = next(source)
            start = time.process_time()
            network.zero_grad()
            loss_of(network, batch).backward()
            return time.process_time() - start

        return run

    return ratio(step(low), step(model), PAIRS).median


def measure(name: str, weights: str, images: Part) -> Iterator[dict[str, object]]:
    """A row for each part, storage and layer of a network."""
    model, names = network(name, weights, LAYERS, 233)
    first = next(batches(images, 99))
    # A new classifier's gradients say little of what a network is trained with.
    head = [p for key, p in model.named_parameters() if key.rpartition(".")[0] == list(dict(model.named_modules()))[-1]]
    settle_head(model, head, images)
    whole = lowrank.account(model, names, first).total.activation_bytes
    table = lowrank.measure_perplexity(model, names, loss_of, first, mode_energies=MODE_ENERGIES, storages=STORAGES)
    for part in PARTS:
        for storage in STORAGES:
            plan = lowrank.select_ranks(table, whole / part, storages=(storage,))
            found, took = errors(model, names, plan, images), step_ratio(model, names, plan, images)
            for layer, error in found.items():
                ranks = "x".join(map(str, plan.ranks[layer]))
                yield {
                    **{"network": name, "part": part, "method": ASI(plan).tag, "layer": layer, "ranks": ranks},
                    **{"error": error, "plan_bytes": plan.nbytes, "input_bytes": whole, "step": took},
                }


def settle_head(model: nn.Module, head: list[nn.Parameter], images: Part) -> None:
    """Train the classifier alone for an epoch."""
    optimizer = torch.optim.SGD(head, 0.05, MOMENTUM)
    for batch in batches(images, 7):
        model.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    model.zero_grad()


def geometric(values: pd.Series) -> float:
    """Geometric mean."""
    return math.exp(np.log(values).mean())


def summary(rows: pd.DataFrame) -> str:
    """Per network, part and method the geometric mean of the error over the layers, and the step."""
    heads = ("network", "memory", "method", "relative gradient error", "of float32's", "worst layer", "step")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (name, part), group in rows.groupby(["network", "part"], sort=False):
        base = geometric(group[group.method == "asi"].error)
        for method, own in group.groupby("method", sort=False):
            error = geometric(own.error)
            cells = (name, f"1/{part}", method, f"{error:.3f}", f"{error / base:.2f}", f"{own.error.max():.3f}")
            lines.append(f"| {' | '.join(cells)} | {own.step.iloc[0]:.2f} |")
    for part, group in rows.groupby("part", sort=False):
        means = {method: geometric(own.error) for method, own in group.groupby("method", sort=False)}
        for method, error in means.items():
            lines.append(f"| all | 1/{part} | {method} | {error:.3f} | {error / means['asi']:.2f} | | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what the table lacks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradient_error", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder that holds all data sets")
    parser.add_argument("--weights", nargs="*", default=[], metavar="NETWORK=FILE", help="weights files")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument(
        "--trained", type=Path, default=Path("runs/gradient_error"), help="where weights trained here go"
    )
    parser.add_argument("--out", type=Path, default=Path("figures/gradient_error.csv"))
    options = parser.parse_args()
    given = dict(word.split("=", 1) for word in options.weights)
    train = load_splits("fashion_mnist", options.root).train
    train = train.pick(balanced(train.labels))
    images = (pictures(np.asarray(train.images)).contiguous(), torch.from_numpy(train.labels))
    rows = pd.read_csv(options.out) if options.out.exists() else pd.DataFrame(columns=KEY)
    for name in options.networks:
        if name in set(rows.network):
            continue
        weights = given.get(name) or pretrained(name, images, options.trained)
        rows = pd.DataFrame([*rows.to_dict("records"), *measure(name, weights, images)])
        write_whole(options.out, rows.to_csv(index=False))
        write_whole(options.out.with_suffix(".md"), summary(rows))
        print(summary(rows), flush=True)


if __name__ == "__main__":
    main()
