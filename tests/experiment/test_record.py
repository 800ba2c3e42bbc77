import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiment import ExperimentError, Record, Run

RUN = {
    "task": "classification",
    "setup": "A",
    "model": "mcunet",
    "dataset": "digits",
    "method": "asi",
    "layers": 2,
    "seed": 233,
}


def a_record(**run):
    return Record(
        run=Run(**RUN | run),
        accuracy={"val_best": 0.5, "val_last": 0.25, "test": 0.125},
        memory_bytes={"activation_formula": 1, "saved_measured": 2, "peak_measured": 3, "peak_inference": 4},
        flops={"paper": 10**13, "corrected": 7},
        time_s={"step_median": 0.1, "total": 9.0},
        provenance={"config_hash": "abc", "packages": {"torch": "2"}},
        loss={"train_last": 0.25},
    )


@pytest.mark.parametrize("layers", [2, "all"])
def test_a_saved_record_is_loaded_as_it_was(tmp_path, layers):
    record = a_record(layers=layers)
    assert Record.load(record.save(tmp_path)) == record


def test_the_file_has_the_keys_of_the_design(tmp_path):
    content = json.loads(a_record().save(tmp_path).read_text())
    assert list(content) == [
        *("schema", "status", "run", "accuracy", "memory_bytes", "flops", "time_s", "provenance"),
        *("recipe", "loss"),
    ]
    assert (content["schema"], content["status"], content["run"]) == (1, "done", RUN)
    assert (tmp_path / "result.json").is_file()


@pytest.mark.parametrize(
    ("run", "below"),
    [
        ({}, "classification/A/mcunet/digits/asi/layers2/seed233"),
        ({"layers": "all", "seed": 0}, "classification/A/mcunet/digits/asi/layersall/seed0"),
        ({"task": "segmentation", "method": "hosvd_0.8"}, "segmentation/A/mcunet/digits/hosvd_0.8/layers2/seed233"),
    ],
)
def test_the_folder_is_the_one_of_the_design(run, below):
    assert Run(**RUN | run).folder(Path("runs")) == Path("runs") / below


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "a/b"},
        {"model": ""},
        {"model": "a b"},
        {"model": "a\n"},
        {"model": None},
        {"setup": ".."},
        {"setup": "."},
        {"method": "../x"},
        {"layers": 0},
        {"layers": -1},
        {"layers": "2"},
        {"layers": True},
        {"layers": 2.0},
        {"seed": "1"},
        {"seed": False},
        {"seed": 1.0},
    ],
)
def test_a_run_of_bad_names_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Run(**RUN | wrong)


def without(*path):
    """Damage: a key is gone."""

    def damage(content):
        *outer, last = path
        for key in outer:
            content = content[key]
        del content[last]

    return damage


def changed(*path, to):
    """Damage: a key has another value."""

    def damage(content):
        *outer, last = path
        for key in outer:
            content = content[key]
        content[last] = to

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(changed("schema", to=2), id="schema 2"),
        pytest.param(changed("schema", to="1"), id="schema as text"),
        pytest.param(without("schema"), id="no schema"),
        pytest.param(changed("status", to="running"), id="not done"),
        pytest.param(without("status"), id="no status"),
        pytest.param(changed("accuracy", "test", to=float("nan")), id="NaN"),
        pytest.param(changed("flops", "paper", to=float("inf")), id="infinity"),
        pytest.param(changed("time_s", "total", to="9"), id="text for a number"),
        pytest.param(changed("memory_bytes", "saved_measured", to=None), id="null for a number"),
        pytest.param(changed("accuracy", "test", to=True), id="boolean for a number"),
        pytest.param(changed("accuracy", "test", to=97.0), id="percents for a share"),
        pytest.param(changed("accuracy", "test", to=-0.1), id="a share below 0"),
        pytest.param(changed("memory_bytes", "saved_measured", to=-1), id="bytes below 0"),
        pytest.param(changed("accuracy", to=[0.5]), id="list of accuracies"),
        pytest.param(changed("memory_bytes", to=[]), id="list of bytes"),
        pytest.param(changed("flops", to=None), id="no flops"),
        pytest.param(without("time_s"), id="no times"),
        pytest.param(without("provenance"), id="no provenance"),
        pytest.param(changed("provenance", to=[]), id="list of provenance"),
        pytest.param(changed("run", to=[]), id="list of run"),
        pytest.param(changed("run", "model", to="../other"), id="bad name in run"),
        pytest.param(changed("run", "layers", to=0), id="no layers"),
        pytest.param(changed("run", "colour", to="red"), id="unknown key in run"),
        pytest.param(without("run", "seed"), id="no seed"),
    ],
)
def test_a_record_with_a_wrong_entry_is_refused(tmp_path, damage):
    path = a_record().save(tmp_path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ExperimentError, match="is not a run's record") as raised:
        Record.load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"null", b"not JSON", b"\xff\xfe\x00", None])
def test_a_file_that_is_no_record_is_refused(tmp_path, content):
    path = a_record().save(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ExperimentError, match="is not a run's record"):
        Record.load(path)


def test_a_missing_record_is_an_error_of_one_line(tmp_path):
    with pytest.raises(ExperimentError, match="cannot be read: No such file"):
        Record.load(tmp_path / "result.json")


@pytest.mark.parametrize("part", ["accuracy", "memory_bytes", "flops", "time_s", "loss"])
def test_a_record_that_could_not_be_read_is_not_written(tmp_path, part):
    for value in (float("nan"), float("inf")):
        record = replace(a_record(), **{part: {"x": value}})
        with pytest.raises(ExperimentError, match=rf"{part}\.x is (nan|inf), which is no result"):
            record.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_record_of_before_the_loss_was_noted_is_read(tmp_path):
    path = a_record().save(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"loss": {"train_last": "low"}}))
    with pytest.raises(ExperimentError, match=r"loss\.train_last is 'low'"):
        Record.load(path)
    del content["loss"]
    path.write_text(json.dumps(content))
    assert Record.load(path).loss == {}


def test_a_record_of_before_the_recipe_was_noted_is_read(tmp_path):
    path = a_record().save(tmp_path)
    content = json.loads(path.read_text())
    del content["recipe"]
    path.write_text(json.dumps(content))
    assert Record.load(path).recipe == {}
    path.write_text(json.dumps(content | {"recipe": [1]}))
    with pytest.raises(ExperimentError, match="recipe is"):
        Record.load(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": ' + "9" * 5000 + "}", '{"schema": 1e400}'])
def test_what_breaks_a_parser_is_no_record(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ExperimentError, match="is not a run's record"):
        Record.load(tmp_path / "result.json")
