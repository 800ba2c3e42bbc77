"""A signal ends a run at the end of its step, and it goes on from there, bit for bit, with dropout and augmentation."""

from __future__ import annotations

import random
import re
import signal

import pytest
import torch
from segmentors import TINY, files

from benchmarks.kills import differences
from segmentation.cli import main
from segmentation.history import History

METHODS = {"vanilla": "type='Vanilla'", "asi": "type='ASI', ranks=3", "wasi": "type='WASI', energy=0.9, ranks=3"}
LENGTH, VALIDATED, SAVED = 8, 3, 4  # iterations in all, between validations, between checkpoints


def arguments(data, runs, method):
    own = runs / f"{method}.py"
    own.write_text(f"lowrank = dict(method=dict({METHODS[method]}), dropout=True)\n")
    shipped = files("pspnet_small", "digit_scenes", "finetune", "vanilla")[:-1]
    where = ["--layers", "10", "--data-dir", data, "--runs-dir", runs, "--iterations", LENGTH]
    options = [f"train_cfg.val_interval={VALIDATED}", f"default_hooks.checkpoint.interval={SAVED}"]
    options.append("model.decode_head.dropout_ratio=0.5")
    return [*map(str, ["train", *shipped, own, *where]), *TINY, *options]


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """The folder of a run that no signal came to."""
    made = {}

    def make(method):
        if method not in made:
            runs = tmp_path_factory.mktemp("whole")
            assert main(arguments(data_dir, runs, method)) == 0
            made[method] = next(runs.rglob("result.json")).parent
        return made[method]

    return make


@pytest.fixture
def signal_at(monkeypatch):
    """Have a signal come in the middle of a step: of training, or of the validation after it."""

    def at(step, validating, number=signal.SIGTERM):
        def come(hook, runner, *arguments, **options):
            if runner.iter == step:
                monkeypatch.undo()
                signal.raise_signal(number)

        monkeypatch.setattr(History, "before_val_iter" if validating else "before_train_iter", come)

    return at


def moments(method):
    """A random step of training and one of validation for each method, one at a checkpoint, and the last step."""
    source = random.Random(method)
    yield source.choice([0, 1, 4, 5]), False
    yield source.choice([VALIDATED, 2 * VALIDATED, LENGTH]), True
    if method == "asi":
        yield from ((SAVED - 1, False), (2 * VALIDATED - 1, False), (LENGTH - 1, False))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "step", "validating"), [(method, *moment) for method in METHODS for moment in moments(method)]
)
def test_a_run_goes_on_from_the_very_step(whole, signal_at, data_dir, tmp_path, capsys, method, step, validating):
    words = arguments(data_dir, tmp_path, method)
    signal_at(step, validating)
    assert main(words) == 143
    assert re.fullmatch(r"interrupted during .*digit_scenes.*; the same command goes on\n", capsys.readouterr().err)
    saved = tmp_path.glob("**/iter_*.pth")
    assert max(int(path.stem[5:]) for path in saved) == step + (not validating)
    assert main(words) == 0
    assert "resuming: " in capsys.readouterr().out
    folder = next(tmp_path.rglob("result.json")).parent
    assert differences(folder, whole(method)) == []
    last = f"iter_{LENGTH}.pth"
    ours, theirs = (torch.load(path / last, weights_only=False)["lowrank_random"] for path in (folder, whole(method)))
    assert torch.equal(ours["torch"], theirs["torch"]), "the same numbers would be drawn from here on"


@pytest.mark.slow
def test_it_does_not_matter_how_often_a_run_is_stopped(whole, signal_at, data_dir, tmp_path):
    words = arguments(data_dir, tmp_path, "asi")
    for step, number, code in ((0, signal.SIGINT, 130), (1, signal.SIGTERM, 143), (5, signal.SIGINT, 130)):
        signal_at(step, False, number)
        assert main(words) == code
    assert main(words) == 0
    assert differences(next(tmp_path.rglob("result.json")).parent, whole("asi")) == []
