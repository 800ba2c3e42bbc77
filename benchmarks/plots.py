"""The memory table as a plot and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd

from experiment.files import write_whole

mpl.use("Agg")
import matplotlib.pyplot as plt

BASELINE = "vanilla"
_COLOURS = {"vanilla": "#000000", "lean": "#0072b2", "asi": "#d55e00", "asi_int8": "#cc79a7"}  # of `batch_steps`


def ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """Per row: kept bytes of vanilla over the row's, peak over the row's inference peak, resident over vanilla's."""
    frame = frame.copy()
    if "step_over_vanilla" not in frame:  # no times were asked for
        frame["step_over_vanilla"] = float("nan")
    group = ["network", "layers", "batch", "size"]
    vanilla = frame[frame.peer == BASELINE].set_index(group)
    index = pd.MultiIndex.from_frame(frame[group])
    for column in ("kept_bytes", "resident_bytes"):
        base = vanilla[column].reindex(index).to_numpy()
        frame[column.replace("_bytes", "_times_less")] = base / frame[column]
    frame["peak_over_inference"] = frame.peak_bytes / frame.inference_bytes
    return frame


def markdown(frame: pd.DataFrame) -> str:
    """One table, a row per network, depth, batch and peer; the batch is said where there are several."""
    table = ratios(frame)
    shown = pd.DataFrame(
        {
            "network": table.network,
            "last": table.layers,
            **({"batch": table.batch.astype(str)} if table.batch.nunique() > 1 else {}),
            "peer": table.peer,
            "kept (MiB)": (table.kept_bytes / 2**20).map("{:.2f}".format),
            "kept, times less": table.kept_times_less.map("{:.1f}".format),
            "peak (MiB)": (table.peak_bytes / 2**20).map("{:.0f}".format),
            "peak / inference": table.peak_over_inference.map("{:.2f}".format),
            "resident (MiB)": (table.resident_bytes / 2**20).map("{:.0f}".format),
            "step / vanilla": table.step_over_vanilla.map("{:.2f}".format),
        }
    )
    if "gradient_error" in table:
        shown["gradient error"] = table.gradient_error.map("{:.3f}".format)
    shown = shown.replace("nan", "—")
    return shown.to_markdown(index=False, disable_numparse=True) + "\n"


