"""Training steps on a GPU against the stock model's: time by CUDA's events, memory as its allocator counts it.

    python -m benchmarks.cuda [--help]

All ways take turns, a step each a round; a ratio is the median of the rounds', and that of the stock model to a copy of
itself is the machine's noise. Each is timed as a CUDA graph too, in which the host has no part: the GPU's own time.
Memory is what a step adds: kept, between forward and backward pass; and the highest.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

import lowrank
from benchmarks.networks import Batch, batch_of, build, loss_of, step, trained_layers
from benchmarks.peers import RANKS
from experiment.files import write_whole
from lowrank.methods.base import Method

NETWORKS = ("resnet18", "mobilenet_v2", "vit_small")
WAYS: dict[str, Callable[[Sequence[int]], Method | None]] = {
    "vanilla": lambda _: None,
    "vanilla again": lambda _: None,
    "lean": lambda _: lowrank.Vanilla(),
    "asi": lambda ranks: lowrank.ASI(ranks),
    "asi_int8": lambda ranks: lowrank.ASI(ranks, storage="int8"),
}
WARM = 4  # steps ahead of what is measured
MIB = 2**20


def in_way(stock: nn.Module, names: list[str], way: str) -> nn.Module:
    """A copy of the stock model that trains in one of the ways."""
    of_images = isinstance(stock.get_submodule(names[0]), nn.Conv2d)
    method = WAYS[way](RANKS if of_images else RANKS[:3])
    model = copy.deepcopy(stock)
    return model if method is None else lowrank.convert(model, names, method)


def milliseconds(work: Callable[[], object]) -> float:
    """Time of a step."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def recorded(model: nn.Module, batch: Batch) -> torch.cuda.CUDAGraph | None:
    """A step as a CUDA graph; None, and why, where that fails."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            step(model, batch)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step(model, batch)
    except RuntimeError as error:
        print(f"no graph: {error}", flush=True)
        return None
    return graph


def memory(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """MiB that a step adds: between forward and backward pass, and at its highest, the gradients among them."""
    model.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = loss_of(model, batch)
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    highest = torch.cuda.max_memory_allocated() - before
    model.zero_grad()
    return kept / MIB, highest / MIB


def in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> list[dict[str, float]]:
    """Milliseconds of each way, a round after the other; the first, to warm up, is left out."""
    return [{way: milliseconds(work) for way, work in ways.items()} for _ in range(rounds + 1)][1:]


def compare(network: str, layers: str, count: int, size: int, rounds: int) -> list[dict[str, Any]]:
    """One row a way."""
    stock = build(network, size)
    names = trained_layers(network, stock, layers)
    models = {way: in_way(stock, names, way).cuda() for way in WAYS}
    batch = tuple(tensor.cuda() for tensor in batch_of(count, size))
    for model, _ in product(models.values(), range(WARM)):
        step(model, batch)
    used = {way: memory(model, batch) for way, model in models.items()}
    times = in_turns({way: partial(step, model, batch) for way, model in models.items()}, rounds)
    found = {way: recorded(model, batch) for way, model in models.items()}
    graphs = in_turns({way: graph.replay for way, graph in found.items() if graph is not None}, rounds)
    rows = []
    for way in WAYS:
        ratios = [each[way] / each["vanilla"] for each in times]
        rows.append(
            {
                **{"network": network, "layers": layers, "batch": count, "way": way},
                "milliseconds": statistics.median(each[way] for each in times),
                **{"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
                "graph_milliseconds": statistics.median(each.get(way, math.nan) for each in graphs),
                "graph_ratio": statistics.median(each.get(way, math.nan) / each["vanilla"] for each in graphs),
                **dict(zip(("kept_mib", "peak_mib"), used[way], strict=True)),
            }
        )
    return rows


def markdown(frame: pd.DataFrame, heading: str) -> str:
    """One line a case: the stock model's time and the others' as ratios; what each keeps, and its highest."""
    case = ["network", "layers", "batch"]
    values = ["milliseconds", "ratio", "graph_milliseconds", "graph_ratio", "kept_mib", "peak_mib"]
    wide = frame.pivot_table(index=case, columns="way", values=values, sort=False)
    ways = [way for way in WAYS if way in set(frame.way)]
    columns = {"vanilla, ms": wide["milliseconds", "vanilla"].round(2)}
    columns |= {way: wide["ratio", way].round(2) for way in ways[1:]}
    columns |= {"graph: vanilla, ms": wide["graph_milliseconds", "vanilla"].round(2)}
    columns |= {f"graph: {way}": wide["graph_ratio", way].round(2) for way in ways[1:]}
    for name, column in (("kept", "kept_mib"), ("peak", "peak_mib")):
        columns |= {f"{way}, {name} MiB": wide[column, way].round(1) for way in ways if way != "vanilla again"}
    return f"{heading}\n\n{pd.DataFrame(columns).reset_index().to_markdown(index=False)}\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--layers", nargs="+", default=["4", "all"], help="last ones, or all")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("figures"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "benchmarks.cuda: PyTorch sees no CUDA device here\n")
    card = torch.cuda.get_device_name()
    heading = f"{card}, PyTorch {torch.__version__}, {options.size} pixels; kernels {lowrank.kernels.status().gpu}"
    rows: list[dict[str, Any]] = []
    for network, layers, count in product(options.networks, options.layers, options.batch):
        rows += compare(network, layers, count, options.size, options.rounds)
        print(*(f"{row['way']} {row['ratio']:.2f}" for row in rows[-len(WAYS) :]), network, layers, count, flush=True)
        frame = pd.DataFrame([{"card": card, **row} for row in rows])
        options.output.mkdir(parents=True, exist_ok=True)
        write_whole(options.output / "cuda.csv", frame.round(4).to_csv(index=False))
        write_whole(options.output / "cuda.md", markdown(frame, heading))


if __name__ == "__main__":
    main()
