"""What a run writes down: rows, what is carried through a checkpoint, and the time that is left."""

from __future__ import annotations

import csv
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lowrank
from experiment import history as module
from experiment.history import History, read_rows


@pytest.fixture
def clock(monkeypatch):
    """Time as the test tells it."""
    own = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: own.now))
    return own


@pytest.fixture
def network():
    """One converted layer, after a step: it keeps its input of 2 * 3 * 4 * 4 floats."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1))
    lowrank.convert(model, ["0"], lowrank.Vanilla())
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    return model


BYTES = 2 * 3 * 4 * 4 * 4


def steps(history, clock, network, *seconds):
    for each in seconds:
        history.step_start()
        clock.now += each
        history.step_end(network, loss=each)


def test_a_row_has_bytes_times_and_what_the_task_adds(tmp_path, clock, network):
    history = History(tmp_path)
    steps(history, clock, network, 1.0, 5.0, 2.0)
    clock.now += 10  # the validation
    assert history.mean_loss == pytest.approx(8 / 3)
    row = history.add({"miou": 0.5})
    assert row == {"miou": 0.5, "activation_bytes": BYTES, "step_seconds": 2.0, "seconds": 18.0}
    steps(history, clock, network, 3.0)
    history.add({"miou": 0.25})
    assert read_rows(tmp_path / "metrics.csv") == history.rows
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["miou"] for row in csv.DictReader(file)] == ["0.5", "0.25"]
    assert history.activation_bytes == BYTES
    assert history.times == {"step_median": statistics.median([1, 5, 2, 3]), "total": 21.0}


def test_a_resumed_history_goes_on_as_if_nothing_had_been(tmp_path, clock, network):
    interrupted = History(tmp_path)
    steps(interrupted, clock, network, 1.0)
    interrupted.add({})
    steps(interrupted, clock, network, 4.0, 2.0)
    clock.now += 0.5
    state = interrupted.state_dict()
    clock.now += 1000  # it lay still
    resumed = History(tmp_path)
    resumed.load_state_dict(state)
    resumed.start()
    steps(resumed, clock, network, 6.0)
    assert resumed.mean_loss == pytest.approx(12 / 3)
    row = resumed.add({})
    assert (row["step_seconds"], row["seconds"]) == (4.0, 12.5)
    assert resumed.times == {"step_median": 3.0, "total": 13.5}
    later = resumed.state_dict()
    resumed.load_state_dict(state)  # a checkpoint of before changes nothing
    assert resumed.state_dict() == later


def test_what_a_row_has_is_not_counted_again(tmp_path, clock, network):
    history = History(tmp_path)
    steps(history, clock, network, 1.0, 1.0)
    history.drop_pending()
    assert not history.has_steps
    steps(history, clock, network, 7.0)
    assert history.add({})["step_seconds"] == 7.0


def test_time_left_is_of_the_median_row_and_never_negative(tmp_path, clock, network):
    history = History(tmp_path)
    assert math.isnan(history.seconds_left(3))
    for seconds in (100.0, 10.0, 12.0):  # the first one was slow to start
        steps(history, clock, network, seconds)
        history.add({})
    assert history.seconds_left(3) == 36.0
    assert history.seconds_left(0.5) == 6.0
    assert history.seconds_left(-1) == 0.0


@pytest.mark.parametrize("content", ["", "a,b\n1\n", "a\nx\n", "\x00"])
def test_a_damaged_file_has_no_rows(tmp_path, content):
    (tmp_path / "metrics.csv").write_text(content)
    assert read_rows(tmp_path / "metrics.csv") == []
    assert read_rows(tmp_path / "missing.csv") == []


def test_the_mean_loss_is_over_samples_before_and_after_a_resume(tmp_path, network):
    first, second = History(tmp_path), History(tmp_path)
    first.step_end(network, 1.0, 8)
    second.load_state_dict(first.state_dict())
    second.step_end(network, 4.0, 4)
    assert second.mean_loss == pytest.approx((8 * 1.0 + 4 * 4.0) / 12)
    old = first.state_dict()
    old["pending"] = old["pending"][:3]  # as an earlier version saved it
    second.load_state_dict(old)
    assert second.mean_loss == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(value):
    network = nn.Linear(3, 2)
    History.require_finite(network)
    network.bias.data[1] = value
    with pytest.raises(lowrank.NonFiniteError, match="diverged"):
        History.require_finite(network)
    network.bias.requires_grad_(False)  # not what was trained
    History.require_finite(network)
