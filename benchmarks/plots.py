"""The memory table as a plot and as Markdown."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd

from experiment.files import write_whole

mpl.use("Agg")
import matplotlib.pyplot as plt

BASELINE = "vanilla"


def ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """Per row: kept bytes of vanilla over the row's, peak over the row's inference peak, resident over vanilla's."""
    frame = frame.copy()
    if "failed" not in frame:
        frame["failed"] = None
    group = ["network", "layers", "batch", "size"]
    vanilla = frame[frame.peer == BASELINE].set_index(group)
    index = pd.MultiIndex.from_frame(frame[group])
    for column in ("kept_bytes", "resident_bytes"):
        base = vanilla[column].reindex(index).to_numpy()
        frame[column.replace("_bytes", "_times_less")] = base / frame[column]
    frame["peak_over_inference"] = frame.peak_bytes / frame.inference_bytes
    return frame


def markdown(frame: pd.DataFrame) -> str:
    """One table, a row per network, depth and peer."""
    table = ratios(frame)
    shown = pd.DataFrame(
        {
            "network": table.network,
            "last": table.layers,
            "peer": table.peer,
            "kept (MiB)": (table.kept_bytes / 2**20).map("{:.2f}".format),
            "kept, times less": table.kept_times_less.map("{:.1f}".format),
            "peak (MiB)": (table.peak_bytes / 2**20).map("{:.0f}".format),
            "peak / inference": table.peak_over_inference.map("{:.2f}".format),
            "resident (MiB)": (table.resident_bytes / 2**20).map("{:.0f}".format),
            "step / vanilla": table.step_over_vanilla.map("{:.2f}".format),
        }
    ).replace("nan", "—")
    return shown.to_markdown(index=False, disable_numparse=True) + "\n"


def draw(frame: pd.DataFrame, folder: Path) -> list[Path]:
    """Write memory.md, memory.png and memory.svg; kept bytes against step time, a panel per network and depth."""
    table = ratios(frame)
    table = table[table.failed.isna() & table.step_over_vanilla.notna()]
    panels = list(table.groupby(["network", "layers"], sort=False))
    columns = max(1, min(3, len(panels)))
    lines = -(-len(panels) // columns) or 1
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.6 * lines), squeeze=False)
    peers = list(dict.fromkeys(table.peer))
    colours = {peer: plt.get_cmap("tab20")(index % 20) for index, peer in enumerate(peers)}
    for axis, ((network, layers), rows) in zip(axes.flat, panels, strict=False):
        for row in rows.itertuples():
            axis.scatter(row.kept_times_less, row.step_over_vanilla, color=colours[row.peer], label=row.peer, s=42)
        axis.set(title=f"{network}, last {layers}", xscale="log", yscale="log")
        axis.set(xlabel="kept bytes, times less than vanilla", ylabel="step time / vanilla")
        axis.grid(alpha=0.3, which="both")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    marks = {label: mark for axis in axes.flat for mark, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.tight_layout()
    figure.legend(marks.values(), marks, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=5, frameon=False)
    paths = [folder / f"memory.{kind}" for kind in ("md", "png", "svg")]
    write_whole(paths[0], markdown(frame))
    for path in paths[1:]:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return paths
