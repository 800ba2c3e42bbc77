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
DRAWN = ("--data.augment", "true", "--data.cache", "false")  # and dropout, by SignalIn


def command(runs, weights, method, *options):
    ranks = () if method == "vanilla" else ("--model.method.init_args.ranks", 3)
    start = ("--model.weights", weights) if METHODS[method] == "mcunet" else ()
    settings = (*LENGTH, *RECIPE, *DRAWN, *ranks, *start, *options)
    return arguments("fit", runs, *settings, model=METHODS[method], method=method)


def with_callback(words, kind="SignalIn", **settings):
    options = (f"--trainer.callbacks.{name}={value}" for name, value in settings.items())
    return [*words, "--trainer.callbacks+", f"commands.{kind}", *options]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, weights):
    """The folder of a run that no signal came to, of a method with some options."""
    made = {}

    def make(method, *options):
        if (method, options) not in made:
            runs = tmp_path_factory.mktemp("whole")
            assert main(with_callback(command(runs, weights, method, *options))) == 0
            made[method, options] = only_file(runs, "result.json").parent
        return made[method, options]

    return make


def changed(folder, whole):
    """In what a run's files differ from the whole run's; the checkpoint before the last may be of a step."""
    return [found for found in differences(folder, whole) if not found.startswith("checkpoints/previous.ckpt")]


def checkpoint(runs, name="last.ckpt"):
    return torch.load(only_file(runs, name), weights_only=True)


def moments(method):
    """Steps in the order in which a run comes to them: a random one, an epoch's last, one of validation."""
    source = random.Random(method)
    yield 0, source.randrange(BATCHES - 1), False
    if method == "asi":
        yield 1, BATCHES - 1, False
    else:
        yield source.choice([0, 1]), source.randrange(VALIDATED), True


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_the_very_step(whole, tmp_path, weights, capsys, method):
    words = command(tmp_path, weights, method)
    for number, code, (epoch, batch, validating) in zip((2, 15), (130, 143), moments(method), strict=True):
        moment = {"epoch": epoch, "batch": batch, "validating": validating, "number": number}
        assert main(with_callback(words, **moment)) == code
        assert re.fullmatch(r"interrupted during .* on digits, .*; the same command goes on\n", capsys.readouterr().err)
        saved = checkpoint(tmp_path)
        assert saved["global_step"] == epoch * BATCHES + (BATCHES if validating else batch + 1)
        assert saved[IDENTITY]
        assert (len(saved["optimizer_states"]), saved["epoch"]) == (1, epoch - 1)
        assert len(list(tmp_path.rglob("best.ckpt"))) == min(1, epoch)
    assert main(with_callback(words)) == 0
    assert "resuming: " in capsys.readouterr().out
    folder = only_file(tmp_path, "result.json").parent
    assert changed(folder, whole(method)) == []
    assert [row["epoch"] for row in metrics(folder)] == [0, 1, 2]
    (name,) = (kind for kind in saved["callbacks"] if kind.startswith("RandomState"))
    ours, theirs = (checkpoint(path)["callbacks"][name]["torch"] for path in (folder, whole(method)))
    assert torch.equal(ours, theirs), "the same numbers would be drawn from here on"


@pytest.mark.slow
def test_a_limit_of_time_ends_a_run_at_its_step_and_a_damaged_step_is_gone_round(whole, tmp_path, weights, capsys):
    words = command(tmp_path, weights, "vanilla")
    assert main(with_callback(with_callback(words), "StopIn", epoch=1, batch=2)) == 2
    assert "stopped after 1 of 3 epochs, at batch 3, by --trainer.max_time" in capsys.readouterr().err
    steps = [checkpoint(tmp_path, name)["global_step"] for name in ("last.ckpt", "previous.ckpt")]
    assert steps == [BATCHES + 3, BATCHES]
    last = only_file(tmp_path, "last.ckpt")
    last.write_bytes(last.read_bytes()[:-1000])
    assert main(with_callback(words)) == 0
    assert "going on from previous.ckpt" in capsys.readouterr().err
    only_file(tmp_path, "last.ckpt.unusable").unlink()
    assert changed(only_file(tmp_path, "result.json").parent, whole("vanilla")) == []


ACCUMULATED = ("--trainer.accumulate_grad_batches", 2, "--data.drop_last", "false", "--trainer.max_epochs", 2)


@pytest.mark.slow
def test_a_step_of_several_batches_is_ended_first(whole, tmp_path, weights):
    words = command(tmp_path, weights, "vanilla", *ACCUMULATED)
    assert main(with_callback(words, epoch=1, batch=2)) == 143
    saved = checkpoint(tmp_path)
    assert saved["global_step"] == 3 + 2  # of 2, 2 and 1 batches in an epoch
    (history,) = (state for kind, state in saved["callbacks"].items() if kind.startswith("History"))
    kept, losses, _, samples = history["pending"]
    assert (len(kept), len(losses), samples) == (4, 4, [8] * 4)
    assert main(with_callback(words)) == 0
    assert changed(only_file(tmp_path, "result.json").parent, whole("vanilla", *ACCUMULATED)) == []
