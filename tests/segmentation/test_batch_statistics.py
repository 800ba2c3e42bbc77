"""Batch normalisations that are trained with the batch's own statistics: what a record says, and what cannot be."""

from __future__ import annotations

import pytest
from own_configs import errors

from experiment import Record
from segmentation.cli import main

POOLING = {"type": "PSPHead", "in_channels": 64, "in_index": 3, "channels": 8, "pool_scales": (1, 2), "num_classes": 2}


def _pooled(content, statistics_of_one=True):
    """A head that pools to one pixel, for one image at a time, without a hook that would freeze its statistics."""
    norm = {"type": "BN", "requires_grad": True}
    content["model"]["decode_head"] = POOLING | {"norm_cfg": norm, "align_corners": False}
    content["train_dataloader"]["batch_size"] = 1 if statistics_of_one else 2
    content["custom_hooks"] = []


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_statistics_of_one_number_are_refused_before_anything_is_written(dry, own, tmp_path, capsys):
    content, words = own
    _pooled(content)
    assert main(words("train", *dry)) == 2
    (line,) = errors(capsys)
    assert "model.backbone.layer3.0.bn1 would take its statistics from one number a channel" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_batches_and_frozen_statistics_pass(own, capsys):
    content, words = own
    hook = dict(content["custom_hooks"][0], layers=["decode_head.bottleneck.conv"])
    _pooled(content, statistics_of_one=False)
    assert main(words("train", "--dry-run")) == 0
    _pooled(content)
    content["custom_hooks"] = [hook]
    assert main(words("train", "--dry-run")) == 0
    content["custom_hooks"] = [hook | {"freeze_statistics": False}]
    assert main(words("train", "--dry-run")) == 2


@pytest.mark.slow
def test_a_run_without_a_hook_is_measured_with_the_statistics_that_it_trains_with(own, tmp_path):
    content, words = own
    hook = dict(content["custom_hooks"][0], method={"type": "Vanilla"})
    kept = {}
    for name, hooks in (("none", []), ("unfrozen", [hook | {"freeze_statistics": False}]), ("frozen", [hook])):
        content["custom_hooks"] = hooks
        assert main([*words("train"), "--work-dir", str(tmp_path / name)]) == 0
        kept[name] = Record.load(tmp_path / name / "result.json").memory_bytes["saved_measured"]
    assert abs(kept["none"] - kept["unfrozen"]) < 256 < kept["none"] - kept["frozen"]
