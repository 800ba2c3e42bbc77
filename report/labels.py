"""Labels beside points of a figure, none over another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

# Where a label may stand, in points from its mark, the best first.
NEAR = ((0, 9), (0, -9), (8, 6), (-8, 6), (8, -6), (-8, -6), (9, 0), (-9, 0))
FAR = tuple((1.45 * x, 1.45 * y) for x, y in NEAR)
MARK = 7.0
FONT_SIZE = 8


@dataclass(frozen=True)
class Label:
    """A text for the mark at (x, y) in data coordinates, whose error bar reaches `bar` up and down (NaN: none).

    Important ones choose their place first, and may stand further off.
    """

    x: float
    y: float
    bar: float
    text: str
    colour: tuple[float, ...]
    important: bool


def place_labels(axes: Axes, labels: Sequence[Label]) -> list[Annotation]:
    """Write the labels of a finished layout; one that would cover a mark or another label is left out.

    Among the free places, one clear of error bars and curves is taken first.
    """
    scale = axes.figure.dpi / 72
    frame = axes.get_window_extent()
    centres = {label: axes.transData.transform((label.x, label.y)) for label in labels}
    taken = [_box(x, y, MARK * scale, MARK * scale) for x, y in centres.values()]
    bars = [_bar(axes, label) for label in labels if label.bar > 0]
    paths = [(line.get_transform(), line.get_path()) for line in axes.lines]
    curves = [transform.transform_path(path) for transform, path in paths if len(path) > 1]
    written = []
    for label in sorted(labels, key=lambda label: (not label.important, label.x, label.y, label.text)):
        note = _annotation(axes, label)
        size = note.get_window_extent()
        x, y = centres[label]
        boxes = [
            (place, _box(x + scale * place[0], y + scale * place[1], size.width, size.height))
            for place in (NEAR + FAR if label.important else NEAR)
        ]
        free = [(place, box) for place, box in boxes if _inside(box, frame) and not box.count_overlaps(taken)]
        if not free:
            note.remove()
            continue
        place, box = min(free, key=lambda option: _clutter(option[1].padded(scale), bars, curves))
        note.set_position(place)
        taken.append(box)
        written.append(note)
    return written


def _annotation(axes: Axes, label: Label) -> Annotation:
    return axes.annotate(
        label.text,
        (label.x, label.y),
        xytext=NEAR[0],
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=FONT_SIZE,
        color=label.colour,
        path_effects=[withStroke(linewidth=1.8, foreground="white")],
        zorder=4,
    )


def _box(x: float, y: float, width: float, height: float) -> Bbox:
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


def _bar(axes: Axes, label: Label) -> Bbox:
    ends = axes.transData.transform([(label.x, label.y - label.bar), (label.x, label.y + label.bar)])
    return Bbox(ends).padded(axes.figure.dpi / 72)


def _clutter(box: Bbox, bars: Sequence[Bbox], curves: Sequence[Path]) -> int:
    return 3 * box.count_overlaps(bars) + sum(curve.intersects_bbox(box, filled=False) for curve in curves)


def _inside(box: Bbox, frame: Bbox) -> bool:
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
