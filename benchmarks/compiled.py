"""Compiled training on a CPU: bytes kept and time of a step, against ordinary training compiled the same way.

    python -m benchmarks.compiled [--help]

All ways are compiled, by PyTorch's default backend, and take turns, a step each a round; a ratio is the median of the
rounds', and that of the stock model to a copy of itself is the machine's noise. Beside them stands what the same model
keeps without a compiler. The first step, which compiles, is timed alone; the copy takes the code of the stock model.
The budget is PyTorch's: the share of the activations that a compiled graph may keep; it computes the rest again.
Weights and images lie channels last: otherwise PyTorch's default backend keeps a copy of each weight that does.
"""

from __future__ import annotations

import copy
import statistics
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch._functorch.config as functorch_config
from torch import nn

import lowrank
from benchmarks.comparisons import CONVOLUTIONAL
from benchmarks.networks import Batch, batch_of, build, loss_of, step, trained_layers
from benchmarks.pairs import seconds
from benchmarks.peers import RANKS
from benchmarks.rows import Rows, table
from lowrank.methods.base import Method

WAYS: dict[str, Method | None] = {
    "vanilla": None,
    "vanilla again": None,
    "vanilla_fused": lowrank.Vanilla(),
    "asi": lowrank.ASI(RANKS),
}
KEY = ["network", "layers", "statistics", "budget", "batch", "size", "threads", "way"]
WARM = 3  # rounds ahead of what is measured, in which nothing is compiled any more
MIB = 2**20


def in_way(stock: nn.Module, names: list[str], way: str) -> nn.Module:
    """A copy of the stock model that trains in one of the ways."""
    model, method = copy.deepcopy(stock), WAYS[way]
    return model if method is None else lowrank.convert(model, names, method)


def measure(case: Mapping[str, Any], batch: Batch, rounds: int, backend: str) -> list[dict[str, Any]]:
    """One row for each way to train in one case, which says network, layers, statistics and budget."""
    stock = build(case["network"], batch[0].shape[-1]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    names = trained_layers(case["network"], stock, case["layers"])
    if case["statistics"] == "batch":
        stock.train()
    models = {way: in_way(stock, names, way) for way in WAYS}
    eager = {way: lowrank.saved_bytes(model, loss_of, batch) for way, model in models.items()}
    torch._dynamo.reset()
    first = {}
    for way, model in models.items():
        model.compile(backend=backend)
        with functorch_config.patch(activation_memory_budget=case["budget"]):
            first[way] = seconds(partial(step, model, batch))
    kept = {way: lowrank.saved_bytes(model, loss_of, batch) for way, model in models.items()}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(WARM + rounds):
        for way, model in models.items():
            taken = seconds(partial(step, model, batch))
            times[way] += [taken] if number >= WARM else []
    return [
        {
            **case,
            "way": way,
            "eager_kept_bytes": eager[way],
            "kept_bytes": kept[way],
            "first_step_s": first[way],
            **_ratio(times[way], times["vanilla"]),
        }
        for way in WAYS
    ]


def _ratio(times: Sequence[float], of_stock: Sequence[float]) -> dict[str, Any]:
    ratios = [one / other for one, other in zip(times, of_stock, strict=True)]
    return {
        "step_over_vanilla": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "rounds": len(ratios),
    }


def summary(frame: pd.DataFrame) -> str:
    """The table as a page."""
    lines = [
        [
            *(row[key] for key in KEY),
            f"{row.eager_kept_bytes / MIB:.2f}",
            f"{row.kept_bytes / MIB:.2f}",
            f"{row.step_over_vanilla:.2f} [{row.low:.2f}, {row.high:.2f}]",
            f"{row.first_step_s:.0f}",
        ]
        for _, row in frame.iterrows()
    ]
    measured = ["kept, eager (MiB)", "kept, compiled (MiB)", "step / vanilla, both compiled", "first step (s)"]
    return f"# Compiled training\n\n`python -m benchmarks.compiled`\n\n{table([*KEY, *measured], lines)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=CONVOLUTIONAL, default=list(CONVOLUTIONAL), metavar="NETWORK")
    parser.add_argument("--layers", nargs="+", default=["all"], metavar="N")
    parser.add_argument("--statistics", nargs="+", choices=["frozen", "batch"], default=["frozen", "batch"])
    parser.add_argument("--budget", nargs="+", type=float, default=[1.0, 0.1])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--out", type=Path, default=Path("figures/compiled.csv"))
    options = parser.parse_args(arguments)
    rows = Rows(options.out, KEY, summary, text=["layers"])
    images, labels = batch_of(options.batch, options.size)
    batch = images.contiguous(memory_format=torch.channels_last), labels
    sizes = {"batch": options.batch, "size": options.size, "threads": torch.get_num_threads()}
    kinds = options.networks, options.layers, options.statistics, options.budget
    for chosen in product(*kinds):
        case = dict(zip(KEY, chosen, strict=False)) | sizes
        if not rows.has(*case.values(), "vanilla"):
            rows.add(*measure(case, batch, options.rounds, options.backend))


if __name__ == "__main__":
    main()
