"""Runs that are stopped, moved or damaged on the way lose nothing and mislead no one."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, arguments, metrics, only_file

from classification.callbacks import BestCheckpoint
from classification.cli import main, run
from experiment import Record

SETTINGS = ("--model.layers", 2, "--trainer.max_epochs", 4, "--model.momentum", 0.9, "--tensorboard", "false")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, weights):
    """An uninterrupted run: its arguments but for the folder, and its folder."""
    runs = tmp_path_factory.mktemp("whole")
    options = (*SETTINGS, "--model.weights", weights)
    assert main(arguments("fit", runs, *options)) == 0
    return options, only_file(runs, "result.json").parent


def crash(words, epoch):
    callback = ["--trainer.callbacks+", "commands.CrashInEpoch", "--trainer.callbacks.epoch", str(epoch)]
    assert main([*words, *callback]) == 1


def weights_of(folder, name="last.ckpt"):
    return torch.load(folder / "checkpoints" / name, weights_only=True)["state_dict"]


def assert_same(folder, other):
    """Final weights, accuracies and rows, bit by bit."""
    for name in ("last.ckpt", "best.ckpt", "previous.ckpt"):
        ours, theirs = weights_of(folder, name), weights_of(other, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    records = [Record.load(path / "result.json") for path in (folder, other)]
    assert records[0].accuracy == records[1].accuracy
    rows = [[{k: v for k, v in row.items() if "seconds" not in k} for row in metrics(f)] for f in (folder, other)]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_an_unforeseen_error_is_one_line_and_a_log(whole, tmp_path, capsys):
    crash(arguments("fit", tmp_path, *whole[0]), 1)
    log = only_file(tmp_path, "failure.log")
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: mcunet on digits, .*: Interruption: .* \(traceback in {log}\)\n", said)
    assert "CrashInEpoch" in log.read_text() or "interrupt" in log.read_text()


FAILING = {  # before the first step, with the settings that are right
    "fit": (["--trainer.limit_train_batches", "1e-4"], ["--trainer.limit_train_batches", "1"]),
    "measure": (["--model.energies", "[2.0]"], ["--model.energies", "[0.5]"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", FAILING)
def test_what_fails_before_the_first_step_leaves_nothing_and_the_mended_command_works(command, tmp_path, capsys):
    wrong, right = FAILING[command]
    words = arguments(command, tmp_path / "runs", "--trainer.max_epochs", "1")
    assert main([*words, *wrong]) in (1, 2)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
    assert main([*words, *wrong, *right]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "foreign", "gone"])
def test_a_damaged_checkpoint_is_gone_round_and_the_run_ends_as_it_would_have(whole, tmp_path, capsys, damage):
    words = arguments("fit", tmp_path, *whole[0])
    crash(words, 3)
    last = only_file(tmp_path, "last.ckpt")
    content = bytearray(last.read_bytes())
    if damage == "flipped":
        content[random.Random(0).randrange(len(content) // 4, len(content) // 2)] ^= 0x40
    elif damage == "foreign":
        state = torch.load(last, weights_only=True)
        torch.save(state | {"lowrank_run": "another"}, last)
        content = bytearray(last.read_bytes())
    content = {"cut": content[:-1000], "empty": b""}.get(damage, content)
    last.write_bytes(content)
    if damage == "gone":
        last.unlink()
    capsys.readouterr()
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "resuming" not in printed.out
    assert printed.out.startswith("from previous.ckpt: mcunet")
    assert printed.err.count("going on from previous.ckpt\n") == (damage != "gone")
    assert_same(only_file(tmp_path, "result.json").parent, whole[1])


@pytest.mark.slow
def test_a_runs_folder_that_was_moved_goes_on_with_its_best_epoch(whole, tmp_path):
    crash(arguments("fit", tmp_path / "old", *whole[0]), 2)
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert main(arguments("fit", tmp_path / "new", *whole[0])) == 0
    assert_same(only_file(tmp_path / "new", "result.json").parent, whole[1])
    assert not (tmp_path / "old").exists()


def test_the_best_score_and_its_path_are_those_of_the_folder(tmp_path):
    before, after = (
        BestCheckpoint(tmp_path / name, save_on_train_epoch_end=True, enable_version_counter=False)
        for name in ("old", "new")
    )
    after.load_state_dict(before.state_dict())
    assert (after.best_model_score, after.best_model_path) == (None, "")
    before.best_model_score = torch.tensor(0.9)
    after.load_state_dict(before.state_dict())
    assert after.best_model_score == torch.tensor(0.9)
    assert after.best_model_path == str(tmp_path / "new" / "best.ckpt")
    assert str(tmp_path) not in str(before.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "{", "null", "schema 2", "foreign"])
def test_a_run_whose_record_is_not_whole_is_made_again(whole, tmp_path, capsys, content):
    folder = tmp_path / whole[1].relative_to(whole[1].parents[6])
    shutil.copytree(whole[1], folder)
    text = (folder / "result.json").read_text()
    changed = {"schema 2": text.replace('"schema": 1', '"schema": 2'), "foreign": text.replace("vanilla", "other")}
    (folder / "result.json").write_text(changed.get(content, content))
    words = arguments("fit", tmp_path, *whole[0])
    capsys.readouterr()
    assert main(words) == 0
    assert "done already" not in capsys.readouterr().out
    assert_same(folder, whole[1])


@pytest.mark.slow
def test_rows_that_were_lost_are_those_of_the_checkpoint(whole, tmp_path):
    folder = tmp_path / whole[1].relative_to(whole[1].parents[6])
    shutil.copytree(whole[1], folder)
    for name in ("result.json", "metrics.csv"):
        (folder / name).unlink()
    assert main(arguments("fit", tmp_path, *whole[0])) == 0
    assert (folder / "metrics.csv").read_text() == (whole[1] / "metrics.csv").read_text()


def test_checkpoints_of_another_recipe_are_refused_though_the_identity_is_lost(whole, tmp_path, capsys):
    folder = tmp_path / whole[1].relative_to(whole[1].parents[6])
    shutil.copytree(whole[1], folder)
    (folder / "result.json").unlink()
    (folder / "identity.json").unlink()
    capsys.readouterr()
    assert main(arguments("fit", tmp_path, *whole[0], "--model.learning_rate", 0.3)) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: checkpoint .*last\.ckpt is of a run with other settings.*; delete .*\n", said)
    assert not (folder / "result.json").exists()


def started(words, said):
    """A run as a process of its own, once it has printed this."""
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    process = subprocess.Popen(
        [sys.executable, "-m", "classification", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    assert any(said in line for line in process.stdout), process.stderr.read()
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("command", "number", "code"), [("fit", signal.SIGTERM, 143), ("sweep", signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_its_exit_code_and_nothing_is_lost(whole, tmp_path, number, code, command):
    halted = ["--trainer.callbacks+", "commands.HaltInEpoch", "--trainer.callbacks.epoch", "2"]
    words = arguments("fit", tmp_path, *whole[0])
    if command == "sweep":
        options = [word for word in words if "--runs_dir" not in word][words.index("--trainer.max_epochs") :]
        words = ["sweep", "--setup", "a", "--model", "mcunet", "--dataset", "digits", "--methods", "vanilla"]
        words += ["--layers", "2", "--epochs", "4", "--weights", str(whole[0][-1]), "--runs_dir", str(tmp_path)]
        words += ["--data.image_size", "32", "--data.batch_size", "8", *options[2:8]]
    else:
        words += ["--data.workers", "1"]  # which such a signal ends as well, if it may
    process = started([*words, *halted], "halted")
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert re.fullmatch(r"interrupted during .*digits.*; the same command goes on\n", said)
    assert not list(tmp_path.rglob("*.part"))
    last = torch.load(only_file(tmp_path, "last.ckpt"), weights_only=True)
    assert last["global_step"] == 3 * 2  # the step that it was in is done and saved
    if command == "fit":
        assert main(words) == 0
        assert_same(only_file(tmp_path, "result.json").parent, whole[1])


@pytest.mark.slow
def test_a_signal_while_loading_is_one_line():
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "classification", "fit"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    told = []
    for line in process.stderr:
        if "torch." in line and not told:
            process.send_signal(signal.SIGINT)
        if "import time:" not in line:
            told.append(line)
        elif "torch." in line:
            told.append("")
    assert process.wait() == 130
    assert "".join(told) == "interrupted during fit; the same command goes on\n"


STOPPING = [f"--trainer.callbacks.{word}" for word in ("monitor=val_loss", "mode=max", "stopping_threshold=0")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--trainer.max_time", "00:00:00:00"),
        ("--trainer.callbacks+", "pytorch_lightning.callbacks.EarlyStopping", *STOPPING),
    ],
    ids=["max_time", "early stop"],
)
def test_a_run_that_is_ended_early_is_not_done_and_goes_on(whole, tmp_path, capsys, options):
    words = arguments("fit", tmp_path, *whole[0])
    assert main([*words, *options]) == 2
    assert re.fullmatch(r"error: stopped after [01] of 4 epochs.*; the same command goes on\n", capsys.readouterr().err)
    assert list(tmp_path.rglob("result.json")) == []
    if "max_time" in options[0]:
        assert main(words) == 0
        assert_same(only_file(tmp_path, "result.json").parent, whole[1])


REFUSED = [
    *(("--trainer.precision", value) for value in ("bf16-true", "16-true", "64-true", "64")),
    *(
        ("--trainer.check_val_every_n_epoch", "2"),
        ("--trainer.max_steps", "3"),
        ("--trainer.val_check_interval", "0.5"),
    ),
    *(("--trainer.accelerator", "foo"), ("--trainer.devices", "0"), ("--trainer.num_nodes", "2")),
    *(("--trainer.enable_checkpointing", "false"), ("--trainer.barebones", "true"), ("--trainer.max_time", "soon")),
    *(("--model.weight_decay", "-5"), ("--model.warmup_epochs", "-3"), ("--seed_everything", "-1")),
    *(("--data.workers", "-1"), ("--data.std", "[0,1,1]"), ("--trainer.gradient_clip_val", "-1"), ("--runs_dir", "")),
    *(("--trainer.max_epoch", "3"), ("--dry-runn",), ("--trainer.max_epochs", "-1")),
    *(("--seed_everything", str(2**40)), ("--trainer.min_steps", "-5"), ("--model.learning_rate", ".inf")),
    *(("--model.layers", "1:30"), ("--model", "{layers: 2, layers: 4}"), ("--data.workers", "100000")),
    *(("--trainer.devices", "100000"), ("--data.std", "[.inf,1,1]"), ("--data.mean", "[.nan,0,0]")),
    ("--trainer.callbacks+", "pytorch_lightning.callbacks.BackboneFinetuning"),
    ("--trainer.callbacks+", "pytorch_lightning.callbacks.SpikeDetection"),
    ("--trainer.callbacks+", "pytorch_lightning.callbacks.BatchSizeFinder"),
    ("--trainer.callbacks+", "pytorch_lightning.callbacks.LearningRateFinder"),
    (
        "--trainer.callbacks+",
        "pytorch_lightning.callbacks.ModelPruning",
        "--trainer.callbacks.pruning_fn=l1_unstructured",
    ),
    ("--trainer.callbacks+", "pytorch_lightning.callbacks.StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=.1"),
    *(("--model.momentum", "1.5"), ("--trainer.overfit_batches", "1"), ("--data.partition_seed", "-5")),
]


@pytest.mark.parametrize("options", REFUSED, ids=" ".join)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, capsys, options):
    assert main(arguments("fit", tmp_path, "--model.layers", 2, *options)) == 2
    assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model:\n  layers: 2\n  layers: 4\n", "has the key 'layers' twice, again in line 3"),
        (b"model: {layers: 2, layers: 4}\n", "twice"),
        (b"model:\n  layers: 2\xff\n", "no UTF-8"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "nested"),
        (b"a: &a [1]\nb: [*a, *a]\n", r"alias \*a"),
        (b"model:\n  layers: 0100\n", "0100 in line 2, which YAML takes for a number to the base of 8"),
        (b"model:\n  layers: 1:30\n", "base of 60"),
    ],
)
def test_a_config_that_no_one_means_is_refused(tmp_path, capsys, content, message):
    (tmp_path / "x.yaml").write_bytes(content)
    assert main(arguments("fit", tmp_path / "runs", "--config", tmp_path / "x.yaml")) == 2
    assert re.fullmatch(rf"error: config .*{message}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


def test_keys_are_twice_only_within_one_mapping(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("model: {layers: 2}\ndata: {mean: [1, 1, 1], root: data}\nsetup: data\n")
    run([*arguments("fit", tmp_path / "runs", "--config", tmp_path / "x.yaml"), "--dry-run"])
    assert "would run" in capsys.readouterr().out
