"""What of a run's settings and code its record holds, and that a run of other code is not taken for it."""

import importlib
import json

import pytest
from commands import arguments, execute, only_file

from classification.backbones.registry import backbone as registry_of_backbones
from classification.cli import main
from classification.identity import callback_sources, further_settings
from experiment.provenance import untold
from experiment.sources import source_of


@pytest.mark.slow
def test_the_record_says_all_settings_of_the_run(measured):
    """Here or there: whatever is another, a report can see it."""
    folder = only_file(measured[0], "result.json").parent
    identity = json.loads((folder / "identity.json").read_text())
    del identity["data_fingerprint"]  # which provenance has by itself
    assert identity.pop("dataset") == identity["data"]["dataset"]
    provenance = json.loads((folder / "result.json").read_text())["provenance"]
    assert provenance["settings"] == untold(identity, provenance["further_settings"])

    def told(changed):
        further = further_settings(changed)
        return further, untold(changed, further)

    for part in ("model", "data", "trainer"):
        for key in identity[part]:
            assert told(identity | {part: identity[part] | {key: "another"}}) != told(identity), key
    for change in ({"setup": "Z"}, {"seed": 5}):
        assert told(identity | change) != told(identity), change


OWN = """from classification.backbones.registry import backbone
from dataclasses import dataclass
from torch import nn
import lowrank


@backbone("own_net")
def own_net(num_classes, pretrained):
    layers = nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, num_classes))


@dataclass(frozen=True)
class Mine(lowrank.Vanilla):
    tag = "mine"
"""


@pytest.mark.slow
@pytest.mark.parametrize("own", ["method", "model"])
def test_a_run_by_code_that_has_changed_since_is_not_done_already(tmp_path, monkeypatch, capsys, own):
    name = f"own_{own}_code"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry_of_backbones.entries, "own_net", None)
    importlib.import_module(name)
    options = ["--model.method", f"{name}.Mine"] if own == "method" else ["--model.backbone", "own_net"]
    command = arguments("fit", tmp_path / "runs", "--model.layers", 1, "--data.partition", "all", *options)
    execute(command, capsys)
    assert "done already" in execute(command, capsys)
    code = json.loads(only_file(tmp_path / "runs", "result.json").read_text())["provenance"]["code"]
    (tmp_path / f"{name}.py").write_text(f"{OWN}# changed\n")
    assert main(command) == 2
    what = f"method {name}.Mine" if own == "method" else "model own_net"
    assert what in code
    assert f"holds a run of other code: the file of the {what} has changed since" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["validate", "test"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data.image_size", 32), "with other settings (data.image_size is 64 there and 32 here)"),
        (("--model.learning_rate", 0.5), "with other settings (model.learning_rate is "),
        (("--data.limit", 50), "with other settings (data.limit is "),
        (("swapped images",), "a run on other data (fingerprint "),
    ],
)
def test_only_the_run_itself_is_validated_and_tested(measured, monkeypatch, capsys, command, options, message):
    runs, usual = measured
    given = (*usual, *(() if options == ("swapped images",) else options))
    if options == ("swapped images",):
        monkeypatch.setattr("classification.lightning_cli.data_fingerprint", lambda config: "another")
    assert main(arguments(command, runs, *given, method="hosvd_0.8")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "give the settings of that run, which are in its config.yaml, or another checkpoint as --ckpt_path" in error


@pytest.mark.slow
@pytest.mark.parametrize("without", [0, 2])  # options of the weights that it was trained from
def test_a_run_is_tested_by_its_own_settings_also_where_what_it_was_trained_from_is_gone(measured, capsys, without):
    runs, (layers, number, _, path, *rest) = measured
    told = (layers, number, *([] if without else ["--model.weights", path]), *rest)
    assert "test_accuracy" in execute(arguments("test", runs, *told, method="hosvd_0.8"), capsys)


def test_the_code_of_callbacks_of_ones_own_is_noted(tmp_path, monkeypatch):
    path = tmp_path / "own_callback_of_test.py"
    path.write_text("class Mine: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module(path.stem)
    given = [f"{path.stem}.Mine", {"class_path": f"{path.stem}.Mine", "init_args": {}}]
    lightnings = "pytorch_lightning.callbacks.StochasticWeightAveraging"
    for callback in given:
        found = callback_sources({"trainer": {"callbacks": [lightnings, callback]}})
        assert found == {f"callback {path.stem}.Mine": source_of(own.Mine)}
        assert found[f"callback {path.stem}.Mine"]["file"] == str(path)
    assert callback_sources({"trainer": {}}) == {}
