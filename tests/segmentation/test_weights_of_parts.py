"""Weights that a part of a network names for itself, in its `init_cfg`: told where it gets none, known by content."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from own_configs import errors

from segmentation.cli import main
from segmentation.quiet import register_modules


@pytest.fixture
def part(own, tmp_path):
    """The backbone's state dict, other than it begins without, and the file in which its `init_cfg` looks for it."""
    content, _ = own
    register_modules()
    torch.manual_seed(3)
    backbone = MODELS.build(Config(content["model"]["backbone"]))
    backbone.init_weights()
    path = tmp_path / "backbone.pth"
    content["model"]["backbone"]["init_cfg"] = {"type": "Pretrained", "checkpoint": str(path)}
    return backbone.state_dict(), path


def refused(command, capsys):
    for more in (["--dry-run"], []):
        assert main([*command, *more]) == 2
        (line,) = errors(capsys)
    return line


def test_a_part_that_gets_none_of_its_weights_is_refused(own, part, tmp_path, capsys):
    _, words = own
    state, path = part
    for other in ({"foo": torch.ones(3)}, {f"net.{key}": value for key, value in state.items()}):
        torch.save(other, path)
        assert f"weights {path} are not those of backbone: 0 of its " in refused(words(), capsys)
        assert "weights" in refused(words("measure"), capsys)
    path.unlink()
    assert f"{path} cannot be read: No such file" in refused(words(), capsys)
    assert not (tmp_path / "runs").exists()
    torch.save({"state_dict": state}, path)
    assert main(words("train", "--dry-run")) == 0


@pytest.mark.parametrize("address", ["torchvision://resnet18", "https://nowhere.invalid/net.pth"])
def test_a_dry_run_says_which_weights_would_be_downloaded(address, own, part, tmp_path, monkeypatch, capsys):
    content, words = own
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    content["model"]["backbone"]["init_cfg"]["checkpoint"] = address
    assert main(words("train", "--dry-run")) == 0
    assert f".pth is not on this machine; the run would download it to {tmp_path}" in capsys.readouterr().out
    content["load_from"] = "open-mmlab://nope"
    assert main(words("train", "--dry-run")) == 2
    assert "there are no weights open-mmlab://nope" in errors(capsys)[0]


def test_a_part_of_another_width_is_refused(own, part, capsys):
    _, words = own
    state, path = part
    torch.save({key: torch.cat([value, value]) if value.ndim else value for key, value in state.items()}, path)
    assert "are not those of backbone" in refused(words(), capsys)


def test_a_run_is_of_the_content_of_its_parts_weights_wherever_they_are(own, part, tmp_path, capsys):
    content, words = own
    state, path = part
    torch.save(state, path)
    assert main(words()) == 0
    final = torch.load(next(tmp_path.rglob("final.pth")), weights_only=True)["state_dict"]
    assert (final["backbone.stem.0.weight"] - state["stem.0.weight"]).abs().max() < 0.1
    moved = path.rename(tmp_path / "elsewhere.pth")
    content["model"]["backbone"]["init_cfg"]["checkpoint"] = str(moved)
    capsys.readouterr()
    assert main(words()) == 0
    assert "done already" in capsys.readouterr().out
    state["stem.0.weight"] += 0.5
    torch.save(state, moved)
    assert "holds a run with other settings (model.backbone.init_cfg.checkpoint is " in refused(words(), capsys)


@pytest.mark.slow
def test_a_run_is_of_the_content_of_its_weights_of_classes(own, tmp_path, capsys):
    content, words = own
    path = tmp_path / "classes.npy"
    content["model"]["decode_head"]["loss_decode"] = {"type": "CrossEntropyLoss", "class_weight": str(path)}
    assert f"{path} cannot be read: No such file" in refused(words(), capsys)
    np.save(path, [1.0, 2.0])
    assert main(words()) == 0
    np.save(path, [2.0, 1.0])
    assert "holds a run with other settings (model.decode_head.loss_decode.class_weight is " in refused(words(), capsys)
