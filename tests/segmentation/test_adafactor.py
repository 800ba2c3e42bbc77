"""The optimizer that MMEngine takes from Transformers: by its name as with MMEngine, and imported when it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys

import segmentation.training

assert "mmengine.optim" in sys.modules
assert "transformers" not in sys.modules
import torch
from mmengine.optim import build_optim_wrapper

from experiment import ExperimentError
from segmentation.building import mendable_parts

def built(**settings):
    wrapper = {"type": "OptimWrapper", "optimizer": {"type": "Adafactor", **settings}}
    return build_optim_wrapper(torch.nn.Linear(2, 3), wrapper).optimizer

optimizer = built(lr=0.5, relative_step=False)
from transformers import Adafactor

assert type(optimizer) is Adafactor
assert [len(group["params"]) for group in optimizer.param_groups] == [2]
assert (optimizer.defaults["lr"], optimizer.defaults["relative_step"]) == (0.5, False)
try:
    with mendable_parts():
        built(rate=0.5)
except ExperimentError as error:
    assert "cannot be built" in str(error) and "'rate'" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.slow
def test_it_is_that_of_transformers_which_a_command_does_not_import_for_others():
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
