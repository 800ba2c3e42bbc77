"""Weights that MMEngine averages as it trains: those that were validated are those that a run leaves."""

from __future__ import annotations

import pytest
import torch

from segmentation.cli import main


@pytest.mark.slow
def test_the_last_weights_are_those_that_were_validated(own, tmp_path):
    content, words = own
    content["custom_hooks"].append({"type": "EMAHook", "momentum": 0.5})
    content["optim_wrapper"]["optimizer"]["lr"] = 0.5
    assert main([*words("train"), "--work-dir", str(tmp_path / "run")]) == 0
    final, last = (
        torch.load(tmp_path / "run" / name, weights_only=False) for name in ("final.pth", "iter_4.pth")
    )  # MMEngine's own has both
    assert final.keys() == {"meta", "state_dict"}
    assert final["state_dict"].keys() == last["state_dict"].keys()
    assert all(torch.equal(final["state_dict"][name], value) for name, value in last["state_dict"].items())
    assert any(not torch.equal(last["ema_state_dict"][f"module.{n}"], v) for n, v in last["state_dict"].items())
