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

METHODS = {"asi": "type='ASI', ranks=3", "vanilla": "type='Vanilla'"}
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


# Where signals come, in the order in which a run comes there: its step, whether of validation, and the signal's number.
RANDOM = random.Random(16)
MOMENTS = {
    "asi": ((RANDOM.choice([0, 1]), False, signal.SIGINT), (2 * VALIDATED, True, signal.SIGTERM)),
    "vanilla": ((RANDOM.choice([SAVED - 1, SAVED]), False, signal.SIGTERM),),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", MOMENTS)
def test_a_run_goes_on_from_the_very_step(whole, signal_at, data_dir, tmp_path, capsys, method):
    words = arguments(data_dir, tmp_path, method)
    for step, validating, number in MOMENTS[method]:
        signal_at(step, validating, number)
        assert main(words) == 128 + number
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
