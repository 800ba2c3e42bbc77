"""Axes of figures that several kinds of figures have."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.axes import Axes

MARGIN = 2.0  # per cent, as much as a marker needs


def within_percent(axes: Axes) -> None:
    """Let a vertical axis of per cents, on which all is drawn, reach no further beyond 0 and 100 than a marker does."""
    low, high = axes.get_ylim()
    if low < 0 or high > 100:
        low, high = max(low, -MARGIN), min(high, 100 + MARGIN)
        axes.set_ylim(low, high)
        axes.set_yticks([tick for tick in axes.get_yticks() if max(low, 0) <= tick <= min(high, 100)])
