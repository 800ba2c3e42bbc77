"""Plans of runs: what is written is what is read, and plans only grow."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiment import ExperimentError, Run, add_planned, find_planned

RUN = Run("classification", "A", "mcunet", "pets", "asi", 2, 233)
OTHERS = [replace(RUN, layers="all"), replace(RUN, seed=1), replace(RUN, dataset="cub200"), replace(RUN, setup="B")]


def test_plans_grow_and_hold_each_run_once(tmp_path):
    assert find_planned(tmp_path) == []
    add_planned(tmp_path, [RUN, RUN])
    assert find_planned(tmp_path) == [RUN]
    add_planned(tmp_path, [*OTHERS, RUN])
    found = find_planned(tmp_path)
    assert len(found) == 5
    assert set(found) == {RUN, *OTHERS}
    assert len(list(tmp_path.rglob("planned.json"))) == 3


def test_a_plan_lies_beside_the_runs_it_is_of(tmp_path):
    add_planned(tmp_path, [RUN])
    (path,) = tmp_path.rglob("planned.json")
    assert path.parent in RUN.folder(tmp_path).parents
    assert json.loads(path.read_text())["method/layers/seed"] == [["asi", 2, 233]]


def test_nothing_new_writes_nothing(tmp_path):
    add_planned(tmp_path, [RUN, OTHERS[1]])
    (path,) = tmp_path.rglob("planned.json")
    before = path.stat().st_ino
    lock = path.with_name(".planned.json.lock")
    lock.unlink()
    lock.mkdir()  # stands for a folder in which nothing can be written
    add_planned(tmp_path, [RUN])
    assert path.stat().st_ino == before
    with pytest.raises(ExperimentError, match=r"planned\.json cannot be written"):
        add_planned(tmp_path, [OTHERS[0]])


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"run": {"task": "x"}, "method/layers/seed": []}'])
def test_a_damaged_plan_is_refused(tmp_path, text):
    add_planned(tmp_path, [RUN])
    (path,) = tmp_path.rglob("planned.json")
    path.write_text(text)
    for attempt in (lambda: find_planned(tmp_path), lambda: add_planned(tmp_path, OTHERS)):
        with pytest.raises(ExperimentError, match=r"planned\.json is not a plan"):
            attempt()


def test_a_plan_with_an_impossible_run_is_refused(tmp_path):
    add_planned(tmp_path, [RUN])
    (path,) = tmp_path.rglob("planned.json")
    path.write_text(path.read_text().replace('"asi", 2', '"asi", 0'))
    with pytest.raises(ExperimentError, match="layers is 0"):
        find_planned(tmp_path)


@pytest.mark.slow
def test_simultaneous_writers_lose_nothing(tmp_path):
    script = "import sys; from pathlib import Path; from experiment import Run, add_planned\n"
    script += "for seed in range(30): add_planned(Path(sys.argv[1]), [Run('c', 'A', 'm', 'd', sys.argv[2], 2, seed)])"
    root = Path(__file__).parents[2]
    writers = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), f"method{number}"], cwd=root)
        for number in range(4)
    ]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert len(find_planned(tmp_path)) == 4 * 30
