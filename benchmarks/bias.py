"""Ways to lose less by truncated gradients in long training, at the same bytes: what was tried for ASI, and what it is.

    python -m benchmarks.bias --root data --weights FILE [--help]

Training runs as of `benchmarks.fashion`, but on 1,000 images for four times the epochs, with float32 factors at a
twentieth, where the loss is large enough to be told from noise, each with one thing changed.
docs/negative-results.md says what came of them.
"""

from __future__ import annotations

from dataclasses import astuple, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import lowrank
from benchmarks.fashion import KEY, Part, Run, Task, Way, activations, pictures, train
from benchmarks.rows import Rows, parser_of
from classification.data import load_splits
from lowrank import ASI, LayerPerplexity, PerplexityTable, RankPlan
from lowrank.tensors.geometry import Geometry

EXACT_EVERY, MICRO = 4, 16
PER_CLASS, TESTED, EPOCHS = 100, 1000, 24
Tensors = tuple[Tensor | None, ...]


class Squared(Task):
    """The sum of squared perplexities is the least, not that of perplexities."""

    def measure(self, run: Run, batch: Part) -> PerplexityTable:
        table = super().measure(run, batch)
        return replace(table, layers=tuple(map(_squared, table.layers)))


def _squared(row: LayerPerplexity) -> LayerPerplexity:
    mixed = row.mixed and replace(row.mixed, perplexity=tuple(value**2 for value in row.mixed.perplexity))
    return replace(row, perplexity=tuple(value**2 for value in row.perplexity), mixed=mixed)


class Compensated(ASI):
    """The kept form is stretched to the norm of the input: what was cut is taken to be like what is kept."""

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        kept, state = super().compress(x, geometry, state, name)
        core = kept[0]
        assert core is not None
        stretch = torch.linalg.vector_norm(x) / torch.linalg.vector_norm(core).clamp_min(1e-30)
        return (core * stretch, *kept[1:]), state


class Stretched(Task):
    """With `Compensated` in place of ASI."""

    def method_of(self, plan: RankPlan) -> ASI:
        return Compensated(plan)


class Again(Way):
    """Perplexity is measured, and ranks are chosen, at the start of every epoch; bases start afresh."""

    def backward(self, run: Run, task: Task, batch: Part, at: tuple[int, int]) -> float:
        epoch, step = at
        if epoch > 0 and step == 0:
            lowrank.revert(task.model)
            task.convert(run, batch)
        return super().backward(run, task, batch, at)


class ExactAtTimes(Way):
    """Every fourth step is exact, by micro-batches: with frozen statistics their sum is the batch's gradient."""

    def backward(self, run: Run, task: Task, batch: Part, at: tuple[int, int]) -> float:
        if at[1] % EXACT_EVERY or task.method is None:
            return super().backward(run, task, batch, at)
        bases = lowrank.training_state(task.model)
        lowrank.revert(task.model)
        total = 0.0
        for x, y in zip(batch[0].split(MICRO), batch[1].split(MICRO), strict=True):
            loss = task.loss(task.model, (x, y)) * (len(x) / len(batch[0]))
            loss.backward()
            total += float(loss)
        lowrank.convert(task.model, task.names, task.method)
        lowrank.load_training_state(task.model, bases)
        return total


TRIALS: dict[str, tuple[type[Task], type[Way]]] = {
    "as it is": (Task, Way),
    "ranks chosen again every epoch": (Task, Again),
    "every 4th step exact": (Task, ExactAtTimes),
    "squared perplexity": (Squared, Way),
    "norm compensated": (Stretched, Way),
}


def summary(rows: pd.DataFrame) -> str:
    """Per trial its accuracy and last training loss over the seeds, and the differences to vanilla's."""
    heads = ("method", "trial", "seeds", "test accuracy", "gap", "last training loss", "above vanilla's")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    vanilla = rows[rows.method == "vanilla"].set_index("seed")
    for (method, trial), group in rows.groupby(["method", "trial"], sort=False):
        accuracy, loss = (group.set_index("seed")[column] for column in ("test_accuracy", "train_loss"))
        cells = (
            *(method, trial, ", ".join(map(str, group.seed)), ", ".join(f"{value:.2f}" for value in accuracy)),
            f"{(accuracy - vanilla.test_accuracy).mean():+.2f}",
            *(f"{loss.mean():.3f}", f"{(loss - vanilla.train_loss).mean():+.3f}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "`python -m benchmarks.bias`: EfficientNet-Lite0, the last 4 layers trained on 1,000 images of Fashion-MNIST",
        "for 24 epochs, tested on 1,000; `asi` with float32 factors at a twentieth.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what the table lacks."""
    parser = parser_of("bias", __doc__, "figures/bias.csv")
    parser.add_argument("--weights", required=True, help="ImageNet weights of efficientnet_lite0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[233, 1, 2])
    options = parser.parse_args()
    rows = Rows(options.out, ["trial", *KEY], summary)
    trials = [("vanilla", 1, "as it is"), *[("asi", 20, trial) for trial in TRIALS]]
    wanted = [(Run(4, name, part, seed), trial) for seed in options.seeds for name, part, trial in trials]
    wanted = [(run, trial) for run, trial in wanted if not rows.has(trial, *astuple(run))]
    if not wanted:
        return
    learn, test = activations(options.weights, 4, options.root, PER_CLASS, TESTED)
    sample = pictures(np.asarray(load_splits("fashion_mnist", options.root).test.images)[:4])
    for run, trial in wanted:
        task, way = TRIALS[trial]
        rows.add({"trial": trial, **train(run, task(run, options.weights, sample), learn, test, way(), EPOCHS)})


if __name__ == "__main__":
    main()
