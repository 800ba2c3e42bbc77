"""Memory and step time of every way to train in less memory, against ordinary training of the same layers.

    python -m benchmarks.memory [--help]

Each row is measured in a process of its own; the table is written anew after each row, and what it has already is not
measured again. Kept: bytes that live between forward and backward pass because of it. Peak: most bytes of tensors in a
step, where every operator can be followed. Error: norm of the difference of the layers' weight gradients to those of
ordinary training, over their norm, in the fourth step on one batch. Resident: most memory of the process in a step,
above what it held before, as the system counts it. Step: ratio of times, median of pairs of alternating steps.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from benchmarks.networks import NETWORKS, Batch, batch_of, build, trained_layers
from benchmarks.pairs import ratio
from benchmarks.peers import PEERS
from benchmarks.plots import BASELINE, draw
from benchmarks.processes import run_python
from experiment.allocator import keep_freed_memory
from experiment.files import write_whole
from lowrank import peak_bytes, saved_bytes
from lowrank.layers.preserve import LossFunction
from lowrank.meters.memory import held_bytes

OPAQUE = {"compile_budget_0.5"}  # operators inside a compiled graph cannot be followed one by one
SETTLED = 4  # steps, before the gradients are compared
KEY = ["network", "layers", "peer", "batch", "size"]


@dataclass(frozen=True)
class Row:
    """What identifies a measurement."""

    network: str
    layers: str
    peer: str
    batch: int
    size: int


def measure(row: Row, parts: Sequence[str], pairs: int) -> dict[str, Any]:
    """Measure parts of one row, "memory" and "time", in this process."""
    result: dict[str, Any] = asdict(row)
    if "memory" in parts:
        result |= _memory(row)
    if "time" in parts:
        result |= _time(row, pairs)
    return result


def _memory(row: Row) -> dict[str, Any]:
    model, loss_fn, batch = _prepared(row)
    result: dict[str, Any] = {}
    if row.peer in OPAQUE:
        loss_fn(model, batch).backward()  # compiles
        result["kept_bytes"] = saved_bytes(model, loss_fn, batch)
    else:
        # Of micro-batches the loss function leaves gradients, which are not kept for the backward pass.
        kept = saved_bytes if "micro_batch" in row.peer else held_bytes
        result["kept_bytes"] = kept(model, loss_fn, batch)
        result["peak_bytes"] = peak_bytes(model, loss_fn, batch)
        result["inference_bytes"] = peak_bytes(model, loss_fn, batch, backward=False)
    result["resident_bytes"] = _resident_growth(lambda: loss_fn(model, batch).backward())
    return result | {"gradient_error": _gradient_error(row)}


def _gradient_error(row: Row) -> float | None:
    """Of the trained layers' weights in all; None where a peer does not train them."""
    found = []
    for peer in (row.peer, BASELINE):
        model, loss_fn, batch = _prepared(replace(row, peer=peer))
        for _ in range(SETTLED if peer == row.peer else 1):
            model.zero_grad()
            loss_fn(model, batch).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    names = [f"{name}.weight" for name in trained_layers(row.network, model, row.layers)]
    if not all(name in found[0] for name in names):
        return None
    apart = sum(float((found[0][name] - found[1][name]).square().sum()) for name in names)
    whole = sum(float(found[1][name].square().sum()) for name in names)
    return (apart / whole) ** 0.5


def _prepared(row: Row) -> tuple[nn.Module, LossFunction, Batch]:
    batch, model = batch_of(row.batch, row.size), build(row.network, row.size)
    return model, PEERS[row.peer](model, trained_layers(row.network, model, row.layers), batch), batch


