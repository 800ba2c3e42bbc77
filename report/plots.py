"""Pareto figures: accuracy against activation memory and against FLOPs, one curve per method."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from experiment.axes import within_percent
from report.labels import Label, place_labels
from report.methods import family
from report.metrics import metrics_in
from report.pareto import dominated
from report.published import UNKNOWN, Point
from report.summary import Group
from report.tables import engineering, recipes_differ, same_seeds, seed_list

# Okabe and Ito's palette, told apart by people of every colour vision; shapes tell the families apart in grey.
LOOKS = {
    "vanilla": ("#000000", "o"),
    "gradient_filter": ("#E69F00", "s"),
    "svd": ("#56B4E9", "^"),
    "hosvd": ("#0072B2", "D"),
    "asi": ("#D55E00", "v"),
    "wasi": ("#CC79A7", "p"),
}
OTHER_LOOKS = (("#009E73", "P"), ("#B8A800", "X"), ("#777777", "h"))
DASHES = ("-", "--", ":", "-.")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "svg.hashsalt": "report",
    "axes.unicode_minus": True,
}
SIZE, DPI = (9.0, 4.6), 200
ROWS = 4  # of a legend, for which a figure of this size has room
MARKER, PRINTED, FADED = 5.5, 3.5, 0.45


@dataclass(frozen=True)
class Panel:
    """What one panel shows on its horizontal axis: a column of the summary, in which unit and words."""

    column: str
    title: str
    unit: float
    tick: FuncFormatter


@dataclass(frozen=True)
class Look:
    """How one method's curve is drawn."""

    colour: tuple[float, float, float]
    marker: str
    dash: str


def _plain(value: float, _position: int) -> str:
    return f"{value:g}" if 1e-4 <= value < 1e6 else f"{value:.0e}"


PANELS = (
    Panel("activation_formula_bytes", "Activation memory by formula (MiB)", 2**20, FuncFormatter(_plain)),
    Panel(
        "flops_corrected",
        "FLOPs of a training step, corrected count",
        1,
        FuncFormatter(lambda value, _position: engineering(value).replace(".00", "").replace(".0", "")),
    ),
)


@dataclass(frozen=True)
class View:
    """What a figure shows: which accuracy (its key in the records), its name, and the panels."""

    accuracy: str
    title: str
    panels: tuple[Panel, ...]


COMPARED_PANELS = (  # as published, where FLOPs are in the papers' convention
    PANELS[0],
    replace(PANELS[1], column="flops_paper", title="FLOPs of a training step, papers' convention"),
)
PUBLISHED_COLUMNS = {"activation_formula_bytes": "memory_bytes", "flops_paper": "flops"}


def measured(table: pd.DataFrame) -> View:
    """Main accuracy against memory and corrected FLOPs."""
    metrics = metrics_in(table)
    return View(metrics.main, metrics.label, PANELS)


def compared(table: pd.DataFrame) -> View:
    """The accuracy that was published against memory and FLOPs in the papers' convention."""
    metrics = metrics_in(table)
    return View(metrics.published, metrics.published_label, COMPARED_PANELS)


def pareto_figure(table: pd.DataFrame, group: Group) -> dict[str, bytes]:
    """The figure of one summary as files: "png" and "svg", the same bytes for the same summary."""
    return _files(table, group, measured(table), ())


def published_figure(table: pd.DataFrame, group: Group, points: Sequence[Point]) -> dict[str, bytes]:
    """As `pareto_figure`, of what was published, with published points beside the measured ones."""
    return _files(table, group, compared(table), points)


def _files(table: pd.DataFrame, group: Group, view: View, points: Sequence[Point]) -> dict[str, bytes]:
    with matplotlib.style.context(["default", STYLE]):
        figure = _draw(table, group, view, points)
        return {
            "png": _file(figure, format="png", dpi=DPI),
            "svg": _file(figure, format="svg", metadata={"Date": None}),
        }


def _file(figure: Figure, **options: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, **options)
    return file.getvalue()


def _draw(table: pd.DataFrame, group: Group, view: View | None = None, points: Sequence[Point] = ()) -> Figure:
    view = view or measured(table)
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    table = table[table["n"] > 0]
    looks = looks_of(list(dict.fromkeys([*table["method"], *(point.method for point in points)])))
    panels = list(zip(figure.subplots(1, len(view.panels), sharey=True), view.panels, strict=True))
    labels = {axes: list(_draw_panel(axes, panel, table, looks, view.accuracy)) for axes, panel in panels}
    for axes, panel in panels:
        if points:
            labels[axes] += _draw_published(axes, panel, points, looks)
    within_percent(panels[0][0])  # which all panels share
    panels[0][0].set_ylabel(f"{view.title} (%)")
    recipes = ", different recipes" if recipes_differ(table) else ""
    figure.suptitle(f"{group}, {_seeds(table)}{recipes}", fontsize=11)
    _legend(figure, looks, bool(points))
    # Labels are placed in the final layout, so it must not move afterwards.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in labels:
        place_labels(axes, labels[axes])
    return figure


def _seeds(table: pd.DataFrame) -> str:
    if same_seeds(table):
        seeds = table["seeds"].iloc[0]
        listed = seed_list(seeds)
        return f"seed{'s' * (len(seeds) > 1)} {listed}" if len(listed) < 40 else f"{len(seeds)} seeds"
    low, high = table["n"].min(), table["n"].max()
    return f"{low} to {high} seeds a point" if low != high else f"n = {low}, seeds differ"


