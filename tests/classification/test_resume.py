"""A run that was interrupted ends bit for bit as one that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, Interruption, arguments, finish, metrics, only_file

from classification.backbones import build_model
from classification.cli import main, run
from experiment import Record

EPOCHS = ("--trainer.max_epochs", 4)
RANKS = ["--model.method.init_args.ranks", 3]
METHODS = {
    **{"vanilla": ("mcunet", []), "asi": ("mcunet", RANKS), "wasi_0.9": ("vit_mini", RANKS)},
    "asi_int8_derived": ("mcunet", [*RANKS, "--model.layers", 4]),  # a whole bottleneck: two inputs follow from one
}


def command(runs, weights, method, *options):
    model, settings = METHODS[method]
    settings = (*EPOCHS, "--model.layers", 2, "--model.momentum", 0.9, "--model.warmup_epochs", 2, *settings)
    if model == "mcunet":
        settings = (*settings, "--model.weights", weights)
    return arguments("fit", runs, *settings, *options, model=model, method=method)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, weights):
    """The folder of a whole run per method."""
    found = {}
    for method in METHODS:
        runs = tmp_path_factory.mktemp(method)
        assert main(command(runs, weights, method)) == 0
        found[method] = only_file(runs, "result.json").parent
    return found


def crash(words, kind, *options):
    with pytest.raises(Interruption):
        run([*words, "--trainer.callbacks+", f"commands.{kind}", *options])


def kill(words, epoch):
    """Start the run as a process of its own and kill it in the middle of an epoch."""
    callback = ["--trainer.callbacks+", "commands.HaltInEpoch", "--trainer.callbacks.epoch", str(epoch)]
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    with subprocess.Popen(
        [sys.executable, "-m", "classification", *words, *callback],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert any(line == "halted\n" for line in process.stdout), "the run ended before it was to be killed"
        process.kill()
    assert process.returncode == -9


def interrupt(words, how):
    if how == "killed in the third epoch":
        kill(words, 2)
    elif how == "crashed in the third epoch":
        crash(words, "CrashInEpoch", "--trainer.callbacks.epoch", "2")
    else:
        crash(words, "CrashBeforeTest")


INTERRUPTED = [
    ("vanilla", "crashed in the third epoch"),
    ("asi", "crashed in the third epoch"),
    ("asi", "killed in the third epoch"),
    ("asi", "crashed before the test"),
    ("wasi_0.9", "crashed in the third epoch"),
    ("asi_int8_derived", "killed in the third epoch"),
]


@pytest.fixture(scope="module", params=INTERRUPTED, ids=lambda param: " ".join(param))
def resumed(request, tmp_path_factory, weights):
    """An interrupted run that was run again: method, epochs there were at the interruption, folder."""
    method, how = request.param
    runs = tmp_path_factory.mktemp("interrupted")
    words = command(runs, weights, method)
    interrupt(words, how)
    folder = only_file(runs, "identity.json").parent
    assert not (folder / "result.json").exists()
    rows = len(metrics(folder))
    assert rows == (4 if how == "crashed before the test" else 2)
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"]
    assert main(words) == 0
    return method, rows, last, folder


@pytest.mark.slow
def test_it_goes_on_after_the_last_whole_epoch_to_the_end(resumed):
    _, rows, last, folder = resumed
    assert last == rows - 1  # epochs count from 0
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 3


def differences(first, second, where=""):
    """Where two nested structures differ, tensors bit by bit."""
    if isinstance(first, torch.Tensor):
        same = isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
        return [] if same else [where]
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{where}: keys"]
        return [found for key in first for found in differences(first[key], second[key], f"{where}/{key}")]
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            return [f"{where}: length"]
        pairs = enumerate(zip(first, second, strict=True))
        return [found for index, pair in pairs for found in differences(*pair, f"{where}/{index}")]
    return [] if first == second else [where]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["last", "best"])
@pytest.mark.parametrize("part", ["state_dict", "lowrank", "optimizer_states", "lr_schedulers", "epoch", "global_step"])
def test_its_checkpoints_are_those_of_an_uninterrupted_run(uninterrupted, resumed, name, part):
    method, _, _, folder = resumed
    whole, again = (
        torch.load(path / "checkpoints" / f"{name}.ckpt", weights_only=True)[part]
        for path in (uninterrupted[method], folder)
    )
    assert differences(whole, again) == []
    if part == "state_dict":
        own = {key.removeprefix("backbone.") for key in whole if key.startswith("backbone.")}
        assert own == build_model(METHODS[method][0], num_classes=10).state_dict().keys()
    if part == "lowrank":
        assert bool(whole) == (method != "vanilla")
    if part == "optimizer_states":
        momenta = [[state[key] for key in state if "momentum" in key] for state in whole[0]["state"].values()]
        assert momenta
        assert all(held and all(momentum.any() for momentum in held) for held in momenta)


def without_seconds(folder):
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in metrics(folder)]


@pytest.mark.slow
def test_its_history_is_that_of_an_uninterrupted_run(uninterrupted, resumed):
    method, _, _, folder = resumed
    assert [row["epoch"] for row in metrics(folder)] == [0, 1, 2, 3]
    assert without_seconds(folder) == without_seconds(uninterrupted[method])


def test_its_record_is_that_of_an_uninterrupted_run(uninterrupted, resumed):
    method, _, _, folder = resumed
    whole, again = (Record.load(path / "result.json") for path in (uninterrupted[method], folder))
    assert (again.run, again.accuracy, again.flops) == (whole.run, whole.accuracy, whole.flops)
    assert again.memory_bytes == whole.memory_bytes
    layers = [json.loads((path / "ranks.json").read_text())["layers"] for path in (uninterrupted[method], folder)]
    assert layers[0] == layers[1]
    assert any(layer.get("derived") for layer in layers[0]) == ("derived" in method)
    assert again.provenance["config_hash"] == whole.provenance["config_hash"]
    assert list(folder.rglob("*.part")) == []


@pytest.mark.slow
def test_the_command_says_that_it_resumes(tmp_path, capsys, weights):
    words = command(tmp_path, weights, "vanilla")
    crash(words, "CrashInEpoch", "--trainer.callbacks.epoch", "1")
    main([*words, "--dry_run"])
    assert "would resume" in capsys.readouterr().out
    assert "resuming: mcunet on digits" in finish(words, tmp_path, capsys).printed


@pytest.mark.slow
def test_one_that_was_killed_before_it_saved_anything_may_begin_with_other_settings(tmp_path, capsys):
    words = arguments("fit", tmp_path, "--model.layers", 2, "--trainer.max_epochs", 1)
    kill(words, 0)
    assert not list(tmp_path.rglob("*.ckpt"))
    assert main([*words, "--data.batch_size", "4"]) == 0
    folder = only_file(tmp_path, "result.json").parent
    assert f"the run with other settings in {folder} had saved nothing" in capsys.readouterr().out
    assert json.loads((folder / "identity.json").read_text())["data"]["batch_size"] == 4
    assert Record.load(folder / "result.json").recipe["batch_size"] == 4
    assert main(words) == 2
    assert "holds a run with other settings (data.batch_size is 4 there and 8 here)" in capsys.readouterr().err
