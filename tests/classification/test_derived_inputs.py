"""A method with derive from the command line: its table, its runs, and what it cannot do without."""

import json
import re

import pytest
from commands import arguments, execute, finish, only_file

from classification.cli import main
from lowrank import PerplexityTable


@pytest.fixture(scope="module")
def derived(measured, tmp_path_factory):
    """A perplexity table of a whole bottleneck with what follows from what, and the options of its runs."""
    runs, options = tmp_path_factory.mktemp("derived"), (*measured[1], "--model.layers", 4)
    assert main(arguments("measure", runs, *options, "--model.derive", "true")) == 0
    return only_file(runs, "perplexity.json"), options


@pytest.mark.slow
def test_a_method_with_derive_has_a_table_of_its_own_that_serves_it_and_leaves_others_as_they_were(
    measured, derived, tmp_path, capsys
):
    path, options = derived
    assert path.parent.parts[-3:] == ("perplexity_derived", "layers4", "seed233")
    table = PerplexityTable.load(path)
    assert table.derives
    wide = ["blocks.13.layers.3", "blocks.13.layers.6"]
    assert [sorted(row.derived.shapes) for row in table.layers if row.derived] == [wide]
    budget = ("--model.budget.table", path, "--model.budget.mib", 0.01)
    done = finish(arguments("fit", tmp_path, *options, *budget, method="asi_int8_derived"), tmp_path, capsys)
    assert done.folder.parts[-3] == "asi_int8_derived_0.01mib"
    assert 0 < done.record["memory_bytes"]["activation_formula"] <= 0.01 * 2**20
    layers = {layer["name"]: layer for layer in json.loads((done.folder / "ranks.json").read_text())["layers"]}
    assert {name for name, layer in layers.items() if layer.get("derived") == "blocks.13.layers.0"} == set(wide)
    assert all(layers[name]["ranks"] is None and layers[name]["activation_bytes"] == 0 for name in wide)
    memory = json.loads((done.folder / "memory.json").read_text())["module/kind/bytes/reason"]
    assert {row[0] for row in memory if "computed again from what layer" in row[3]} == set(wide)
    # Where it is off, or nothing is measured, no identity knows of it, as before it was there.
    asked = json.loads((path.parent / "identity.json").read_text())["model"]
    assert asked["derive"] is True
    for folder in (only_file(measured[0], "perplexity.json").parent, done.folder):
        assert "derive" not in json.loads((folder / "identity.json").read_text())["model"]
    assert "done already" in execute(arguments("measure", measured[0], *measured[1], "--model.derive", "false"), capsys)


@pytest.mark.parametrize("derive", [0, 1, 256])
def test_a_number_that_no_table_is_measured_with_is_one_line_ahead_of_all_else(derive, tmp_path, capsys):
    assert main(arguments("measure", tmp_path, "--model.derive", derive, "--dry_run")) == 2
    assert f"error: of the perplexity table derive is {derive}; allowed: " in capsys.readouterr().err
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "does not say which inputs follow from which, as a method with derive=True needs it; measure one with "),
        (["--model.rank_choice", "random"], "--model.rank_choice is 'random' with derive; allowed: 'perplexity'"),
        (["--model.fuse", "false"], "fuse is off with ASI(derive=True): "),
        (["--trainer.precision", "bf16-mixed"], "--trainer.precision is bf16-mixed with a method with derive: "),
    ],
    ids=["table", "choice", "fuse", "precision"],
)
def test_what_a_method_with_derive_cannot_do_without_is_one_line(measured, options, message, tmp_path, capsys):
    runs, settings = measured
    budget = ("--model.budget.table", only_file(runs, "perplexity.json"), "--model.budget.mib", 0.01)
    words = arguments("fit", tmp_path, *settings, *budget, *options, method="asi_int8_derived")
    assert main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert list(tmp_path.rglob("config.yaml")) == []


@pytest.mark.slow
def test_a_step_that_keeps_what_the_budget_takes_for_derived_is_refused(derived, tmp_path, capsys, monkeypatch):
    path, options = derived
    budget = ("--model.budget.table", path, "--model.budget.mib", 0.01)
    monkeypatch.setattr("lowrank.layers.keeping.derived", lambda *words: None)
    assert main(arguments("fit", tmp_path, *options, *budget, method="asi_int8_derived")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(
        r"layer 'blocks\.13\.layers\.[36]' keeps \d+ bytes of its input, .* 'blocks\.13\.layers\.0' keeps", line
    )
    assert list(tmp_path.rglob("result.json")) == []
