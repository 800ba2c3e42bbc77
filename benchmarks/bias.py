"""Ways to lose less by truncated gradients, at the same bytes: what was tried for ASI, and what it is.

    python -m benchmarks.bias --root data --weights FILE [--help]

Training runs as of `benchmarks.fashion`, each with one thing changed; by default on 1,000 images for four times the
epochs, with float32 factors at a twentieth, where the loss is large enough to be told from noise.
docs/negative-results.md says what came of them.
"""

from __future__ import annotations

from dataclasses import astuple, replace
from itertools import product

import pandas as pd
import torch
from torch import Tensor

import lowrank
from benchmarks.fashion import KEY, KINDS, NETWORK, Run, Task, Way, backward_in, train
from benchmarks.rows import Rows, parser_of, spread, table
from benchmarks.tails import CLASSES, Batch, Data, parts_of
from lowrank import ASI, LayerPerplexity, Method, PerplexityTable, RankPlan
from lowrank.methods.base import Tensors
from lowrank.tensors.geometry import Geometry
from lowrank.tensors.storage import restore

EXACT_EVERY, MICRO = 4, 16


class Squared(Task):
    """The sum of squared perplexities is the least, not that of perplexities."""

    def measure(self, run: Run, batch: Batch) -> PerplexityTable:
        table = super().measure(run, batch)
        return replace(table, layers=tuple(map(_squared, table.layers)))


def _squared(row: LayerPerplexity) -> LayerPerplexity:
    mixed = row.mixed and replace(row.mixed, perplexity=tuple(value**2 for value in row.mixed.perplexity))
    return replace(row, perplexity=tuple(value**2 for value in row.perplexity), mixed=mixed)


class Compensated(ASI):
    """The kept form is stretched to the norm of the input: what was cut is taken to be like what is kept."""

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        kept, state = super().compress(x, geometry, state, name)
        core = torch.linalg.vector_norm(restore(kept, x.dtype).core)
        stretch = torch.linalg.vector_norm(x) / core.clamp_min(1e-30)
        scaled = 0 if self.storage != "int8" else x.ndim + 1  # the core, or its scales
        return tuple(
            each * stretch if at == scaled and each is not None else each for at, each in enumerate(kept)
        ), state


class Stretched(Task):
    """With `Compensated` in place of ASI."""

    def method_of(self, run: Run, plan: RankPlan) -> Method:
        return Compensated(plan)


class Twice(ASI):
    """Two iterations a step in place of one."""

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        return super().compress(x, geometry, super().compress(x, geometry, state, name)[1], name)


class Iterated(Task):
    """With `Twice` in place of ASI."""

    def method_of(self, run: Run, plan: RankPlan) -> Method:
        return Twice(plan)


class Again(Way):
    """Perplexity is measured, and ranks are chosen, at the start of every epoch; bases start afresh."""

    def backward(self, run: Run, task: Task, batch: Batch, at: tuple[int, int]) -> float:
        epoch, step = at
        if epoch > 0 and step == 0:
            lowrank.revert(task.model)
            task.convert(run, batch)
        return super().backward(run, task, batch, at)


class ExactAtTimes(Way):
    """Every fourth step is exact, by micro-batches: with frozen statistics their sum is the batch's gradient."""

    def backward(self, run: Run, task: Task, batch: Batch, at: tuple[int, int]) -> float:
        if at[1] % EXACT_EVERY or task.method is None:
            return super().backward(run, task, batch, at)
        bases = lowrank.training_state(task.model)
        lowrank.revert(task.model)
        total = backward_in(task, batch, parts_of(batch, MICRO))
        lowrank.convert(task.model, task.names, task.method, everywhere=True)
        lowrank.load_training_state(task.model, bases)
        return total


TRIALS: dict[str, tuple[type[Task], type[Way]]] = {
    "as it is": (Task, Way),
    "ranks chosen again every epoch": (Task, Again),
    "every 4th step exact": (Task, ExactAtTimes),
    "squared perplexity": (Squared, Way),
    "norm compensated": (Stretched, Way),
    "two iterations a step": (Iterated, Way),
}


def summary(rows: pd.DataFrame) -> str:
    """Per trial its accuracy and last training loss over the seeds, and the differences to vanilla's."""
    heads = (
        "images",
        "epochs",
        "layers",
        "method",
        "memory",
        "trial",
        "seeds",
        "test accuracy",
        "gap",
        "training loss",
    )
    lines, same = [], ["images", "epochs", "layers", "seed"]
    vanilla = rows[rows.method == "vanilla"].set_index(same)
    for column in ("test_accuracy", "train_loss"):
        rows = rows.join(vanilla[column].rename(f"exact_{column}"), on=same)
    for key, group in rows.groupby(["images", "epochs", "layers", "method", "part", "trial"], sort=False):
        gap, above = (group[column] - group[f"exact_{column}"] for column in ("test_accuracy", "train_loss"))
        exact = key[3] == "vanilla"
        named = (*key[:4], "1" if exact else f"1/{key[4]}", key[5], len(group), spread(group.test_accuracy))
        found = ("-" if exact else spread(gap, "+"), f"{group.train_loss.mean():.4f}")
        lines.append((*named, *found, "-" if exact else f"{above.mean():+.4f}"))
    return (
        table((*heads, "above vanilla's"), lines)
        + f"""
`python -m benchmarks.bias`: EfficientNet-Lite0, its last layers trained on images of Fashion-MNIST, tested on others.
Means over the seeds ± the standard error of the mean. Trained on {", ".join(sorted(set(rows.device)))}.
"""
    )


def main() -> None:
    """Train what the table lacks."""
    parser = parser_of("bias", __doc__, "figures/bias.csv", weights=NETWORK)
    parser.add_argument("--layers", default="4", help='a number, or "all"')
    parser.add_argument("--method", default="asi", choices=[name for name, kind in KINDS.items() if kind.storages])
    parser.add_argument("--part", type=int, default=20, help="of the memory is kept: a 20th")
    parser.add_argument("--seeds", type=int, nargs="+", default=[233, 1, 2])
    parser.add_argument("--per-class", type=int, default=100, help="images of each class to train on")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--tested", type=int, default=10000, help="how many images to test on")
    options = parser.parse_args()
    given = {"images": CLASSES * options.per_class, "epochs": options.epochs}
    rows = Rows(options.out, ["trial", *given, *KEY], summary, text=["layers"])
    trials = [("vanilla", 1, "as it is"), *[(options.method, options.part, trial) for trial in TRIALS]]
    wanted = [(Run(options.layers, *way, seed), trial) for seed, (*way, trial) in product(options.seeds, trials)]
    wanted = [(run, trial) for run, trial in wanted if not rows.has(trial, *given.values(), *astuple(run))]
    if not wanted:
        return
    data = Data(options.root, options.device, options.per_class, options.tested)
    learn, test = data.ahead(NETWORK, options.weights, options.layers)
    for run, trial in wanted:
        task, way = TRIALS[trial]
        found = train(run, task(run, options.weights, data.sample), learn, test, way(), options.epochs)
        rows.add({"trial": trial, **given, **found})


if __name__ == "__main__":
    main()
