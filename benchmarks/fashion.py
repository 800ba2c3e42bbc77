"""EfficientNet-Lite0 with ImageNet weights, its last convolutions trained on Fashion-MNIST: accuracy at equal memory.

    python -m benchmarks.fashion --root data --weights FILE [--help]

4,000 training images (400 a class), 10,000 test images, 96 pixels, batches of 64, 6 epochs, SGD with momentum 0.9,
frozen statistics. What is ahead of the trained layers is computed once per image. ASI's budget is a part of what the
inputs of the trained layers take. Each run's row is written as it ends, and what the table has is not run again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank
from benchmarks.rows import Rows, parser_of
from classification.backbones import build_model
from classification.data import load_splits
from classification.front import split
from lowrank import ASI, MODE_ENERGIES, STORAGES, PerplexityTable, RankPlan, Storage

CLASSES, PER_CLASS, SIZE, BATCH, EPOCHS = 10, 400, 96, 64, 6
RATE, MOMENTUM, DECAY, CLIP = 0.05, 0.9, 1e-4, 2.0
NETWORK = "efficientnet_lite0"
KEY = ["layers", "method", "part", "seed"]
STORED: dict[str, tuple[Storage, ...]] = {"asi": ("input",), "asi_int8": ("int8",), "asi_mixed": STORAGES}
Part = tuple[Tensor, Tensor]  # activations (N, C, H, W), labels (N,)


@dataclass(frozen=True)
class Run:
    """One training run; `part` is what the memory of vanilla's inputs is divided by."""

    layers: int
    method: str
    part: int
    seed: int

    @property
    def storages(self) -> tuple[Storage, ...]:
        """That the method chooses from, layer by layer."""
        return STORED[self.method]


def pictures(images: np.ndarray, size: int = SIZE) -> Tensor:
    """Images (N, 28, 28), uint8, as the network takes them: (N, 3, size, size) in [-1, 1]."""
    gray = torch.from_numpy(images.astype(np.float32)).div_(127.5).sub_(1)[:, None]
    return F.interpolate(gray, size=(size, size), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)


def network(name: str, weights: str, layers: int, seed: int) -> tuple[nn.Module, list[str]]:
    """A network, and the names of its trained layers; all ahead of them is frozen.

    The classifier is new where that of the weights has other classes.
    """
    torch.manual_seed(seed)
    model = build_model(name, CLASSES, weights=weights)
    names = lowrank.trailing_layers(model, layers)
    lowrank.freeze_before(model, names)
    for layer in model.train().modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    return model, names


def balanced(labels: np.ndarray, count: int | None = None) -> np.ndarray:
    """Places of the images to train on: `count` of each class (`PER_CLASS` by default), drawn once and for all."""
    draw, count = np.random.default_rng(233), count or PER_CLASS
    places = [draw.permutation(np.flatnonzero(labels == label))[:count] for label in range(CLASSES)]
    return np.sort(np.concatenate(places))


def activations(
    weights: str, layers: int, root: Path, per_class: int | None = None, tested: int | None = None
) -> tuple[Part, Part]:
    """What reaches the first trained layer's block, of the images to train on and of the first ones to test on."""
    splits = load_splits("fashion_mnist", root)
    model, _ = network(NETWORK, weights, layers, 0)
    found = []
    test = splits.test.pick(np.arange(len(splits.test.labels))[:tested])
    for part in (splits.train.pick(balanced(splits.train.labels, per_class)), test):
        images = np.asarray(part.images)
        front = split(model, pictures(images[:4])).front
        with torch.no_grad():
            pieces = [front(pictures(images[at : at + 250])) for at in range(0, len(images), 250)]
        assert all(len(piece) == 1 for piece in pieces)
        found.append((torch.cat([piece[0] for piece in pieces]), torch.from_numpy(part.labels)))
    return found[0], found[1]


class Task:
    """A network whose tail is trained on the activations ahead of it.

    Attributes:
        model, names: the network, and its trained layers.
        method: how their inputs are kept; None: as ever.
    """

    method: ASI | None = None

    def __init__(self, run: Run, weights: str, sample: Tensor) -> None:
        self.model, self.names = network(NETWORK, weights, run.layers, run.seed)
        self.tail = split(self.model, sample).tail

    def loss(self, model: nn.Module, batch: Part) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self.tail(batch[0]), batch[1])

    def input_bytes(self, batch: Part) -> int:
        """Of the trained layers' inputs, as they are kept."""
        forward = lambda _, given: self.tail(given[0])  # noqa: E731
        return lowrank.account(self.model, self.names, batch, forward).total.activation_bytes

    def measure(self, run: Run, batch: Part) -> PerplexityTable:
        """Perplexity in the storages of the run's method."""
        options = (self.names, self.loss, batch)
        return lowrank.measure_perplexity(self.model, *options, mode_energies=MODE_ENERGIES, storages=run.storages)

    def convert(self, run: Run, batch: Part) -> RankPlan | None:
        """Keep of the inputs what the run's method keeps; the plan of its ranks."""
        if run.method == "vanilla":
            return None
        budget = self.input_bytes(batch) / run.part
        plan = lowrank.select_ranks(self.measure(run, batch), budget, storages=run.storages)
        self.method = self.method_of(plan)
        lowrank.convert(self.model, self.names, self.method)
        return plan

    def method_of(self, plan: RankPlan) -> ASI:
        """At these ranks."""
        return ASI(plan)


