"""Weights, checkpoints and configs of segmentation, damaged in any place: what they hold, or one line."""

import io

import pytest
import torch
from fuzzing import SECONDS, assert_told, damaged
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config

from experiment import ExperimentError
from experiment.checkpoints import IDENTITY
from segmentation.checkpoints import newest, read
from segmentation.compose import read_run_config

STATE = {"weight": torch.arange(24.0).reshape(4, 6)}
RUN = {
    **{"meta": {"iter": 2, "epoch": 0}, "state_dict": STATE, "message_hub": {}, "optimizer": {}},
    IDENTITY: "mine",
}
CONFIG = b"model:\n  type: A\n  size: !!python/tuple\n  - 1\n  - 2\nstage: finetune\nlist: &a [1, 2]\nother: *a\n"


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


FORMATS = [saved({"state_dict": STATE}), saved({"state_dict": STATE}, _use_new_zipfile_serialization=False)]


@SECONDS
@given(content=st.sampled_from(FORMATS).flatmap(damaged))
def test_damaged_weights_of_either_format_are_read_or_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    try:
        assert isinstance(read(path), dict)
    except ExperimentError as error:
        assert_told(error, path)


@pytest.mark.slow
@SECONDS
@given(content=damaged(saved(RUN)))
def test_a_run_goes_on_from_a_whole_checkpoint_whatever_became_of_the_last(tmp_path, content):
    (tmp_path / "iter_2.pth").write_bytes(saved(RUN))
    (tmp_path / "iter_4.pth").write_bytes(content)
    (tmp_path / "last_checkpoint").write_text("/elsewhere/iter_4.pth")
    found = torch.load(newest(tmp_path, "mine"), weights_only=True)
    assert torch.equal(found["state_dict"]["weight"], STATE["weight"])


@SECONDS
@given(content=damaged(CONFIG))
def test_a_damaged_config_of_a_run_is_settings_or_refused(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(read_run_config(path), Config)
    except ExperimentError as error:
        assert_told(error, path)