def _resident_growth(step: Callable[[], None]) -> int | None:
    """How far the process's memory rises above where it was in a step, in bytes; None where Linux does not say."""
    status, peak = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not peak.exists():
        return None
    library = ctypes.CDLL(None)
    library.mallopt(-3, 65536)  # a large block is given back to the system as soon as it is freed
    step()
    gc.collect()
    library.malloc_trim(0)

    def read(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key)) * 1024

    peak.write_text("5")  # the highest mark starts anew
    before = read("VmRSS")
    step()
    return read("VmHWM") - before


def _time(row: Row, pairs: int) -> dict[str, Any]:
    keep_freed_memory()
    model, loss_fn, batch = _prepared(row)
    stock, stock_loss, _ = _prepared(replace(row, peer=BASELINE))

    def step(model: nn.Module, loss_fn: LossFunction) -> None:
        model.zero_grad()
        loss_fn(model, batch).backward()

    found = ratio(partial(step, model, loss_fn), partial(step, stock, stock_loss), pairs)
    return {"step_over_vanilla": found.median, "step_spread": found.high - found.low}


def _in_a_process(row: Row, parts: Sequence[str], pairs: int) -> dict[str, Any]:
    options = ["--row", json.dumps(asdict(row)), "--parts", *parts, "--pairs", str(pairs)]
    done = run_python(["-m", "benchmarks.memory", *options])
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines()
    reason = lines[-1] if lines else f"killed by signal {-done.returncode}"
    return {**asdict(row), "failed": reason[:200]}


def run(rows: list[Row], pairs: int, table: Path) -> pd.DataFrame:
    """Measure what the table lacks, ratios of times among it if `pairs` asks for them; returns the whole table."""
    records = pd.read_csv(table, dtype={"layers": str}).to_dict("records") if table.exists() else []
    results = {tuple(str(record[key]) for key in KEY): record for record in records}
    for number, row in enumerate(rows, start=1):
        key = tuple(str(value) for value in asdict(row).values())
        parts = _lacking(results.get(key, {}), pairs)
        if not parts:
            continue
        print(f"[{number}/{len(rows)}] {row.network}, last {row.layers}, batch {row.batch}: {row.peer}", flush=True)
        results[key] = results.get(key, {}) | _in_a_process(row, parts, pairs)
        frame = _in_order(pd.DataFrame(results.values()))
        table.parent.mkdir(parents=True, exist_ok=True)
        write_whole(table, frame.to_csv(index=False))
    return _in_order(pd.DataFrame(results.values())) if results else pd.DataFrame(columns=KEY)


def _lacking(record: dict[str, Any], pairs: int) -> list[str]:
    """Which parts are still to be measured of what the table has of a row."""
    if isinstance(record.get("failed"), str):
        return []
    needed = {"memory": "kept_bytes"} | ({"time": "step_over_vanilla"} if pairs else {})
    return [part for part, column in needed.items() if pd.isna(record.get(column))]


def _in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of networks, depths, batches and peers, whenever they were measured."""
    places = {"network": NETWORKS, "peer": tuple(PEERS)}

    def place(column: pd.Series) -> pd.Series:
        if column.name in places:
            return column.map(places[column.name].index)
        return column.map(lambda count: float("inf") if count == "all" else int(count))

    return frame.sort_values(["network", "layers", "batch", "peer"], key=place, kind="stable", ignore_index=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--layers", nargs="+", default=["2", "4", "all"], metavar="N")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="PEER")
    parser.add_argument("--batch", type=int, nargs="+", default=[64], help="images; several in one table")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of steps for the ratio of times; 0: none")
    parser.add_argument("--output", type=Path, default=Path("figures"))
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--parts", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(Row(**json.loads(options.row)), options.parts, options.pairs)))
        return
    rows = [
        Row(network, layers, peer, batch, options.size)
        for network in options.networks
        for layers in options.layers
        for batch in options.batch
        for peer in options.peers
    ]
    torch.manual_seed(233)
    frame = run(rows, options.pairs, options.output / "memory.csv")
    for path in draw(frame, options.output):
        print(path)


if __name__ == "__main__":
    main()