def looks_of(methods: Sequence[str]) -> dict[str, Look]:
    """A look for each method: colour and marker by family; settings of one family differ in lightness and dashes."""
    families = list(dict.fromkeys(map(family, methods)))
    others = [name for name in families if name not in LOOKS]
    known = LOOKS | {name: OTHER_LOOKS[place % len(OTHER_LOOKS)] for place, name in enumerate(others)}
    looks = {}
    for name in families:
        members = [method for method in methods if family(method) == name]
        for place, method in enumerate(members):
            colour, marker = known[name]
            looks[method] = Look(_lighter(colour, 0.65 * place / len(members)), marker, DASHES[place % len(DASHES)])
    return looks


def _lighter(colour: str, share: float) -> tuple[float, float, float]:
    red, green, blue = (part + (1 - part) * share for part in to_rgb(colour))
    return red, green, blue


def _draw_panel(
    axes: Axes, panel: Panel, table: pd.DataFrame, looks: dict[str, Look], accuracy: str
) -> Iterator[Label]:
    mean, std = f"{accuracy}_mean_percent", f"{accuracy}_std_percent"
    drawable = table[(table[panel.column] > 0) & table[mean].notna()]
    points = drawable.assign(cost=drawable[panel.column] / panel.unit)
    points["dominated"] = dominated(list(points["cost"]), list(points[mean]))
    _axis(axes, panel, list(points["cost"]), len(table) - len(points))
    for method, look in looks.items():
        curve = points[points["method"] == method].sort_values(["cost", mean], kind="stable")
        if len(curve):
            axes.plot(curve["cost"], curve[mean], look.dash, color=look.colour, lw=1.1, alpha=0.6)
        for row in curve.to_dict("records"):
            _draw_point(axes, row["cost"], row[mean], row[std], row["dominated"], look)
            yield Label(row["cost"], row[mean], row[std], str(row["layers"]), _ink(look), not row["dominated"])


def _ink(look: Look) -> tuple[float, ...]:
    return tuple(0.7 * part for part in look.colour)


def _draw_published(axes: Axes, panel: Panel, points: Sequence[Point], looks: dict[str, Look]) -> list[Label]:
    """Small crosses on a thin line; the axis reaches as far as they do."""
    costs = [(getattr(point.reported, PUBLISHED_COLUMNS[panel.column]) / panel.unit, point) for point in points]
    known = [(cost, point) for cost, point in costs if not math.isnan(cost)]
    there = [float(x) for line in axes.lines for x in np.atleast_1d(line.get_xdata())]
    _axis(axes, panel, [cost for cost, _ in known] + there, 0)
    for method, look in looks.items():
        curve = sorted((cost, point.reported.accuracy) for cost, point in known if point.method == method)
        if curve:
            axes.plot(
                *zip(*curve, strict=True), look.dash, color=look.colour, lw=0.7, alpha=0.5, marker="x", ms=PRINTED
            )
    return [
        Label(cost, point.reported.accuracy, math.nan, str(point.layers), _ink(looks[point.method]), False)
        for cost, point in known
        if point.layers != UNKNOWN
    ]


def _draw_point(axes: Axes, cost: float, accuracy: float, std: float, faded: bool, look: Look) -> None:
    alpha, front, face = (FADED, 3, "white") if faded else (1.0, 3.5, look.colour)
    colour = look.colour
    if not math.isnan(std):
        axes.errorbar(cost, accuracy, std, color=colour, alpha=alpha, capsize=2.2, elinewidth=0.9, zorder=front - 0.5)
    # A white disc below a faded point keeps the curve from showing through it.
    axes.plot(cost, accuracy, look.marker, ms=MARKER, color="white", zorder=front)
    axes.plot(cost, accuracy, look.marker, ms=MARKER, mfc=face, mec=colour, alpha=alpha, zorder=front + 0.1)


def _axis(axes: Axes, panel: Panel, costs: list[float], left_out: int) -> None:
    note = f"\n({left_out} row{'s' * (left_out > 1)} without these numbers not shown)" if left_out else ""
    axes.set_xlabel(panel.title + note)
    axes.margins(y=0.12)
    if not costs:
        axes.set_xticks([])
        return
    # At least a factor of four is shown, and the outermost points stand clear of the frame.
    low, high = math.log10(min(costs)), math.log10(max(costs))
    padding = max(0.06 * (high - low), (0.6 - (high - low)) / 2, 0.05)
    axes.set_xscale("log")
    axes.set_xlim(10 ** (low - padding), 10 ** (high + padding))
    span = high - low + 2 * padding
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if span > 2.5 else (1, 3) if span > 1.6 else (1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(panel.tick)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, looks: dict[str, Look], published: bool) -> None:
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, ms=MARKER, ls=look.dash, lw=1.1, label=method)
        for method, look in looks.items()
    ]
    for label, face in (("not dominated", "#555555"), ("dominated", "white")):
        handles.append(Line2D([], [], color="#555555", marker="o", ms=MARKER, mfc=face, ls="", label=label))
    handles[-1].set_alpha(0.7)
    if published:
        handles.append(Line2D([], [], color="#555555", marker="x", ms=PRINTED, ls="-", lw=0.7, label="published"))
    # About as many columns as fit side by side: a letter is some 0.075 inch wide, a handle as wide as nine letters.
    longest = max(len(str(handle.get_label())) for handle in handles)
    fitting = max(1, int(SIZE[0] / 0.075) // (longest + 9))
    columns = min(fitting, len(handles))
    further = max(0, math.ceil(len(handles) / columns) - ROWS)  # which take nothing away from the panels
    figure.set_size_inches(SIZE[0], SIZE[1] + 0.22 * further)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
