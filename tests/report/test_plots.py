"""The figure: what is drawn where, and that nothing lies over anything else."""

from __future__ import annotations

import itertools

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Annotation

from report.plots import LOOKS, MARKER, _draw, compared, looks_of, pareto_figure, published_figure
from report.published import Point
from report.summary import Group, Reported, summarise

GROUP = Group("classification", "A", "mcunet", "pets")


def marks(axes):
    """Colour of the face and position of every mark with a coloured edge."""
    single = [line for line in axes.lines if len(line.get_xdata()) == 1 and line.get_markersize() == MARKER]
    return {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])): to_hex(line.get_markerfacecolor())
        for line in single
        if to_hex(line.get_markeredgecolor()) != "#ffffff"
    }


def annotations(axes):
    return [child for child in axes.get_children() if isinstance(child, Annotation)]


@pytest.fixture
def trade_off(write):
    """One dominated point in memory (asi at 4 layers), another in FLOPs (vanilla at 2 layers)."""
    return [
        write("vanilla", 2, test=0.7, memory=4 * 2**20, flops=4000),
        write("vanilla", 4, test=0.8, memory=8 * 2**20, flops=8000),
        write("asi", 2, test=0.7, memory=2**20, flops=2000),
        write("asi", 4, test=0.69, memory=2 * 2**20, flops=1000),
    ]


def test_dominated_points_are_hollow(trade_off):
    left, right = _draw(summarise(trade_off), GROUP).axes
    black, vermillion, hollow = LOOKS["vanilla"][0].lower(), LOOKS["asi"][0].lower(), "#ffffff"
    assert marks(left) == {(4, 70): hollow, (8, 80): black, (1, 70): vermillion, (2, 69): hollow}
    assert marks(right) == {(4000, 70): hollow, (8000, 80): black, (2000, 70): vermillion, (1000, 69): vermillion}


def test_curves_run_in_the_order_of_cost(trade_off):
    left, right = _draw(summarise(trade_off), GROUP).axes
    curves = [[list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) > 1] for axes in (left, right)]
    assert curves == [[[4, 8], [1, 2]], [[4000, 8000], [1000, 2000]]]


@pytest.mark.slow
def test_axes_and_title(trade_off):
    figure = _draw(summarise(trade_off), GROUP)
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "log"]
    assert figure.get_suptitle() == "mcunet on pets, setup A, seed 0"


@pytest.mark.parametrize("shares", [(1.0,), (0.0,), (0.0, 1.0), (0.999, 1.0)])
def test_no_axis_of_accuracies_reaches_far_beyond_what_they_can_be(write, shares):
    figure = _draw(summarise([write("asi", place + 1, test=share) for place, share in enumerate(shares)]), GROUP)
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert -2 <= low < 100 * min(shares) <= 100 * max(shares) < high <= 102


def test_error_bars_are_one_standard_deviation(write):
    records = [write("asi", 2, seed=seed, test=test) for seed, test in enumerate((0.84, 0.86))] + [write("vanilla", 2)]
    axes = _draw(summarise(records), GROUP).axes[0]
    (bar,) = [collection.get_segments()[0] for collection in axes.collections]
    assert bar[:, 1] == pytest.approx([85 - 2**0.5, 85 + 2**0.5])


def many(write, count):
    source = np.random.default_rng(count)
    methods = ["vanilla", "gradient_filter_2", "svd_0.8", "hosvd_0.8", "asi"]
    for method, layers in itertools.product(methods, range(1, count + 1)):
        cost = int(10**6 * layers * 4.0 ** methods.index(method))
        yield write(method, layers, test=0.5 + 0.01 * layers + 0.02 * source.random(), memory=cost, flops=cost)


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 20])
def test_labels_cover_neither_each_other_nor_marks(write, count):
    figure = _draw(summarise(list(many(write, count))), GROUP)
    for axes in figure.axes:
        labels = annotations(axes)
        assert len(labels) > 5 * count / 2
        boxes = [label.get_window_extent() for label in labels]
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
        centres = [axes.transData.transform(point) for point in marks(axes)]
        assert not [1 for box in boxes for centre in centres if box.contains(*centre)]
        frame = axes.get_window_extent()
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_every_point_is_labelled_where_there_is_room(trade_off):
    for axes in _draw(summarise(trade_off), GROUP).axes:
        assert sorted(label.get_text() for label in annotations(axes)) == ["2", "2", "4", "4"]


