"""EfficientNet-Lite0 with ImageNet weights, its last convolutions trained on Fashion-MNIST: accuracy at equal memory.

    python -m benchmarks.fashion --root data --weights FILE [--help]

4,000 training images (400 a class), 10,000 test images, 96 pixels, batches of 64, 6 epochs, SGD with momentum 0.9,
frozen statistics. What is ahead of the trained layers is computed once per image. The budget of a low-rank method is a
part of what the inputs of the trained layers take. With frozen statistics the sum of the gradients of micro-batches is
vanilla's gradient. Each run's row is written as it ends, and what the table has is not run again.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

import lowrank
from benchmarks.plots import draw_depths
from benchmarks.rows import Rows, device_name, parser_of, spread, table
from benchmarks.tails import BATCH, PIECE, Batch, Data, batches, loss_of, network, parts_of
from classification.front import split
from lowrank import (
    ASI,
    MODE_ENERGIES,
    STORAGES,
    FixedBases,
    LayerPerplexity,
    Method,
    PerplexityTable,
    RankPlan,
    Rounded,
    Storage,
    Vanilla,
)
from lowrank.methods.deriving import Derive, measured_with
from lowrank.ranks.table import kept_bytes

NETWORK, CLASSIFIER, EPOCHS = "efficientnet_lite0", "classifier", 6
RATE, MOMENTUM, DECAY, CLIP = 0.05, 0.9, 1e-4, 2.0
KEY = ["layers", "method", "part", "seed"]


@dataclass(frozen=True)
class Kind:
    """A way to train in less memory.

    Attributes:
        storages: that ranks are chosen in, layer by layer; none for exact training.
        method: at such ranks.
        derive: whether inputs that follow from others are not kept, nor slopes, see `derive` of `lowrank.ASI`.
        rounds_classifier: whether the classifier's input is kept in eight bits.
        exact: whether nothing else is changed than what is kept beside the inputs, see `lowrank.Vanilla`.
        micro: samples of which the gradients are summed up; None: the whole batch at once.
    """

    storages: tuple[Storage, ...] = ()
    method: Callable[[RankPlan], Method] = ASI
    derive: Derive = False
    rounds_classifier: bool = False
    exact: bool = False
    micro: int | None = None


KINDS = {
    "vanilla": Kind(),
    "exact_layers": Kind(exact=True),
    "micro_batch_4": Kind(micro=4),
    "micro_batch_2": Kind(micro=2),
    "asi": Kind(("input",)),
    "asi_int8": Kind(("int8",)),
    "asi_int8_derived": Kind(("int8",), derive=True),
    "asi_int8_derived_20000": Kind(("int8",), derive=20000),
    "asi_int8_derived_20000_rounded": Kind(("int8",), derive=20000, rounds_classifier=True),
    "asi_int8_derived_slopes": Kind(("int8",), partial(ASI, derive="slopes"), "slopes"),
    "asi_int8_derived_rounded": Kind(("int8",), derive=True, rounds_classifier=True),
    "asi_int8_derived_slopes_rounded": Kind(("int8",), partial(ASI, derive="slopes"), "slopes", True),
    "asi_mixed": Kind(STORAGES),
    "asi_int8_micro_16": Kind(("int8",), micro=16),
    "fixed_bases": Kind(("input",), FixedBases),
    "fixed_bases_int8": Kind(("int8",), FixedBases),
}


@dataclass(frozen=True)
class Run:
    """One training run; `layers` is a number or "all", `part` what the memory of vanilla's inputs is divided by."""

    layers: str
    method: str
    part: int
    seed: int

    @property
    def kind(self) -> Kind:
        """What its method is."""
        return KINDS[self.method]


