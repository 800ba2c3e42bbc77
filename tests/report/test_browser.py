"""The page in a browser: what is sorted, filtered, switched, pointed at and clicked is what a reader then sees."""

from __future__ import annotations

import json

import pytest
from browser import CHROMIUM, browser
from generated import write_runs

from experiment.plan import add_planned
from report.page import page
from report.payload import compose, listed_runs
from report.summary import find_runs, group_records, read_planned, summarise
from report.writing import summaries

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here; apt-get install chromium")
EVIL = "<img src=x onerror='document.title = \"broken\"'>"
CELLS = "[...document.querySelectorAll('#setup tbody tr')].map(row => [...row.children].map(cell => cell.innerText))"
HEADS = "[...document.querySelectorAll('#setup thead th')].map(cell => cell.dataset.key)"


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The folder of a page of 150 runs, one of which failed, and their summaries."""
    root = tmp_path_factory.mktemp("page")
    runs = root / "runs"
    write_runs(runs, 150, seeds=2, epochs=3)
    found = find_runs(runs)
    failed = found[0][1].run.__class__("classification", "A", "mcunet", "cifar10", "lance", 2, 0)
    add_planned(runs, [failed])
    folder = failed.folder(runs)
    folder.mkdir(parents=True)
    (folder / "failure.log").write_text(EVIL)
    waiting = read_planned(runs)
    groups = group_records(record for _, record in found)
    made = {group: summarise(records) for group, records in groups.items()}
    (first, *_) = groups
    made[first] = summarise(groups[first], planned=[failed])
    content = compose(made, listed_runs(found, waiting), {}, "vanilla", ("there", summaries(runs, "vanilla")))
    (root / "index.html").write_text(page(content))
    return root, made


@pytest.fixture(scope="module")
def tab(tables):
    """A browser with the page open; in the end nothing was asked of a network, and no script has failed."""
    root, _ = tables
    with browser(root / "profile") as opened:
        yield opened
        assert opened.errors == []
        assert {address.partition(":")[0] for address in opened.requested} <= {"file", "about", "data", "blob"}


@pytest.fixture
def shown(tables, tab):
    """The page, as it is when it is opened."""
    tab.size(1400)
    tab.open(tables[0] / "index.html")
    assert any(address.endswith("/index.html") for address in tab.requested)  # they are noted
    return tab


def column(tab, key):
    place = tab.run(HEADS).index(key)
    return [row[place] for row in tab.run(CELLS)]


def expected(tables, key, down):
    """Values of a column of all summaries as a sort has to show them, what is missing last."""
    values = [value for table in tables[1].values() for value in table[key] if value == value]
    return sorted(values, reverse=down)


@pytest.mark.slow
def test_a_click_on_a_heading_sorts_and_another_turns_it(shown, tables):
    for down in (True, False):
        shown.point("document.querySelector('#setup th[data-key=saved_measured_bytes] button')")
        texts = [text for text in column(shown, "saved_measured_bytes") if text != "—"]
        values = expected(tables, "saved_measured_bytes", down)
        assert texts == [f"{value / 2**20:#.3g}".rstrip(".") for value in values][: len(texts)]
        head = "document.querySelector('#setup th[data-key=saved_measured_bytes]').ariaSort"
        assert shown.run(head) == ("descending" if down else "ascending")


@pytest.mark.slow
def test_filters_leave_the_rows_that_are_asked_for(shown, tables):
    pick = (
        "const s = [...document.querySelectorAll('#setup select')].find(s => s.previousSibling.textContent === '%s');"
    )
    change = "s.value = '%s'; s.dispatchEvent(new Event('change'))"
    for label, value in (("Method", "hosvd_0.8"), ("Layers", "4")):
        shown.run(f"{{ {pick % label} {change % value} }}")
    assert set(column(shown, "method")) == {"hosvd_0.8"}
    assert set(column(shown, "layers")) == {"4"}
    rows = [row for table in tables[1].values() for row in table.to_dict("records")]
    assert len(shown.run(CELLS)) == sum(row["method"] == "hosvd_0.8" and row["layers"] == 4 for row in rows)
    for label in ("Method", "Layers"):
        shown.run(f"{{ {pick % label} {change % ''} }}")
    shown.run(
        "{ const s = document.getElementById('search'); s.value = 'CIFAR100 svd'; s.dispatchEvent(new Event('input')) }"
    )
    assert {tuple(row[:3]) for row in shown.run(CELLS)} == {
        ("svd_0.8", "mcunet", "cifar100"),
        ("hosvd_0.8", "mcunet", "cifar100"),
    }


@pytest.mark.slow
def test_the_switch_compares_at_equal_accuracy_and_columns_can_be_chosen(shown):
    assert "saved_measured_times_less" in shown.run(HEADS)
    shown.point("document.querySelector('#results .mode button[data-key=accuracy]')")
    heads = shown.run(HEADS)
    assert "equal_accuracy_saved_times_less" in heads
    assert "saved_measured_times_less" not in heads
    assert "At equal accuracy" in shown.run("document.getElementById('bests').innerText")
    shown.run("document.querySelector('#setup .chooser').open = true")
    shown.until("document.querySelector('.chooser input[value=flops_paper]')")
    shown.point("document.querySelector('.chooser input[value=flops_paper]')")
    assert "flops_paper" in shown.run(HEADS)


@pytest.mark.slow
def test_a_point_has_a_tooltip_and_a_click_on_it_opens_its_runs(shown):
    shown.run("document.getElementById('pareto').scrollIntoView()")
    shown.until("document.getElementById('pareto').dataset.drawn")
    point = "document.querySelector('#pareto .trace.scatter .points path')"
    shown.point(point, click=False)
    shown.until("document.querySelector('#pareto .hoverlayer .hovertext')")
    assert "vanilla, layers 1" in shown.run("document.querySelector('#pareto .hovertext').textContent")
    shown.point(point)
    shown.until("document.querySelector('#run[open] .tiles')")
    assert shown.run("document.querySelector('#run h2').innerText") == "vanilla, layers 1"
    assert shown.run("document.querySelectorAll('#run .switch button').length") == 2  # seeds


@pytest.mark.slow
def test_points_of_a_plot_are_reached_by_keyboard(shown):
    shown.run("document.getElementById('pareto').focus()")
    shown.until("document.getElementById('pareto').dataset.drawn")
    pressed = {"ArrowRight": 39, "ArrowDown": 40, "ArrowLeft": 37, "ArrowUp": 38}
    said = []
    for key in ("ArrowRight", *pressed):
        shown.key(key, pressed[key])
        shown.until(
            f"![{json.dumps(said[-1] if said else '')}].includes(document.querySelector('.unseen').textContent)"
        )
        said.append(shown.run("document.querySelector('.unseen').textContent"))
    names = [text.partition(",")[0] for text in said]
    assert names == ["vanilla", "vanilla", "gradient_filter_r2", "gradient_filter_r2", "vanilla"]
    assert said[4] == said[0] != said[1]
    shown.key("Enter", 13)
    shown.until("document.querySelector('#run[open] .tiles')")
    assert shown.run("document.querySelector('#run h2').innerText") == "vanilla, layers 1"


@pytest.mark.slow
def test_a_run_is_reached_by_keyboard_and_shows_what_it_left(shown):
    shown.run("document.querySelector('#setup tbody button').focus()")
    shown.key("ArrowDown", 40)
    shown.run("document.activeElement.click()")
    shown.until("document.querySelector('#run[open] .tiles')")
    text = shown.run("document.getElementById('run').innerText")
    for part in (
        "gradient_filter_r2, layers 1",
        " \u00d7 ".join(["8", "12", "4", "4"]),
        "81.0 %",
        "from blocks.0.conv",
        "All 40 modules",
        "learning rate",
        "made up",
    ):
        assert part in text
    shown.key("Escape", 27)
    shown.until("!document.querySelector('#run[open]')")


@pytest.mark.slow
def test_a_failed_run_has_its_log_which_is_text(shown):
    shown.point("[...document.querySelectorAll('#states tbody button')].find(b => b.innerText === 'lance')")
    shown.until("document.querySelector('#run[open] pre')")
    assert shown.run("document.querySelector('#run pre').textContent") == EVIL
    assert shown.run("document.title") == "Results"


@pytest.mark.slow
def test_dark_by_the_system_or_by_choice(shown):
    ground = "getComputedStyle(document.body).backgroundColor"
    light = shown.run(ground)
    shown.size(1400, dark=True)
    dark = shown.run(ground)
    assert dark != light
    shown.point("document.querySelector('#theme button[data-key=light]')")
    assert shown.run(ground) == light
    shown.size(1400)
    shown.point("document.querySelector('#theme button[data-key=dark]')")
    assert shown.run(ground) == dark


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 390])
def test_nothing_is_cut_off(shown, tables, width):
    shown.size(width)
    shown.open(tables[0] / "index.html")
    assert shown.run("document.documentElement.scrollWidth") <= width
    table = "document.querySelector('#setup .wide')"
    assert shown.run(f"{table}.scrollWidth <= {table}.clientWidth")
    assert shown.run(f"{table}.querySelectorAll('tbody tr').length") == sum(map(len, tables[1].values()))
