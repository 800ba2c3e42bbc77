"""Files of weights: numbers are read, code is named and not run, and no one is told to run it."""

import os
from fractions import Fraction

import numpy as np
import pytest
import torch

from experiment import ExperimentError
from experiment.weights import read_weights


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_tensors_plain_values_and_numbers_of_numpy_are_read(tmp_path):
    content = {"weight": torch.arange(3.0), "name": "x", "best": np.float64(0.5), "palette": np.eye(2, dtype=np.uint8)}
    torch.save(content, tmp_path / "a.pt")
    found = read_weights(tmp_path / "a.pt")
    assert torch.equal(found["weight"], content["weight"])
    assert (found["name"], found["best"], found["palette"].tolist()) == ("x", 0.5, [[1, 0], [0, 1]])


def test_code_is_named_and_not_run(tmp_path):
    torch.save({"state_dict": Touch(tmp_path / "executed")}, tmp_path / "a.pt")
    with pytest.raises(ExperimentError, match=r"a\.pt cannot be read: it holds posix\.system, which is code") as raised:
        read_weights(tmp_path / "a.pt")
    assert not (tmp_path / "executed").exists()
    assert str(raised.value).isprintable()
    assert "trust" not in str(raised.value)


def test_what_is_allowed_further_is_read(tmp_path):
    torch.save({"share": Fraction(1, 3)}, tmp_path / "a.pt")
    with pytest.raises(ExperimentError, match=r"fractions\.Fraction, which is code"):
        read_weights(tmp_path / "a.pt")
    assert read_weights(tmp_path / "a.pt", [Fraction]) == {"share": Fraction(1, 3)}
    with pytest.raises(ExperimentError, match="there is no weights file"):
        read_weights(tmp_path)