class Task:
    """A network whose tail is trained on the activations ahead of it.

    Attributes:
        model, names: the network, and its trained layers.
        tail: the part of the network that is trained, from the activations ahead of it.
        method: how their inputs are kept; None: as ever.
    """

    method: Method | None = None

    def __init__(self, run: Run, weights: str, sample: Tensor) -> None:
        self.model, self.names = network(NETWORK, weights, run.layers, run.seed)
        self.tail: Callable[..., Tensor] = split(self.model.to(sample.device), sample).tail

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy."""
        return loss_of(self.tail, batch)

    def input_bytes(self, batch: Batch) -> int:
        """Of the trained layers' inputs, as they are kept."""
        forward = lambda _, given: self.tail(*given[0])  # noqa: E731
        return lowrank.account(self.model, self.names, batch, forward).total.activation_bytes

    def at_once(self, run: Run, batch: Batch) -> list[Batch]:
        """The parts of a batch of which one at a time is kept."""
        return parts_of(batch, run.kind.micro or len(batch[1]))

    def measure(self, run: Run, batch: Batch) -> PerplexityTable:
        """Perplexity in the storages of the run's method."""
        given = (self.model, self.names, self.loss, self.at_once(run, batch)[0])
        options = {"storages": run.kind.storages, "derive": measured_with(run.kind.derive)}
        found = lowrank.measure_perplexity(*given, mode_energies=MODE_ENERGIES, **options)
        return whole_batch(found) if run.kind.method is FixedBases else found

    def convert(self, run: Run, batch: Batch) -> RankPlan | None:
        """Keep of the inputs what the run's method keeps; the plan of its ranks."""
        if run.kind.exact:
            lowrank.convert(self.model, self.names, Vanilla())
        if not run.kind.storages:
            return None
        budget = self.input_bytes(batch) / run.part
        options = {"storages": run.kind.storages, "derive": measured_with(run.kind.derive)}
        plan = lowrank.select_ranks(self.measure(run, batch), budget, **options)
        self.method = self.method_of(run, plan)
        methods: dict[str, Method] = dict.fromkeys(self.names, self.method)
        if run.kind.rounds_classifier:
            methods[CLASSIFIER] = Rounded()
        lowrank.convert(self.model, methods, everywhere=True)
        return plan

    def method_of(self, run: Run, plan: RankPlan) -> Method:
        """At these ranks."""
        return run.kind.method(plan)


def whole_batch(table: PerplexityTable) -> PerplexityTable:
    """The candidates with the batch mode left whole: their bytes; their perplexity is at most what was measured."""

    def bytes_of(row: LayerPerplexity, ranks: tuple[int, ...], storage: Storage) -> int:
        return kept_bytes(row.input_shape, (row.input_shape[0], *ranks[1:]), torch.float32, storage)

    def layer(row: LayerPerplexity) -> LayerPerplexity:
        nbytes, mixed = tuple(bytes_of(row, ranks, "input") for ranks in row.ranks), row.mixed
        if mixed is not None:
            pairs = zip(mixed.ranks, mixed.storages, strict=True)
            mixed = replace(mixed, nbytes=tuple(bytes_of(row, *pair) for pair in pairs))
        return replace(row, nbytes=nbytes, mixed=mixed)

    return replace(table, layers=tuple(map(layer, table.layers)))


class Way:
    """How the gradients of a step come about."""

    def backward(self, run: Run, task: Task, batch: Batch, at: tuple[int, int]) -> float:
        """Put them into the parameters' `.grad`, at an epoch and a step of it; returns the loss."""
        return backward_in(task, batch, task.at_once(run, batch))


def backward_in(task: Task, batch: Batch, parts: list[Batch]) -> float:
    """Sum up the gradients of a batch's parts; with frozen statistics they are those of the batch. The batch's loss."""
    total = 0.0
    for part in parts:
        loss = task.loss(task.model, part) * (len(part[1]) / len(batch[1]))
        loss.backward()
        total += float(loss.detach())
    return total