def draw(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Write memory.md, memory.png and memory.svg: kept bytes of each peer, a panel per network, depth and batch."""
    table = ratios(frame)
    panels = list(table[table.kept_bytes.notna()].groupby(["network", "layers", "batch"], sort=False))
    several = table.batch.nunique() > 1
    columns = max(1, min(3, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    slots = [max((len(rows) for _, rows in panels[n * columns : (n + 1) * columns]), default=1) for n in range(lines)]
    heights = [1.1 + 0.24 * count for count in slots]
    options = {"figsize": (5 * columns, sum(heights)), "height_ratios": heights, "squeeze": False}
    figure, axes = plt.subplots(lines, columns, **options)  # type: ignore[arg-type]
    for index, (axis, ((network, layers, batch), rows)) in enumerate(zip(axes.flat, panels, strict=False)):
        mebibytes = rows.kept_bytes / 2**20
        colours = ["#000000" if peer == BASELINE else "#d55e00" if peer == "asi" else "#8da0b8" for peer in rows.peer]
        bars = axis.barh(rows.peer, mebibytes, color=colours)
        axis.bar_label(bars, [f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in mebibytes], padding=3, fontsize=8)
        title = f"{network}, last {layers}{f', batch {batch}' if several else ''}"
        axis.set(title=title, xscale="log", xlabel="kept (MiB)")
        axis.set_xlim(mebibytes.min() / 2, mebibytes.max() * 4)
        axis.set_ylim(slots[index // columns] - 0.4, -0.6)  # bars of one thickness, the first on top
        axis.tick_params(axis="x", which="minor", labelbottom=False)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.tight_layout()
    paths = [folder / f"memory.{kind}" for kind in ("md", "png", "svg")]
    write_whole(paths[0], markdown(frame))
    for path in paths[1:]:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return paths


@contextmanager
def _panels(count: int, height: float, paths: list[Path], sharey: bool = False) -> Iterator[np.ndarray]:
    """Axes of a figure with so many panels, three a line; it is written to the paths at the end."""
    columns = min(3, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, height * lines), squeeze=False, sharey=sharey)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    yield axes.flat
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    for path in paths:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def draw_speed(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Write speed.png and speed.svg: time of each network's step over ordinary training's, a panel per depth."""
    steps = frame[(frame.section == "model step") & (frame.second == "vanilla")]
    panels = list(steps.groupby("case", sort=False))
    if not panels:
        return []
    paths = [folder / f"speed.{kind}" for kind in ("png", "svg")]
    with _panels(len(panels), 2.4, paths) as axes:
        for axis, (case, rows) in zip(axes, panels, strict=False):
            errors = [rows.ratio - rows.low, rows.high - rows.ratio]
            colours = ["#d55e00" if name == "asi" else "#8da0b8" for name in rows["first"]]
            axis.barh(rows["first"], rows.ratio, xerr=errors, color=colours, ecolor="#444444")
            axis.axvline(1, color="black", linewidth=1)
            axis.set(title=case, xlabel="time of a step / vanilla's")
            axis.invert_yaxis()
    return paths


def draw_depths(frame: pd.DataFrame, path: Path) -> None:
    """Draw test accuracy over the number of trained layers, a panel for each part of the memory."""
    parts = sorted(set(frame[frame.method.str.startswith("asi")].part))
    depths = sorted(set(frame.layers.map(str)), key=lambda layers: (layers == "all", layers.zfill(4)))
    with _panels(max(len(parts), 1), 3.2, [path], sharey=True) as axes:
        for axis, part in zip(axes, parts, strict=False):
            for method, rows in frame[(frame.part == part) | (frame.method == BASELINE)].groupby("method", sort=False):
                found = rows.groupby(rows.layers.map(str)).test_accuracy
                at = [depth for depth in depths if depth in found.groups]
                style = {"color": "black"} if method == BASELINE else {}
                axis.errorbar(at, found.mean()[at], found.sem()[at], marker="o", markersize=4, label=method, **style)
            axis.set(title=f"at 1/{part} of the memory", xlabel="trained convolutions, from the last", ylabel="test, %")
        axes[0].legend(fontsize=8)


def draw_batches(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Write speed_by_batch.png and .svg: time of a step over vanilla's by the batch, a panel per network and depth that
    has several batches, a line for each way, size of the images and number of threads.

    The band is vanilla over itself, lowest and highest pair: what lies in it is noise.
    """
    steps = frame[(frame.section == "batch step") & (frame.second == "vanilla")]
    panels = [panel for panel in steps.groupby("case", sort=False) if panel[1].batch.nunique() > 1]
    if not panels:
        return []
    paths = [folder / f"speed_by_batch.{kind}" for kind in ("png", "svg")]
    with _panels(len(panels), 3.2, paths, sharey=True) as axes:
        for axis, (case, rows) in zip(axes, panels, strict=False):
            named: set[str] = set()
            for (way, _, _), points in rows.groupby(["first", "size", "threads"], sort=False):
                points = points.sort_values("batch")
                label = "_" if str(way) in named else "vanilla over itself" if way == BASELINE else way
                named.add(str(way))
                if way == BASELINE:
                    axis.fill_between(points.batch, points.low, points.high, color="#cccccc", alpha=0.6, label=label)
                else:
                    style = "-" if str(way) in _COLOURS else "--"  # dashed: a way of the one of the same colour
                    colour = _COLOURS[str(way).split(",")[0].split(" in ")[0]]
                    axis.plot(points.batch, points.ratio, style, marker="o", markersize=4, color=colour, label=label)
            axis.axhline(1, color="black", linewidth=1)
            batches = sorted(set(rows.batch))
            axis.set_xscale("log", base=2)
            axis.set_xticks(batches, [str(batch) for batch in batches])
            axis.set(title=case.replace("last all", "all layers"), xlabel="batch", ylabel="time / vanilla's")
        axes[0].legend(fontsize=8)
    return paths
