"""Perplexity tables, and budgets of memory by which a run chooses its ranks from them, from the command line."""

import json
import re
import shutil

import pytest
import torch
from commands import CONFIGS, ROOT, arguments, execute, only_file

from classification.backbones import build_model
from classification.cli import main
from experiment import Record
from lowrank import PerplexityTable


@pytest.mark.slow
def test_measure_writes_the_table_of_the_trained_layers_once(measured, capsys):
    runs, options = measured
    path = only_file(runs, "perplexity.json")
    assert path.parent.parts[-3:] == ("perplexity", "layers2", "seed233")
    table = PerplexityTable.load(path)
    assert table.names == ["blocks.13.layers.3", "blocks.13.layers.6"]
    assert table.batch_shape == (8, 3, 64, 64)
    assert {layer.input_shape for layer in table.layers} == {(8, 576, 2, 2)}
    before = path.read_bytes()
    assert "done already" in execute(arguments("measure", runs, *options), capsys)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_perplexity_is_the_mean_over_batches(measured, tmp_path, capsys):
    runs, options = measured
    one = PerplexityTable.load(only_file(runs, "perplexity.json"))
    execute(arguments("measure", tmp_path, *options, "--batches", 3), capsys)
    three = PerplexityTable.load(only_file(tmp_path, "perplexity.json"))
    assert (one.batches, three.batches) == (1, 3)
    assert [row.ranks for row in one.layers] == [row.ranks for row in three.layers]
    assert [row.perplexity for row in one.layers] != [row.perplexity for row in three.layers]
    assert all(row.gradient_norm > 0 and row.mixed for row in three.layers)
    assert main(arguments("measure", tmp_path, *options)) == 2
    assert "batches is 3 there" in capsys.readouterr().err
    assert main(arguments("measure", tmp_path / "other", *options, "--batches", 100)) == 2
    assert "do not fill 100 batches of 8; lower --batches to " in capsys.readouterr().err


def test_settings_of_methods_that_came_later_leave_identities_as_they_were(measured):
    identity = json.loads((next(measured[0].rglob("hosvd_0.8/**/result.json")).parent / "identity.json").read_text())
    assert identity["model"]["method"] == {
        "class_path": "lowrank.HOSVD",
        "init_args": {"energy": 0.8, "storage": "input"},
    }


@pytest.mark.slow
def test_asi_keeps_at_most_the_memory_of_the_run_that_is_its_budget(measured, capsys):
    runs, options = measured
    (hosvd,) = runs.rglob("hosvd_0.8/**/result.json")
    budget = ("--model.budget.table", only_file(runs, "perplexity.json"), "--model.budget.run", hosvd.parent)
    execute(arguments("fit", runs, *options, *budget, method="asi"), capsys)
    (asi,) = runs.rglob("asi_hosvd_0.8/**/result.json")
    kept, allowed = (Record.load(path).memory_bytes["activation_formula"] for path in (asi, hosvd))
    assert 0 < kept <= allowed


def test_a_budget_holds_for_the_batch_that_is_trained_or_is_refused(measured, tmp_path, capsys):
    _, options = measured
    path = only_file(measured[0], "perplexity.json")
    least = sum(min(layer.nbytes) for layer in PerplexityTable.load(path).layers)
    budget = ("--model.budget.table", path, "--model.budget.mib", least / 2**20)
    larger = arguments("fit", tmp_path, *options, *budget, "--data.batch_size", 32, method="asi")
    if main(larger) == 0:
        record = Record.load(only_file(tmp_path, "result.json"))
        assert record.memory_bytes["activation_formula"] <= least
    else:
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("dry", [[], ["--dry_run"]], ids=["run", "dry run"])
def test_a_budget_of_images_that_have_changed_since_is_refused(measured, dry, tmp_path, capsys):
    _, options = measured
    shutil.copytree(only_file(measured[0], "perplexity.json").parent, tmp_path / "table")
    identity = tmp_path / "table" / "identity.json"
    identity.write_text(json.dumps(json.loads(identity.read_text()) | {"data_fingerprint": "1a"}))
    budget = ("--model.budget.table", tmp_path / "table" / "perplexity.json", "--model.budget.mib", 1)
    assert main([*arguments("fit", tmp_path / "runs", *options, *budget, method="asi"), *dry]) == 2
    assert "is of other data (fingerprint 1a there, " in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("dry", [[], ["--dry_run"]], ids=["run", "dry run"])
@pytest.mark.parametrize("other", ["of another seed", "none"])
def test_a_budget_measured_on_other_weights_is_refused(measured, other, dry, tmp_path, capsys):
    _, options = measured
    budget = ("--model.budget.table", only_file(measured[0], "perplexity.json"), "--model.budget.mib", 1)
    command = arguments("fit", tmp_path / "runs", *options, *budget, method="asi")
    assert main([*command, "--seed_everything", "7", "--dry_run"]) == 0  # its classifier may be another one
    place = command.index("--model.weights")
    if other == "none":
        del command[place : place + 2]
    else:
        torch.manual_seed(7)
        torch.save(build_model("mcunet", num_classes=10).state_dict(), tmp_path / "other.pt")
        command[place + 1] = str(tmp_path / "other.pt")
    assert main([*command, *dry]) == 2
    told = r"measured on other weights .*\(fingerprint \w{16} there, (fingerprint \w{16}|none) here\); measure"
    assert re.search(told, capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "tag"),
    [("own_methods.Halved", "halved_1"), ("own_methods.FirstChannels", "first_channels_hosvd_0.8")],
)
def test_a_method_of_ones_own_is_trained_by_its_path_and_has_a_budget_if_it_leaves_ranks_to_it(
    measured, method, tag, tmp_path, capsys, monkeypatch
):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "experiment"))
    runs, options = measured
    (hosvd,) = runs.rglob("hosvd_0.8/**/result.json")
    budget = ("--model.budget.table", only_file(runs, "perplexity.json"), "--model.budget.run", hosvd.parent)
    path = tmp_path / "own.yaml"
    path.write_text(f"model: {{method: {{class_path: {method}}}}}\n")
    command = arguments("fit", tmp_path, *options)
    place = command.index(str(CONFIGS / "methods" / "vanilla.yaml"))
    command[place] = str(path)
    if tag == "halved_1":  # has no ranks
        assert main([*command, *map(str, budget)]) == 2
        assert "Halved leaves no ranks to a budget" in capsys.readouterr().err
        budget = ()
    execute([*command, *map(str, budget)], capsys)
    assert Record.load(only_file(tmp_path, "result.json")).run.method == tag