def train(
    run: Run, task: Task, learn: Batch, test: Batch, way: Way | None = None, epochs: int | None = None
) -> dict[str, object]:
    """One run: test accuracy in percent, mean loss of the last epoch, bytes, and the median processor time of a step.

    Formula bytes are of the trained layers' inputs; kept is all that is held for the backward pass at a time.

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
    steps = epochs * (len(learn[1]) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 0.1 * RATE)
    losses: list[float] = []
    seconds: list[float] = []
    for epoch in range(epochs):
        losses = []
        for step, batch in enumerate(batches(learn, 1000 * run.seed + epoch)):
            start = time.process_time()
            optimizer.zero_grad()
            losses.append(way.backward(run, task, batch, (epoch, step)))
            nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            schedule.step()
            seconds.append(time.process_time() - start)
    once = task.at_once(run, first)[0]
    return {
        **asdict(run),
        "test_accuracy": 100 * accuracy(task, test),
        "train_loss": sum(losses) / len(losses),
        "formula_bytes": task.input_bytes(once),
        "kept_bytes": lowrank.saved_bytes(task.model, task.loss, once),
        "step_seconds": statistics.median(seconds) if first[1].device.type == "cpu" else None,
        "perplexity": None if plan is None else plan.perplexity,
        "device": device_name(test[1].device),
    }


def accuracy(task: Task, test: Batch) -> float:
    """Share of the test images that are told right."""
    task.model.eval()
    with torch.no_grad():
        right = [(task.tail(*given).argmax(1) == labels).sum() for given, labels in parts_of(test, PIECE)]
    return int(sum(right)) / len(test[1])


def summary(rows: pd.DataFrame) -> str:
    """Per method and part: accuracy and its gap to vanilla, last training loss, bytes, time of a step.

    Closed: of what `asi` loses to vanilla at the same memory, the share that a method does not lose, in training loss.
    """
    vanilla = rows[rows.method == "vanilla"].set_index(["layers", "seed"])
    for column in ("test_accuracy", "train_loss", "step_seconds"):
        rows = rows.join(vanilla[column].rename(f"exact_{column}"), on=["layers", "seed"])
    heads = (
        "layers",
        "method",
        "memory",
        "seeds",
        "test accuracy",
        "gap",
        "training loss",
        "closed",
        "kept, MiB",
        "step",
    )
    lines = []
    for (layers, method, part), group in rows.groupby(["layers", "method", "part"], sort=False):
        base = rows[(rows.layers == layers) & (rows.method == "asi") & (rows.part == part)]
        base, same = base[base.seed.isin(group.seed)], group[group.seed.isin(base.seed)]
        lost, own = ((of.train_loss - of.exact_train_loss).mean() for of in (base, same))
        step = (group.step_seconds / group.exact_step_seconds).median()
        cells = (
            *(layers, method, "1" if part == 1 else f"1/{part}", len(group), spread(group.test_accuracy)),
            "-" if method == "vanilla" else spread(group.test_accuracy - group.exact_test_accuracy, "+"),
            f"{group.train_loss.mean():.3f}",
            "-" if base.empty else f"{1 - own / lost:.0%}",
            f"{group.kept_bytes.mean() / 2**20:.2f}",
            "-" if pd.isna(step) else f"{step:.2f}",
        )
        lines.append(cells)
    return (
        table(heads, lines)
        + f"""
`python -m benchmarks.fashion`: EfficientNet-Lite0 with ImageNet weights, its last convolutions trained on
4,000 images of Fashion-MNIST at 96 pixels, tested on 10,000. Memory: of the trained layers' inputs. Mean over the
seeds ± the standard error of the mean; the gap is to vanilla of the same seed. Closed: share of `asi`'s training loss
above vanilla's, at the same memory, that the method does not have. `micro_16`: gradients summed up over parts of 16
samples, so that each may keep four times as much. `derived`: inputs that follow from others are not kept, by up to 256
products for each number, or as many as are named; `slopes`: nor are bits of the activations ahead of these; `rounded`:
the classifier's input is kept in eight bits. `exact_layers`: inputs as they are, or what they are computed from, at
most bits for activations, nothing for normalisations. Step: processor time over vanilla's, of runs on CPUs with one
thread.
Trained on {", ".join(sorted(set(rows.device)))}.
"""
    )


def parts(kind: Kind, wanted: list[int]) -> list[int]:
    """At which parts of the memory a method is run: an exact one has its own."""
    return wanted if kind.storages else [BATCH // (kind.micro or BATCH)]


def main() -> None:
    """Train what the table lacks."""
    parser = parser_of("fashion", __doc__, "figures/fashion_mnist.csv", weights=NETWORK)
    parser.add_argument("--layers", nargs="+", default=["2", "4", "8"], help='numbers, or "all"')
    parser.add_argument("--methods", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[233, 1, 2])
    parser.add_argument("--parts", type=int, nargs="+", default=[20, 50], help="kept is a 20th, a 50th")
    options = parser.parse_args()
    rows = Rows(options.out, KEY, summary, text=["layers"])
    ways = [(name, part) for name in options.methods for part in parts(KINDS[name], options.parts)]
    runs = [Run(layers, *way, seed) for layers in options.layers for seed in options.seeds for way in ways]
    runs = [run for run in runs if not rows.has(*astuple(run))]
    data = Data(options.root, options.device) if runs else None
    for layers, group in itertools.groupby(runs, lambda run: run.layers):
        assert data is not None
        learn, test = data.ahead(NETWORK, options.weights, layers)
        for run in group:
            rows.add(train(run, Task(run, options.weights, data.sample), learn, test))
    draw_depths(rows.frame, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
