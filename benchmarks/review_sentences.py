"""MiniLM fine-tuned on sentences of film reviews, positive against negative: low-rank training of pretrained weights.

    python -m benchmarks.review_sentences --root data --weights FOLDER [--help]

3,200 sentences of at most 40 tokens in batches of 32, AdamW (weight decay 0.01), a tenth of the steps to warm up and
then a cosine, gradients clipped at 1; 2,014 sentences test. Trained are the last linear layers, the classifier
counted in, with the normalisations among and behind them; the embeddings are frozen at every depth. ASI's and WASI's
ranks are those of the least perplexity on one batch at a twentieth of what the inputs of the trained layers take.
WASI truncates the weights of all trained layers, or with `_mlp` those of the MLPs alone, as its paper does; ASI keeps
the inputs of the others then, at ranks of the same budget. The learning rate, 2e-4 for all but LoRA (1e-3), is the
best of WASI on 800 validation sentences, and within two of them the best of vanilla (`--methods vanilla --rates 1e-4
2e-4 4e-4`); of weights truncated ahead 1e-4 is (`--methods wasi_0.9_int8_weighed --rates 1e-4`), and of both after two
epochs. Each run's row is written as it ends, and what the table has is not run again.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowrank
from benchmarks.networks import Batch, loss_of
from benchmarks.pairs import ratio
from benchmarks.peers import lora
from benchmarks.rows import Rows, device_name, parser_of, spread, table
from classification.backbones import build_model
from classification.data import load_splits
from classification.data.limit import limited
from classification.data.module import TokenSet
from lowrank import ASI, MODE_ENERGIES, WASI, WSI, Method, RankPlan, Storage, Vanilla

NETWORK, DATASET = "minilm", "review_sentences"
TRAIN, LENGTH, BATCH, PART = 3200, 40, 32, 20
RATE, DECAY, WARM_UP, CLIP = 2e-4, 0.01, 0.1, 1.0
CALIBRATED, TOKENS = 256, 24  # sentences without padding, on which weights are truncated by their inputs
WEIGHED = 1024  # sentences on which they are truncated by inputs and gradients
PAIRS = 3  # of steps whose times are compared
CUTS = ("whitened", "weighed")
KEY = ["layers", "method", "epochs", "rate", "seed"]
# What the trained layers' inputs are kept in, and the method at ranks chosen for that.
RANKED: dict[str, tuple[Storage, Callable[[RankPlan], Method]]] = {
    "asi": ("input", lambda plan: ASI(plan)),
    "asi_int8": ("int8", lambda plan: ASI(plan)),
    "wasi_0.8": ("input", lambda plan: WASI(plan, energy=0.8)),
    "wasi_0.9": ("input", lambda plan: WASI(plan, energy=0.9)),
    "wasi_0.9_int8": ("int8", lambda plan: WASI(plan, energy=0.9)),
    "wasi_0.9_int8_mlp": ("int8", lambda plan: WASI(plan, energy=0.9)),
}
PLAIN: dict[str, Method] = {"vanilla_fused": Vanilla(), "wsi_0.8": WSI(0.8), "wsi_0.9": WSI(0.9)}
# Weights truncated ahead, to the ranks of energy 0.9, where that changes the layers' outputs least, or what comes of
# these: whether a change of an output counts by its gradient.
CUT_AHEAD = ("wsi_0.9", "wasi_0.9_int8", "wasi_0.9_int8_mlp")
TRUNCATED = {f"{method}_{cut}": cut == "weighed" for method in CUT_AHEAD for cut in CUTS}
RANKED |= {f"{method}_{cut}": ("int8", lambda plan: WASI(plan, energy=1)) for method in CUT_AHEAD[1:] for cut in CUTS}
PLAIN |= {f"wsi_0.9_{cut}": WSI(1) for cut in CUTS}
METHODS = ("vanilla", *PLAIN, *RANKED, "lora_8")
# Only the linear layers of the MLPs lose weights, as in WASI's paper; of the others ASI keeps the inputs.
MLP_ALONE = {method for method in METHODS if "_mlp" in method}


@dataclass(frozen=True)
class Run:
    """One training run of the last so many linear layers."""

    layers: str
    method: str
    epochs: int
    rate: float
    seed: int


@dataclass(frozen=True)
class Texts:
    """Token numbers (N, LENGTH) and labels (N,) of each part of the data set."""

    train: Batch
    val: Batch
    test: Batch


def texts(root: Path, tokenizer: str, device: str = "cpu") -> Texts:
    """The data set as tokens, on a device."""
    splits = limited(load_splits(DATASET, root), TRAIN, 233)
    sets = {part: TokenSet(getattr(splits, part), tokenizer, LENGTH) for part in ("train", "val", "test")}
    return Texts(
        **{
            part: (found.tokens.to(device), torch.from_numpy(found.part.labels).to(device))
            for part, found in sets.items()
        }
    )


def network(weights: str, layers: str, seed: int) -> tuple[nn.Module, list[str]]:
    """The network with a new classifier, and the names of its trained layers; all ahead of them is frozen."""
    torch.manual_seed(seed)
    model = build_model(NETWORK, 2, weights=weights).train()
    names = lowrank.trailing_layers(model, "all" if layers == "all" else int(layers), "linear")
    lowrank.freeze_before(model, names)
    return model, names


def truncated_layers(run: Run, model: nn.Module, names: list[str]) -> list[str]:
    """Those of the trained layers whose weights the run's method truncates, where it truncates any."""
    if run.method not in MLP_ALONE:
        return names
    return [name for name in lowrank.trailing_layers(model, "all", "linear", "mlp") if name in names]


