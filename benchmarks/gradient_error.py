"""How far low-rank weight gradients are from exact ones at the same bytes, and what a step takes: ASI in its storages.

    python -m benchmarks.gradient_error --root data --weights efficientnet_lite0=FILE [--help]

On Fashion-MNIST, the last 2, 4 and 8 convolutions. Networks without a weights file are trained here first, on 4,000
images. The budget is a part of what the inputs of the layers take. Error: norm of the difference over that of the exact
gradient, mean over fresh batches behind a few to settle; per network the geometric mean over the layers, and of all
layers together. Step: processor time of the whole network over that of ordinary training of the same layers, median of
alternating pairs.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import lowrank
from benchmarks.fashion import CLIP, DECAY, MOMENTUM, RATE
from benchmarks.pairs import ratio
from benchmarks.rows import Rows, device_name, parser_of, table
from benchmarks.tails import BATCH, CLASSES, Batch, Data, batches, loss_of, network, parts_of, pictures
from classification.backbones import build_model
from classification.front import split
from lowrank import ASI, MODE_ENERGIES, Storage

NETWORKS = {"efficientnet_lite0": 96, "mobilenet_v2": 64, "resnet18": 64}  # and the size of their images
DEPTHS, PARTS, EPOCHS = (2, 4, 8), (20, 50), 2
COUNT, MEASURED = 14, 4  # batches: all; the last, that are measured once the bases have settled on the others
STORAGES: tuple[Storage, ...] = ("input", "bfloat16", "int8")
WAYS: list[tuple[tuple[Storage, ...], int, bool]] = [  # storages to choose from, `refresh` and `derive`
    (("input",), 1, False),
    (("int8",), 1, False),
    (("int8",), 4, False),
    (STORAGES, 1, False),
    (("int8",), 1, True),
]
KEY = ["network", "layers", "part"]


def descend(parameters: list[nn.Parameter], losses: Iterable[Callable[[], Tensor]]) -> None:
    """SGD with momentum on one loss after the other."""
    optimizer = torch.optim.SGD(parameters, RATE, MOMENTUM, weight_decay=DECAY)
    for loss in losses:
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()


def pretrained(name: str, images: Batch, folder: Path) -> str:
    """A weights file of a network that was trained on these images; made if it is not there."""
    path = folder / f"{name}.pt"
    if not path.exists():
        torch.manual_seed(233)
        model = build_model(name, CLASSES).train().to(images[1].device)
        shuffled = (batch for epoch in range(EPOCHS) for batch in batches(images, epoch))
        descend(list(model.parameters()), (partial(loss_of, model, batch) for batch in shuffled))
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.cpu().state_dict(), path)
    return str(path)


class Subject:
    """A network whose last layers are looked at, with what reaches them of some batches.

    Attributes:
        model, names: the network, and its last layers; all ahead of them is frozen.
        batches: activations ahead of the layers, and labels.
    """

    def __init__(self, name: str, weights: str, images: Batch) -> None:
        self.model, self.names = network(name, weights, max(DEPTHS), 233)
        self.model.to(images[1].device)
        self.images = images
        front = split(self.model, images[0][0][:4]).front
        with torch.no_grad():
            self.batches: list[Batch] = [(front(*given), labels) for given, labels in parts_of(images, BATCH)]
        # A new classifier's gradients say little of what a network is trained with.
        head, tail = list(self.model.children())[-1], self.tail(self.model)
        descend(list(head.parameters()), (partial(loss_of, tail, batch) for batch in self.batches * EPOCHS))

    def tail(self, model: nn.Module) -> Callable[..., Tensor]:
        """The part of the network, or of a copy that is not converted yet, that is behind its frozen front."""
        return split(model, self.images[0][0][:4]).tail

    def input_bytes(self, names: list[str]) -> int:
        """What ordinary training keeps of these layers' inputs."""
        forward = lambda model, batch: self.tail(model)(*batch[0])  # noqa: E731
        return lowrank.account(self.model, names, self.batches[0], forward).total.activation_bytes

    def perplexity(self) -> lowrank.PerplexityTable:
        """Of all layers, on the first batch."""
        tail = self.tail(self.model)
        options = (self.model, self.names, lambda _, batch: loss_of(tail, batch), self.batches[0])
        return lowrank.measure_perplexity(*options, mode_energies=MODE_ENERGIES, storages=STORAGES, derive=True)

    def gradients(self, names: list[str], method: ASI | None) -> list[dict[str, Tensor]]:
        """Weight gradients of layers on the last batches, behind the others."""
        model = copy.deepcopy(self.model)
        tail, found = self.tail(model), []
        if method is not None:
            lowrank.convert(model, names, method, everywhere=True)
        for batch in self.batches if method is not None else self.batches[-MEASURED:]:
            model.zero_grad()
            loss_of(tail, batch).backward()
            layers = {name: model.get_submodule(name).weight for name in names}
            found.append({name: weight.grad.clone() for name, weight in layers.items() if weight.grad is not None})
        return found[-MEASURED:]

    def step_ratio(self, names: list[str], method: ASI, pairs: int) -> float:
        """Processor time of a step of the whole network, these layers trained, over that of ordinary training."""
        stock = copy.deepcopy(self.model)
        lowrank.freeze_before(stock, names)
        low = lowrank.convert(copy.deepcopy(stock), names, method, everywhere=True)
        batch = parts_of(self.images, BATCH)[0]

        def step(model: nn.Module) -> Callable[[], float]:
            def run() -> float:
                start = time.process_time()
                model.zero_grad()
                loss_of(model, batch).backward()
                return time.process_time() - start

            return run

        return ratio(step(low), step(stock), pairs).median