class Way:
    """How the gradients of a step come about."""

    def backward(self, run: Run, task: Task, batch: Part, at: tuple[int, int]) -> float:
        """Put them into the parameters' `.grad`, at an epoch and a step of it; returns the loss."""
        loss = task.loss(task.model, batch)
        loss.backward()
        return float(loss)


def batches(part: Part, seed: int) -> Iterator[Part]:
    """The images of an epoch in a random order, without an odd last batch."""
    order = torch.randperm(len(part[0]), generator=torch.Generator().manual_seed(seed))
    for at in range(0, len(order) - BATCH + 1, BATCH):
        places = order[at : at + BATCH]
        yield part[0][places], part[1][places]


def train(
    run: Run, task: Task, learn: Part, test: Part, way: Way | None = None, epochs: int | None = None
) -> dict[str, object]:
    """One run: test accuracy in percent, mean loss of the last epoch, and bytes kept of the trained layers' inputs.

    Args:
        run: what is trained.
        task: made for it.
        learn, test: activations ahead of the trained layers, and labels.
        way: how gradients come about; by default by one backward pass.
        epochs: `EPOCHS` by default.
    """
    way, epochs = way or Way(), epochs or EPOCHS
    first = next(batches(learn, run.seed))
    plan = task.convert(run, first)
    trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, RATE, MOMENTUM, weight_decay=DECAY)
    steps = epochs * (len(learn[0]) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 0.1 * RATE)
    losses: list[float] = []
    for epoch in range(epochs):
        losses = []
        for step, batch in enumerate(batches(learn, 1000 * run.seed + epoch)):
            optimizer.zero_grad()
            losses.append(way.backward(run, task, batch, (epoch, step)))
            nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            schedule.step()
    return {
        "layers": run.layers,
        "method": run.method,
        "part": run.part,
        "seed": run.seed,
        "test_accuracy": 100 * accuracy(task, test),
        "train_loss": sum(losses) / len(losses),
        "formula_bytes": task.input_bytes(first),
        "kept_bytes": lowrank.saved_bytes(task.model, task.loss, first),
        "perplexity": None if plan is None else plan.perplexity,
    }


def accuracy(task: Task, test: Part) -> float:
    """Share of the test images that are told right."""
    task.model.eval()
    with torch.no_grad():
        right = [
            (task.tail(x).argmax(1) == y).sum() for x, y in zip(test[0].split(500), test[1].split(500), strict=True)
        ]
    return int(sum(right)) / len(test[1])


def summary(rows: pd.DataFrame) -> str:
    """Per method and part: accuracy and its gap to vanilla, seed by seed, last training loss, bytes.

    Closed: of what `asi` loses to vanilla at the same memory, the share that a method does not lose, in training loss.
    """
    vanilla = rows[rows.method == "vanilla"].set_index(["layers", "seed"])
    for column in ("test_accuracy", "train_loss"):
        rows = rows.join(vanilla[column].rename(f"exact_{column}"), on=["layers", "seed"])
    heads = ("layers", "method", "memory", "seeds", "test accuracy", "gap", "last training loss", "closed", "kept, MiB")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (layers, method, part), group in rows.groupby(["layers", "method", "part"], sort=False):
        base = rows[(rows.layers == layers) & (rows.method == "asi") & (rows.part == part)]
        base = base[base.seed.isin(group.seed)]
        lost, own = ((of.train_loss - of.exact_train_loss).mean() for of in (base, group))
        cells = (
            *(str(layers), method, "1" if method == "vanilla" else f"1/{part}", ", ".join(map(str, group.seed))),
            ", ".join(f"{value:.2f}" for value in group.test_accuracy),
            f"{(group.test_accuracy - group.exact_test_accuracy).mean():+.2f}",
            f"{group.train_loss.mean():.3f}",
            "-" if method == "vanilla" or len(base) < len(group) else f"{1 - own / lost:.0%}",
            f"{group.kept_bytes.mean() / 2**20:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "`python -m benchmarks.fashion`: EfficientNet-Lite0 with ImageNet weights, its last convolutions trained on",
        "4,000 images of Fashion-MNIST at 96 pixels, tested on 10,000. Memory: of the trained layers' inputs.",
        "Closed: share of `asi`'s training loss above vanilla's, at the same memory, that the method does not have.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what the table lacks."""
    parser = parser_of("fashion", __doc__, "figures/fashion_mnist.csv")
    parser.add_argument("--weights", required=True, help="ImageNet weights of efficientnet_lite0")
    parser.add_argument("--layers", type=int, nargs="+", default=[4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[233, 1, 2])
    parser.add_argument("--parts", type=int, nargs="+", default=[20, 50], help="ASI keeps a 20th, a 50th")
    options = parser.parse_args()
    rows = Rows(options.out, KEY, summary)
    sample = pictures(np.asarray(load_splits("fashion_mnist", options.root).test.images)[:4])
    ways = [("vanilla", 1), *[(name, part) for part in options.parts for name in STORED]]
    for layers in options.layers:
        runs = [Run(layers, *way, seed) for seed in options.seeds for way in ways]
        runs = [run for run in runs if not rows.has(*astuple(run))]
        if not runs:
            continue
        learn, test = activations(options.weights, layers, options.root)
        for run in runs:
            rows.add(train(run, Task(run, options.weights, sample), learn, test))


if __name__ == "__main__":
    main()