class Plans:
    """Ranks by depth and storage, and truncated weights by depth; all are found once.

    Attributes:
        device: where networks are trained.
    """

    def __init__(self, weights: str, train: Batch) -> None:
        self.weights, self.sentences, self.batch = weights, train[0], next(batches(train, 0))
        self.device = self.batch[1].device
        self.plan = functools.cache(self._plan)
        self.truncated = functools.cache(self._truncated)

    def _plan(self, layers: str, storage: Storage) -> RankPlan:
        model, names = network(self.weights, layers, 0)
        model.to(self.device)
        whole = lowrank.account(model, names, self.batch[0]).total.activation_bytes
        options = {"mode_energies": MODE_ENERGIES, "storages": (storage,)}
        table = lowrank.measure_perplexity(model, names, loss_of, self.batch, **options)
        return lowrank.select_ranks(table, whole / PART, storages=(storage,))

    def _truncated(self, layers: str, weigh: bool) -> dict[str, Tensor]:
        """Weights by name, of all layers but the classifier, whose rank is the number of classes."""
        model, names = network(self.weights, layers, 0)
        model.to(self.device).eval().set_submodule(names.pop(), nn.Identity())
        whole = self.sentences[(self.sentences != 0).sum(1) >= TOKENS][:CALIBRATED, :TOKENS]
        first, *more = self.sentences[:WEIGHED].split(BATCH) if weigh else (whole,)
        lowrank.truncate_weights(model, names, _probed, first, 0.9, weigh_outputs=weigh, further=more)
        return {name: model.get_submodule(name).weight.detach() for name in names}


def _probed(model: nn.Module, tokens: Tensor) -> Tensor:
    """The features in random directions: the gradients of this tell what moves them, whatever reads them later."""
    features = model(tokens)
    return (features * torch.randn_like(features)).sum()


def converted(run: Run, weights: str, plans: Plans, batch: Batch) -> nn.Module:
    """The network ready for the run's way of training."""
    model, names = network(weights, run.layers, run.seed)
    model.to(plans.device)
    if run.method in TRUNCATED:
        found = plans.truncated(run.layers, TRUNCATED[run.method])
        for name in set(truncated_layers(run, model, names)) & found.keys():
            model.get_submodule(name).weight.data.copy_(found[name])
    if run.method in RANKED:
        storage, method = RANKED[run.method]
        plan = plans.plan(run.layers, storage)
        methods = dict.fromkeys(names, ASI(plan)) | dict.fromkeys(truncated_layers(run, model, names), method(plan))
        lowrank.convert(model, methods, everywhere=True)
    elif run.method in PLAIN:
        lowrank.convert(model, names, PLAIN[run.method])
    elif run.method == "lora_8":
        lora(model, names[:-1], batch)
        model.get_submodule(names[-1]).requires_grad_(True)
    return model


