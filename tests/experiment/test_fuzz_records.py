"""Records, plans, identities and folders of them, edited in any way: a right result or the package's own error."""

import json
import math
from pathlib import Path

import pytest
from fuzzing import ANYTHING, SECONDS, assert_told, damaged, edited
from hypothesis import given

from experiment import ExperimentError, Record, Run, RunFolder, Status, add_planned, find_planned
from experiment.budget import budget_bytes
from experiment.record import is_result

RUN = Run("classification", "A", "mcunet", "pets", "asi", 2, 233)
GOOD = {
    "schema": 1,
    "status": "done",
    "run": {"task": "classification", "setup": "A", "model": "mcunet", "dataset": "pets"}
    | {"method": "asi", "layers": 2, "seed": 233},
    "accuracy": {"test": 0.5},
    "memory_bytes": {"activation_formula": 100},
    "flops": {"paper": 5},
    "time_s": {"total": 1.5},
    "provenance": {"config_hash": "abc"},
    "recipe": {"epochs": 3},
}
PLAN = {"run": {"task": "classification", "setup": "A", "model": "mcunet", "dataset": "pets"}} | {
    "method/layers/seed": [["asi", 2, 233], ["vanilla", "all", 1]]
}


def written(folder, name, content):
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
    return path


def assert_record(path):
    try:
        record = Record.load(path)
    except ExperimentError as error:
        assert_told(error, path)
        assert not is_result(path)
        return
    assert is_result(path)
    assert all(
        isinstance(value, int | float) and math.isfinite(value)
        for part in (record.accuracy, record.memory_bytes, record.flops, record.time_s)
        for value in part.values()
    )
    assert record.run.folder(Path("runs")).parts[0] == "runs"
    assert ".." not in record.run.folder(Path("runs")).parts


@pytest.mark.slow
@SECONDS
@given(content=edited(GOOD))
def test_an_edited_record_is_a_record_or_refused(tmp_path, content):
    assert_record(written(tmp_path, "result.json", content))


@SECONDS
@given(content=damaged(json.dumps(GOOD).encode()))
def test_a_damaged_record_is_a_record_or_refused(tmp_path, content):
    assert_record(written(tmp_path, "result.json", content))


@pytest.mark.slow
@SECONDS
@given(content=edited(GOOD))
def test_a_budget_of_an_edited_record_is_a_number_or_refused(tmp_path, content):
    written(tmp_path, "result.json", content)
    try:
        found = budget_bytes(None, str(tmp_path), 1)
    except ExperimentError:
        return
    assert math.isfinite(found)


@pytest.mark.slow
@SECONDS
@given(content=edited(PLAN))
def test_an_edited_plan_is_a_plan_or_refused(tmp_path, content):
    path = written(tmp_path, "planned.json", content)
    try:
        found = find_planned(tmp_path)
    except ExperimentError as error:
        assert_told(error, path)
        return
    assert all(isinstance(run, Run) for run in found)


@SECONDS
@given(content=damaged(json.dumps(PLAN).encode()))
def test_a_damaged_plan_is_never_written_over(tmp_path, content):
    folder = RUN.folder(tmp_path).parents[2]
    folder.mkdir(parents=True, exist_ok=True)
    path = written(folder, "planned.json", content)
    try:
        add_planned(tmp_path, [RUN])
    except ExperimentError as error:
        assert_told(error, path)
        assert path.read_bytes() == content
        return
    assert RUN in find_planned(tmp_path)


@pytest.mark.slow
@SECONDS
@given(content=edited({"model": {"layers": 2}, "seed": 1}))
def test_a_run_folder_with_an_edited_identity_is_one_or_refused(tmp_path, content):
    path = written(tmp_path, "identity.json", content)
    (tmp_path / "last.ckpt").touch()  # else there is nothing to be lost
    folder = RunFolder(tmp_path, {"model": {"layers": 2}, "seed": 1}, "result.json", last="last.ckpt")
    try:
        assert folder.status() is Status.INTERRUPTED
    except ExperimentError as error:
        assert_told(error, path.parent)


@SECONDS
@given(content=damaged(b'{"model": {"layers": 2}, "seed": 1}'))
def test_a_run_folder_with_a_damaged_identity_is_one_or_refused(tmp_path, content):
    (tmp_path / "identity.json").write_bytes(content)
    (tmp_path / "last.ckpt").touch()
    folder = RunFolder(tmp_path, {"model": {"layers": 2}, "seed": 1}, "result.json", last="last.ckpt")
    try:
        assert folder.status() is Status.INTERRUPTED
    except ExperimentError:
        return
    assert json.loads(content) == {"model": {"layers": 2}, "seed": 1}


@pytest.mark.slow
@SECONDS
@given(names=ANYTHING, layers=ANYTHING, seed=ANYTHING)
def test_a_run_of_any_names_is_below_the_folder_of_all_runs_or_refused(names, layers, seed):
    try:
        run = Run("classification", "A", names, "pets", "asi", layers, seed)
    except ValueError:
        return
    folder = run.folder(Path("/runs"))
    assert folder == Path(*folder.parts)
    assert folder.is_relative_to("/runs")
    assert ".." not in folder.parts


def test_the_good_ones_are_good(tmp_path):
    assert Record.load(written(tmp_path, "result.json", GOOD)).run == RUN
    written(tmp_path, "planned.json", PLAN)
    assert RUN in find_planned(tmp_path)
    with pytest.raises(ExperimentError):
        Record.load(tmp_path / "nowhere.json")
