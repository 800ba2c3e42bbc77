"""What a run logs by itself, and what it shows of its progress."""

import contextlib
import json
import os
import pty
import re
import sys
import termios
from concurrent.futures import ThreadPoolExecutor

import pytest
from commands import arguments, finish, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from classification.cli import main
from classification.loggers import loggers
from experiment import ExperimentError, Run

RUN = Run("classification", "A", "mcunet", "digits", "asi", 2, 233)
RESOURCES = ("activation_bytes", "step_seconds", "seconds", "learning_rate")


@pytest.fixture(scope="module")
def logged(tmp_path_factory, weights):
    """The folder of a run of two epochs with nothing said about logging, and what its TensorBoard files hold."""
    runs = tmp_path_factory.mktemp("runs")
    words = ("--model.layers", 2, "--model.weights", weights, "--trainer.max_epochs", 2)
    assert main(arguments("fit", runs, *words)) == 0
    (folder,) = (path.parent for path in runs.rglob("result.json"))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return folder, {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.slow
def test_tensorboard_has_the_history_of_the_run(logged):
    folder, scalars = logged
    rows = metrics(folder)
    for name in ("train_loss", "val_loss", "val_accuracy"):
        assert scalars[name] == pytest.approx([row[name] for row in rows])
    for name in RESOURCES:
        assert scalars[f"resources/{name}"] == pytest.approx([row[name] for row in rows])


def test_tensorboard_has_what_the_run_used_in_all(logged):
    folder, scalars = logged
    record = json.loads((folder / "result.json").read_text())
    for part in ("memory_bytes", "flops", "time_s"):
        for name, value in record[part].items():
            assert scalars[f"resources/{part}_{name}"] == pytest.approx([value])
    assert scalars["test_accuracy"] == pytest.approx([record["accuracy"]["test"]])


def test_tensorboard_has_what_was_chosen_beside_what_came_of_it(logged):
    folder, scalars = logged
    record = json.loads((folder / "result.json").read_text())
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    told = HParamsPluginData.FromString(plugin).session_start_info.hparams
    assert told["method"].string_value == record["run"]["method"]
    assert told["batch_size"].number_value == record["recipe"]["batch_size"]
    assert scalars["accuracy/test"] == pytest.approx([record["accuracy"]["test"]])


def test_what_a_run_leaves_agrees_with_its_record(logged):
    folder, _ = logged
    memory = json.loads((folder / "result.json").read_text())["memory_bytes"]
    left = json.loads((folder / "memory.json").read_text())
    assert sum(row[2] for row in left["module/kind/bytes/reason"]) == left["kept_bytes"] == memory["saved_measured"]
    layers = json.loads((folder / "ranks.json").read_text())["layers"]
    assert len(layers) == 2
    assert sum(layer["activation_bytes"] for layer in layers) == memory["activation_formula"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_tensorboard_can_be_turned_off(tmp_path, capsys, weights):
    words = ("--model.layers", 2, "--model.weights", weights, "--tensorboard", "false")
    done = finish(arguments("fit", tmp_path, *words), tmp_path, capsys)
    assert not (done.folder / "tensorboard").exists()
    assert len(done.rows) == 1


def test_a_logger_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ExperimentError, match="--wandb needs Weights & Biases, which is not installed"):
        loggers(tmp_path, RUN, tensorboard=False, wandb="project")
    assert loggers(tmp_path, RUN, tensorboard=False, wandb=None) == []


def command(runs, weights):
    """A run of two epochs that shows its progress."""
    words = arguments("fit", runs, "--model.layers", 2, "--model.weights", weights, "--trainer.max_epochs", 2)
    place = words.index("--trainer.enable_progress_bar")
    return [*words[:place], *words[place + 2 :]]


def until_closed(terminal):
    """All that is written to a terminal, which holds some kilobytes and hands them on when it likes."""
    parts = []
    with contextlib.suppress(OSError):  # nobody has its other end any more
        while part := os.read(terminal, 1 << 16):
            parts.append(part)
    return b"".join(parts).decode()


@pytest.mark.slow
def test_progress_is_a_bar_on_a_terminal(tmp_path, weights, monkeypatch):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    with ThreadPoolExecutor(1) as reader:
        shown = reader.submit(until_closed, ours)
        with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            assert main(command(tmp_path, weights)) == 0
        text = shown.result()
    os.close(ours)
    assert re.search(r"100 %.* 4/4 steps, .*epoch 2/2, val accuracy \d+\.\d %, 0 s left", text)
    assert not re.search(r"^  epoch", text, re.MULTILINE)


@pytest.mark.slow
def test_progress_is_lines_elsewhere(capsys, tmp_path, weights):
    printed = finish(command(tmp_path, weights), tmp_path, capsys).printed
    lines = re.findall(r"^  epoch (\d)/2  val accuracy (\d+\.\d) %  (\d+) s left$", printed, re.MULTILINE)
    assert [line[0] for line in lines] == ["1", "2"]
    accuracies = [f"{100 * row['val_accuracy']:.1f}" for row in metrics(next(tmp_path.rglob("result.json")).parent)]
    assert [line[1] for line in lines] == accuracies
    assert lines[1][2] == "0"
