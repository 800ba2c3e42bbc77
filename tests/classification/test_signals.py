"""A signal or a limit of time ends a run at the end of its step, and it goes on from there, bit for bit."""

from __future__ import annotations

import random
import re

import pytest
import torch
from commands import arguments, metrics, only_file

from benchmarks.kills import differences
from classification.cli import main
from experiment.checkpoints import IDENTITY

METHODS = {"vanilla": "mcunet", "asi": "mcunet", "wasi_0.9": "vit_mini"}
EPOCHS, BATCHES, VALIDATED = 3, 5, 2
LENGTH = ("--trainer.max_epochs", EPOCHS, "--trainer.limit_train_batches", BATCHES)
RECIPE = ("--model.layers", 2, "--model.momentum", 0.9, "--model.warmup_epochs", 2, "--tensorboard", "false")
DRAWN = ("--data.augment", "true", "--data.cache", "false")


def command(runs, weights, method, *options):
    ranks = () if method == "vanilla" else ("--model.method.init_args.ranks", 3)
    start = ("--model.weights", weights) if METHODS[method] == "mcunet" else ()
    settings = (*LENGTH, *RECIPE, *DRAWN, *ranks, *start, *options)
    return arguments("fit", runs, *settings, model=METHODS[method], method=method)


def with_signal(words, **moment):
    options = (f"--trainer.callbacks.{name}={value}" for name, value in moment.items())
    return [*words, "--trainer.callbacks+", "commands.SignalIn", *options]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, weights):
    """The folder of a run that no signal came to, of a method with some options."""
    made = {}

    def make(method, *options):
        if (method, options) not in made:
            runs = tmp_path_factory.mktemp("whole")
            assert main(with_signal(command(runs, weights, method, *options))) == 0
            made[method, options] = only_file(runs, "result.json").parent
        return made[method, options]

    return make


def changed(folder, whole):
    """In what a run's files differ from the whole run's; the checkpoint before the last may be of a step."""
    return [found for found in differences(folder, whole) if not found.startswith("checkpoints/previous.ckpt")]


def checkpoint(runs, name="last.ckpt"):
    return torch.load(only_file(runs, name), weights_only=True)


def moments(method):
    """One random step of training and one of validation for each method, and the last step of an epoch."""
    source = random.Random(method)
    yield source.randrange(EPOCHS), source.randrange(BATCHES - 1), False
    yield source.randrange(EPOCHS), BATCHES - 1, False
    yield source.randrange(EPOCHS), source.randrange(VALIDATED), True


MOMENTS = [(method, *moment) for method in METHODS for moment in moments(method)]


@pytest.mark.parametrize(("method", "epoch", "batch", "validating"), MOMENTS)
def test_a_run_goes_on_from_the_very_step(whole, tmp_path, weights, capsys, method, epoch, batch, validating):
    words = command(tmp_path, weights, method)
    assert main(with_signal(words, epoch=epoch, batch=batch, validating=validating)) == 143
    assert re.fullmatch(r"interrupted during .* on digits, .*; the same command goes on\n", capsys.readouterr().err)
    saved = checkpoint(tmp_path)
    assert saved["global_step"] == epoch * BATCHES + (BATCHES if validating else batch + 1)
    assert saved[IDENTITY]
    assert (len(saved["optimizer_states"]), saved["epoch"]) == (1, epoch - 1)
    if epoch:
        assert checkpoint(tmp_path, "previous.ckpt")["global_step"] == epoch * BATCHES
    assert main(with_signal(words)) == 0
    assert "resuming: " in capsys.readouterr().out
    folder = only_file(tmp_path, "result.json").parent
    assert changed(folder, whole(method)) == []
    names = [kind for kind in saved["callbacks"] if kind.startswith("RandomState")]
    ours, theirs = (checkpoint(path)["callbacks"][names[0]]["torch"] for path in (folder, whole(method)))
    assert torch.equal(ours, theirs), "the same numbers would be drawn from here on"


def test_it_does_not_matter_how_often_a_run_is_stopped_nor_by_what_signal(whole, tmp_path, weights):
    words = command(tmp_path, weights, "vanilla")
    for batch, number, code in ((0, 2, 130), (1, 15, 143), (3, 2, 130)):
        assert main(with_signal(words, epoch=0, batch=batch, number=number)) == code
    assert main(with_signal(words, epoch=1, batch=0)) == 143
    assert main(with_signal(words)) == 0
    assert changed(only_file(tmp_path, "result.json").parent, whole("vanilla")) == []


@pytest.mark.parametrize("damaged", ["last.ckpt", "previous.ckpt"])
def test_a_damaged_step_is_gone_round(whole, tmp_path, weights, capsys, damaged):
    words = command(tmp_path, weights, "vanilla")
    assert main(with_signal(words, epoch=1, batch=2)) == 143
    path = only_file(tmp_path, damaged)
    path.write_bytes(path.read_bytes()[:-1000])
    assert main(with_signal(words)) == 0
    assert ("going on from previous.ckpt" in capsys.readouterr().err) == (damaged == "last.ckpt")
    folder = only_file(tmp_path, "result.json").parent
    for path in tmp_path.rglob("*.unusable"):
        path.unlink()
    assert changed(folder, whole("vanilla")) == []


ACCUMULATED = ("--trainer.accumulate_grad_batches", 2, "--data.drop_last", "false")


def test_a_step_of_several_batches_is_ended_first(whole, tmp_path, weights):
    words = command(tmp_path, weights, "vanilla", *ACCUMULATED)
    assert main(with_signal(words, epoch=1, batch=2)) == 143
    assert checkpoint(tmp_path)["global_step"] == 3 + 2  # of 2, 2 and 1 batches in an epoch
    assert main(with_signal(words)) == 0
    assert changed(only_file(tmp_path, "result.json").parent, whole("vanilla", *ACCUMULATED)) == []


def test_a_limit_of_time_ends_a_run_at_its_step(whole, tmp_path, weights, capsys):
    words = command(tmp_path, weights, "vanilla")
    slow = ["--trainer.callbacks+", "commands.StopIn", "--trainer.callbacks.epoch=1", "--trainer.callbacks.batch=2"]
    assert main([*with_signal(words), *slow]) == 2
    assert "stopped after 1 of 3 epochs, at batch 3, by --trainer.max_time" in capsys.readouterr().err
    assert checkpoint(tmp_path)["global_step"] == BATCHES + 3
    assert main(with_signal(words)) == 0
    assert changed(only_file(tmp_path, "result.json").parent, whole("vanilla")) == []


def test_the_loss_of_an_epoch_is_the_mean_over_its_samples_and_all_tries(whole, tmp_path, weights):
    rows = metrics(whole("vanilla"))
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    words = command(tmp_path, weights, "vanilla", "--data.drop_last", "false", "--trainer.limit_train_batches", "1.0")
    assert main([*with_signal(words, epoch=0, batch=3), "--trainer.max_epochs", "1"]) == 143
    history = next(value for key, value in checkpoint(tmp_path)["callbacks"].items() if key.startswith("History"))
    kept, losses, _, samples = history["pending"]
    assert samples == [8] * 4
    assert len(kept) == len(losses) == 4