@pytest.mark.slow
def test_legend_lies_below_the_axes_and_inside_the_figure(write):
    names = ["vanilla", *(f"gradient_filter_with_a_long_name_{patch}" for patch in range(2, 12)), "asi"]
    figure = _draw(summarise([write(name, 2, memory=place + 1) for place, name in enumerate(names)]), GROUP)
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0
    assert box.y1 <= min(axes.get_tightbbox().y0 for axes in figure.axes)
    assert {text.get_text() for text in legend.get_texts()} == {*names, "not dominated", "dominated"}


@pytest.mark.slow
@pytest.mark.parametrize("letters", [5, 90])
def test_the_panels_have_their_height_however_long_the_legend_is(write, letters):
    names = ["vanilla", *(f"{'a' * letters}_{number}" for number in range(12))]
    figure = _draw(summarise([write(name, 2, memory=place + 1) for place, name in enumerate(names)]), GROUP)
    assert all(axes.get_window_extent().height > 2.5 * figure.dpi for axes in figure.axes)


def test_every_method_looks_different():
    methods = ["vanilla", "svd_0.8", "asi", "lance", "other", *(f"hosvd_0.{energy}" for energy in range(3, 10))]
    looks = looks_of(methods)
    assert list(looks) == methods
    assert len({(look.colour, look.marker, look.dash) for look in looks.values()}) == len(methods)


def test_rows_that_cannot_be_drawn_are_counted(write):
    records = [write("vanilla", 2), write("asi", 2, memory=0), write("hosvd_0.8", 2, accuracy={})]
    left, right = _draw(summarise(records), GROUP).axes
    assert "(2 rows without" in left.get_xlabel()
    assert "(1 row without" in right.get_xlabel()
    assert len(marks(left)) == 1


def test_nothing_to_draw(write):
    files = pareto_figure(summarise([write("asi", 2, accuracy={})]), GROUP)
    assert files["png"].startswith(b"\x89PNG")


@pytest.mark.slow
def test_same_summary_same_bytes(trade_off):
    table = summarise(trade_off)
    first, second = pareto_figure(table, GROUP), pareto_figure(table, GROUP)
    assert first == second
    assert b"<dc:date>" not in first["svg"]


@pytest.mark.slow
def test_own_settings_are_neither_used_nor_changed(trade_off):
    table = summarise(trade_off)
    plain = pareto_figure(table, GROUP)
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": None}):
        before = dict(mpl.rcParams)
        assert pareto_figure(table, GROUP) == plain
        assert dict(mpl.rcParams) == before


@pytest.fixture
def points():
    """Published points, one of unknown depth and one without FLOPs."""
    return [
        Point(1, "asi", Reported(50.0, 2**19, 500)),
        Point("unknown", "asi", Reported(60.0, 2**22, 900)),
        Point(2, "hosvd_0.8", Reported(65.0, 2**30)),
    ]


def test_published_points_are_drawn_beside_the_measured(trade_off, points):
    left, right = _draw(summarise(trade_off), GROUP, compared(summarise(trade_off)), points).axes
    crosses = [
        {
            (float(x), float(y))
            for line in axes.lines
            if line.get_marker() == "x"
            for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
        }
        for axes in (left, right)
    ]
    assert crosses == [{(0.5, 50), (4, 60), (1024, 65)}, {(500, 50), (900, 60)}]
    assert left.get_xlim()[1] > 1024
    assert set(marks(left)) == {(4, 71), (8, 81), (1, 71), (2, 70)}  # validation accuracy, a point above the test's
    assert set(marks(right)) == {(2000, 71), (4000, 81), (1000, 71), (500, 70)}  # the papers' count, half the corrected


@pytest.mark.slow
def test_the_figure_of_published_points_is_a_picture(trade_off, points):
    files = published_figure(summarise(trade_off), GROUP, points)
    assert files["png"].startswith(b"\x89PNG")
    assert files == published_figure(summarise(trade_off), GROUP, points)
