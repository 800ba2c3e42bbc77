"""What keeping less of one layer takes more than PyTorch, against what the rule of `smallest` foretells by its shapes.

    python -m benchmarks.worth [--help]

Every distinct convolution of the networks is trained alone: with the normalisation behind it computed together with it,
which the rule calls merging, and with its input compressed by ASI; each alternates with the stock layers, by processor
time on one thread. Both numbers are in operator calls, of 10 microseconds. The last line has the
constants of merging in `lowrank.tensors.worth` that fit what was measured best, by least squares relative to the stock
step. A layer alone finds its tensors in the cache sooner than in its network: steps of networks have the last word.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

import lowrank
from benchmarks.comparisons import CONVOLUTIONAL, Setting, kind_of_convolution, shapes_of, step_on
from benchmarks.networks import build
from benchmarks.pairs import Work, seconds
from benchmarks.peers import RANKS
from experiment.allocator import keep_freed_memory
from experiment.files import write_whole
from lowrank.tensors import worth
from lowrank.tensors.geometry import ConvGeometry

CALL = 1e-5  # seconds
ASI = lowrank.ASI(RANKS)


@dataclass(frozen=True)
class Layer:
    """A convolution of a network, and the shape of its input."""

    network: str
    convolution: nn.Conv2d
    shape: tuple[int, ...]

    @property
    def rule(self) -> tuple[ConvGeometry, tuple[int, ...], int, int]:
        """What the rule knows of it."""
        return ConvGeometry.of(self.convolution), self.shape, self.convolution.out_channels, torch.float32.itemsize


def layers_of(setting: Setting) -> Iterator[Layer]:
    """Every distinct convolution that has an input with a gradient."""
    seen = set()
    for network in setting.networks:
        shapes = shapes_of(network, setting)
        for name, layer in build(network, setting.size).named_modules():
            if isinstance(layer, nn.Conv2d) and shapes[name][1] > 3 and (repr(layer), shapes[name]) not in seen:
                seen.add((repr(layer), shapes[name]))
                yield Layer(network, layer, shapes[name])


def merging(layer: Layer) -> tuple[nn.Module, nn.Module]:
    """Convolution and normalisation, computed together and one after the other."""
    stock = nn.Sequential(copy.deepcopy(layer.convolution), nn.BatchNorm2d(layer.convolution.out_channels).eval())
    return lowrank.convert(copy.deepcopy(stock), ["0"], lowrank.Vanilla(), recompute=False), stock


def compressing(layer: Layer) -> tuple[nn.Module, nn.Module]:
    """A convolution that compresses its input, and one that keeps it."""
    stock = nn.Sequential(copy.deepcopy(layer.convolution))
    return lowrank.convert(copy.deepcopy(stock), ["0"], ASI, fuse=False), stock


def more(own: Work, stock: Work, pairs: int) -> tuple[float, float]:
    """What a step of the first takes more than one of the second, and what that takes, in calls; medians of pairs."""
    for _ in range(2):
        own(), stock()
    times = [(seconds(own, time.process_time), seconds(stock, time.process_time)) for _ in range(pairs)]
    return statistics.median(a - b for a, b in times) / CALL, statistics.median(b for _, b in times) / CALL


def rows_of(layer: Layer, pairs: int) -> Iterator[dict[str, object]]:
    """One row for merging and one for compressing."""
    x = torch.randn(layer.shape)
    geometry, shape, out_channels, _ = layer.rule
    price = ASI.price(x, geometry, out_channels)
    assert price is not None
    for what, both, foretold, terms in (
        ("merging", merging, worth.merging_calls(*layer.rule), worth.merging_terms(*layer.rule)),
        ("compressing", compressing, price[1], ()),
    ):
        own, stock = (step_on(model, x) for model in both(layer))
        measured, step = more(own, stock, pairs)
        names = {"what": what, "network": layer.network, "kind": kind_of_convolution(layer.convolution)}
        sizes = {"in": shape[1], "out": out_channels, "batch": shape[0], "side": shape[3]}
        yield {**names, **sizes, "stock": step, "measured": measured, "foretold": foretold, "terms": terms}


def errors(frame: pd.DataFrame) -> pd.DataFrame:
    """How far the rule is off, as a share of the stock step: the middle size, and the middle itself, by kind."""
    off = (frame.foretold - frame.measured) / frame.stock
    groups = frame.assign(size=off.abs(), off=off).groupby(["what", "network", "kind"], sort=False)
    found = groups[["size", "off"]].median()
    return found.assign(layers=groups.size()).reset_index()


def fitted(frame: pd.DataFrame) -> str:
    """The constants of merging, in the order of `merging_terms`."""
    rows = frame[frame.what == "merging"]
    weights = 1 / rows.stock.to_numpy()
    terms = np.array(list(rows.terms)) * weights[:, None]
    return ", ".join(f"{one:.2f}" for one in np.linalg.lstsq(terms, rows.measured * weights, rcond=None)[0])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worth", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=CONVOLUTIONAL, default=list(CONVOLUTIONAL), metavar="NETWORK")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--size", type=int, default=160, help="side of the images in pixels")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--output", type=Path, default=Path("figures/worth.md"))
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(233)
    settings = [Setting(batch, options.size, tuple(options.networks)) for batch in options.batch]
    rows = [row for setting in settings for layer in layers_of(setting) for row in rows_of(layer, options.pairs)]
    frame = pd.DataFrame(rows)
    found = fitted(frame)
    tables = [errors(frame).round(3), frame.drop(columns="terms").round(1)]
    text = "\n\n".join(table.to_markdown(index=False) for table in tables)
    write_whole(options.output, f"{text}\n\nFitted constants of merging: {found}\n")
    print(errors(frame).round(3).to_string(index=False))
    print(f"fitted: {found}")


if __name__ == "__main__":
    main()