class Training:
    """A network and its optimizer."""

    def __init__(self, model: nn.Module, rate: float, steps: int) -> None:
        self.model = model
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, rate, weight_decay=DECAY)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rate, total_steps=steps, pct_start=WARM_UP, cycle_momentum=False
        )

    def step(self, batch: Batch) -> float:
        """One step; the loss."""
        loss = loss_of(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.schedule.step()
        return float(loss.detach())

    def seconds(self, batch: Batch) -> float:
        """Processor time of a step."""
        start = time.process_time()
        self.step(batch)
        return time.process_time() - start


def batches(part: Batch, seed: int) -> Iterator[Batch]:
    """The sentences in a random order, without an odd last batch."""
    order = torch.randperm(len(part[0]), generator=torch.Generator().manual_seed(seed))
    for places in order.split(BATCH):
        if len(places) == BATCH:
            yield part[0][places], part[1][places]


@torch.no_grad()
def told(model: nn.Module, part: Batch) -> tuple[float, float]:
    """Percentage of the sentences that are told right, and mean loss; of like length together, for little padding."""
    lengths = (part[0] != 0).sum(1)
    order = lengths.argsort()
    model.eval()
    outputs = torch.cat([model(part[0][places, : int(lengths[places].max())]) for places in order.split(128)])
    model.train()
    labels = part[1][order]
    return 100 * int((outputs.argmax(1) == labels).sum()) / len(labels), float(F.cross_entropy(outputs, labels))


def step_ratio(run: Run, weights: str, plans: Plans, batch: Batch) -> float:
    """Processor time of the method's step over that of vanilla's: the median of pairs that alternate."""
    vanilla = dataclasses.replace(run, method="vanilla")
    first, second = (Training(converted(way, weights, plans, batch), way.rate, 4 * PAIRS) for way in (run, vanilla))
    return ratio(lambda: first.seconds(batch), lambda: second.seconds(batch), PAIRS).median


def train(run: Run, weights: str, plans: Plans, parts: Texts) -> dict[str, object]:
    """One run: accuracies in percent, mean loss of the last fifth of the steps, bytes, time of a step."""
    epochs = [list(batches(parts.train, 1000 * run.seed + epoch)) for epoch in range(run.epochs)]
    steps = [batch for epoch in epochs for batch in epoch]
    training = Training(converted(run, weights, plans, steps[0]), run.rate, len(steps))
    losses = [training.step(batch) for batch in steps]
    last = losses[-(len(losses) // 5) :]
    model = training.model
    (val_accuracy, val_loss), (test_accuracy, _) = told(model, parts.val), told(model, parts.test)
    return {
        **dataclasses.asdict(run),
        "val_accuracy": val_accuracy,
        "val_loss": val_loss,
        "test_accuracy": test_accuracy,
        "train_loss": sum(last) / len(last),
        "trained_parameters": sum(parameter.numel() for parameter in training.trained),
        "kept_bytes": lowrank.saved_bytes(model, loss_of, steps[0]),
        "peak_bytes": lowrank.peak_bytes(model, loss_of, steps[0]),
        "step_ratio": step_ratio(run, weights, plans, steps[0]) if plans.device.type == "cpu" else None,
        "device": device_name(plans.device),
    }


def vanilla_at_best(rows: pd.DataFrame) -> pd.DataFrame:
    """Vanilla's runs at one rate for each depth and number of epochs: the one of the highest validation accuracy.

    Only rates with the most seeds count: others were tried on a few, and not chosen.
    """
    same = ["layers", "epochs"]
    vanilla = rows[rows.method == "vanilla"]
    rates = vanilla.groupby([*same, "rate"]).val_accuracy.agg(["size", "mean"]).sort_values(["size", "mean"])
    best = rates.reset_index().drop_duplicates(same, keep="last")
    return vanilla.merge(best[[*same, "rate"]])


def gap(values: pd.Series) -> str:
    """Differences to vanilla, of the seeds that it has."""
    return spread(values.dropna(), "+") if values.notna().any() else "-"


def summary(rows: pd.DataFrame) -> str:
    """Per depth, method and rate: accuracy, its gaps to vanilla, seed by seed, last training loss, bytes, time."""
    same = ["layers", "epochs", "seed"]
    at_rate = rows[(rows.method == "vanilla") & (rows.rate == RATE)]
    for name, vanilla in (("exact", at_rate), ("best", vanilla_at_best(rows))):
        rows = rows.join(vanilla.set_index(same).test_accuracy.rename(name), on=same)
    heads = ("layers", "method", "epochs", "rate", "seeds", "validation", "test accuracy")
    heads += (f"gap to {RATE:g}", "gap to best", "last loss")
    heads += ("kept, MiB", "peak, MiB", "step / vanilla's", "trained, M")
    lines = []
    for (layers, method, epochs, rate), group in rows.groupby(KEY[:-1], sort=False):
        cells = (
            *(layers, method, epochs, f"{rate:g}", ", ".join(map(str, group.seed))),
            *(spread(group[key]) for key in ("val_accuracy", "test_accuracy")),
            *(gap(group.test_accuracy - group[key]) for key in ("exact", "best")),
            f"{group.train_loss.mean():.3f}",
            *(f"{group[key].mean() / 2**20:.1f}" for key in ("kept_bytes", "peak_bytes")),
            "-" if group.step_ratio.isna().all() else f"{group.step_ratio.median():.2f}",
            f"{group.trained_parameters.mean() / 1e6:.2f}",
        )
        lines.append(cells)
    return (
        table(heads, lines)
        + f"""
`python -m benchmarks.review_sentences`: MiniLM with pretrained weights, its last linear layers trained on
{TRAIN:,} sentences of film reviews, positive against negative, tested on 2,014. Inputs of ASI and WASI at
1/{PART}. Gaps are to vanilla of the same depth, epochs and seed, at {RATE:g} and at its best rate by validation
accuracy, of those that were run on most seeds; means over the seeds ± the standard error of the mean, of gaps over
those that vanilla has too. Kept: all that a step holds for its backward pass, without weights. Times of steps are
processor times, in pairs that alternate. `whitened`: weights truncated to the same ranks where that changes their
outputs least; `weighed`: where that moves the features least, by gradients too. `mlp`: only weights of the MLPs are
truncated, as in WASI's paper; the other layers are trained with ASI. Trained on
{", ".join(sorted(set(rows.device)))}.
"""
    )


def main() -> None:
    """Train what the table lacks."""
    parser = parser_of("review_sentences", __doc__, "figures/review_sentences.csv")
    parser.add_argument("--weights", required=True, help="folder with weights and tokenizer of minilm")
    parser.add_argument("--tokenizer", help="in place of that of the folder")
    parser.add_argument("--layers", nargs="+", default=["13", "all"])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1])
    parser.add_argument("--rates", type=float, nargs="+", default=[RATE])
    parser.add_argument("--seeds", type=int, nargs="+", default=[233, 1, 2])
    options = parser.parse_args()
    parts = texts(options.root, options.tokenizer or options.weights, options.device)
    plans = Plans(options.weights, parts.train)
    rows = Rows(options.out, KEY, summary, text=["layers"])
    ways = (options.seeds, options.layers, options.methods, options.epochs, options.rates)
    for seed, layers, method, epochs, rate in itertools.product(*ways):
        run = Run(layers, method, epochs, rate, seed)
        if not rows.has(*dataclasses.astuple(run)):
            rows.add(train(run, options.weights, plans, parts))


if __name__ == "__main__":
    main()