def measure(name: str, weights: str, images: Batch, pairs: int) -> Iterator[dict[str, object]]:
    """A row for each depth, part, way and layer of a network."""
    subject = Subject(name, weights, images)
    table, whole = subject.perplexity(), subject.gradients(subject.names, None)
    for depth in DEPTHS:
        names = subject.names[-depth:]
        exact = [{layer: found[layer] for layer in names} for found in whole]
        given = subject.input_bytes(names)
        for part, (storages, refresh, derive) in product(PARTS, WAYS):
            plan = lowrank.select_ranks(table, given / part, names, storages, derive)
            method = ASI(plan, refresh=refresh, derive=derive)
            label = method.tag if len(storages) == 1 else "asi_mixed"  # also where all layers chose the same
            low = subject.gradients(names, method)
            whole_error = together(low, exact)
            took = subject.step_ratio(names, method, pairs) if pairs else None
            for layer, error in errors(low, exact).items():
                yield {
                    **{"network": name, "layers": depth, "part": part, "method": label, "layer": layer},
                    **{"ranks": "x".join(map(str, plan.ranks[layer])), "storage": plan.storages[layer]},
                    **{"error": error, "together": whole_error, "plan_bytes": plan.nbytes},
                    **{"input_bytes": given, "step": took, "device": device_name(images[1].device)},
                }


def together(low: list[dict[str, Tensor]], exact: list[dict[str, Tensor]]) -> float:
    """Mean relative error of the gradients of all layers as one vector."""
    flat = [[torch.cat([gradient.flatten() for gradient in each.values()]) for each in found] for found in (low, exact)]
    return sum(map(_relative, *flat)) / len(exact)


def errors(low: list[dict[str, Tensor]], exact: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean relative error of each layer's gradient."""
    pairs = list(zip(low, exact, strict=True))
    return {name: sum(_relative(a[name], b[name]) for a, b in pairs) / len(pairs) for name in exact[0]}


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def geometric(values: pd.Series) -> float:
    """Geometric mean."""
    return math.exp(np.log(values).mean())


def summary(rows: pd.DataFrame) -> str:
    """Per network, depth, part and method the geometric mean of the error over the layers, and the step."""
    heads = ("network", "layers", "memory", "method", "relative gradient error", "of asi's")
    heads += ("worst layer", "all together", "step")
    lines = []
    groups = [*rows.groupby(KEY, sort=False)]
    groups += [(("all", *key), group) for key, group in rows.groupby(KEY[1:], sort=False)]
    for (name, depth, part), group in groups:
        base = geometric(group[group.method == "asi"].error)
        for method, own in group.groupby("method", sort=False):
            error = geometric(own.error)
            cells = (name, depth, f"1/{part}", method, f"{error:.3f}", f"{error / base:.2f}")
            took = f"{geometric(own.step):.2f}" if own.step.notna().all() else "-"
            lines.append((*cells, f"{own.error.max():.3f}", f"{geometric(own.together):.3f}", took))
    return (
        table(heads, lines)
        + f"""
`python -m benchmarks.gradient_error`: batches of 64 of Fashion-MNIST, the last convolutions; networks
without ImageNet weights were trained there. `asi_mixed` chooses the storage per layer; `every4` iterates the
bases at every 4th step; `derived`: inputs that follow from others are not kept. Error: geometric mean over the
layers, and of all layers as one vector. Step: processor time of the whole network over ordinary training's. Run
on {", ".join(sorted(set(rows.device)))}.
"""
    )


def main() -> None:
    """Measure what the table lacks."""
    parser = parser_of("gradient_error", __doc__, "figures/gradient_error.csv")
    parser.add_argument("--weights", nargs="*", default=[], metavar="NETWORK=FILE", help="weights files")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    trained = Path("runs/gradient_error")
    parser.add_argument("--trained", type=Path, default=trained, help="where weights trained here go")
    parser.add_argument("--pairs", type=int, default=5, help="of steps, whose times are compared; 0: none, as on a GPU")
    options = parser.parse_args()
    given = dict(word.split("=", 1) for word in options.weights)
    rows = Rows(options.out, KEY, summary)
    wanted = [name for name in options.networks if name not in set(rows.frame.network)]
    part = Data(options.root, options.device).parts[0] if wanted else None
    for name in wanted:
        assert part is not None
        order = np.random.default_rng(0).permutation(len(part.labels))
        pixels = pictures(np.asarray(part.images)[order], NETWORKS[name]).contiguous()
        images = ((pixels.to(options.device),), torch.from_numpy(part.labels[order]).to(options.device))
        weights = given.get(name) or pretrained(name, images, options.trained)
        rows.add(*measure(name, weights, next(iter(parts_of(images, COUNT * BATCH))), options.pairs))


if __name__ == "__main__":
    main()
