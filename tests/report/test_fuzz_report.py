"""Folders of records of which some are damaged in any way: the report shows the others, or ends in one line."""

import json

import pytest
from fuzzing import SECONDS, damaged, edited
from hypothesis import given
from hypothesis import strategies as st

from experiment import ExperimentError, Record, Run
from report.summary import find_runs, group_records, read_planned, summarise

RUNS = [
    Run("classification", "A", "mcunet", "pets", method, 2, seed) for method in ("vanilla", "asi") for seed in (0, 1)
]
MEMORY = {"activation_formula": 100, "saved_measured": 300, "peak_measured": 500, "peak_inference": 50}


def write(root):
    texts = []
    for run in RUNS:
        run.folder(root).mkdir(parents=True, exist_ok=True)
        accuracy = {"val_best": 0.6, "val_last": 0.5, "test": 0.55}
        record = Record(run, accuracy, MEMORY, {"paper": 10, "corrected": 20}, {"step_median": 0.1, "total": 9.0})
        texts.append(record.save(run.folder(root)).read_text())
    return texts


@pytest.mark.slow
@SECONDS
@given(data=st.data(), which=st.integers(0, len(RUNS) - 1))
def test_one_bad_record_hides_no_other(tmp_path_factory, data, which):
    root = tmp_path_factory.mktemp("runs")
    good = write(root)[which]
    path = RUNS[which].folder(root) / "result.json"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(good.encode())))
    else:
        content = data.draw(edited(json.loads(good)))
        path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
    records = [record for _, record in find_runs(root)]
    others = {run for index, run in enumerate(RUNS) if index != which}
    assert others <= {record.run for record in records}
    for group in group_records(records).values():
        table = summarise(group)
        assert int(table["n"].sum()) == len(group)


@pytest.mark.slow
@SECONDS
@given(content=damaged(b'{"run": {"task": "classification"}, "method/layers/seed": [["asi", 2, 1]]}'))
def test_a_bad_plan_hides_no_record(tmp_path_factory, content):
    root = tmp_path_factory.mktemp("runs")
    write(root)
    (RUNS[0].folder(root).parents[2] / "planned.json").write_bytes(content)
    assert {record.run for _, record in find_runs(root)} == set(RUNS)
    assert all(isinstance(run, Run) for run in read_planned(root))


@SECONDS
@given(content=damaged(b"{}"))
def test_a_folder_of_nothing_but_one_bad_record_is_one_line(tmp_path_factory, content):
    root = tmp_path_factory.mktemp("runs")
    (root / "result.json").write_bytes(content)
    try:
        records = [record for _, record in find_runs(root)]
    except ExperimentError as error:
        told = str(error)
    assert str(root) in told
    assert len(told.splitlines()) == 1
    assert "records" not in locals()
