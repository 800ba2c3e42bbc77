"""What is tried against bias: each does what it says."""

import pytest
import torch
from torch import nn

import lowrank
from benchmarks import bias
from benchmarks.bias import Compensated, ExactAtTimes, Squared, Twice
from benchmarks.fashion import Run, Task, Way
from lowrank import ASI
from lowrank.tensors.storage import restore

RUN = Run("1", "asi", 4, 0)
FEW = [4, 2, 2, 2]


class Small(Task):
    """A task without the files that a real one needs."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 25, 3))
        self.names, self.tail = ["0"], self.model


class SmallSquared(Squared, Small):
    """The same with squared perplexities."""


def batch():
    random = torch.Generator().manual_seed(1)
    return (torch.randn(32, 4, 5, 5, generator=random),), torch.arange(32) % 3


def gradients(task, way, step):
    task.model.zero_grad()
    way.backward(RUN, task, batch(), (0, step))
    return [parameter.grad.clone() for parameter in task.model.parameters()]


def test_a_step_in_four_has_the_exact_gradient_and_the_bases_go_on():
    exact, task = gradients(Small(), Way(), 0), Small()
    task.convert(RUN, batch())
    low = gradients(task, Way(), 1)
    bases = lowrank.training_state(task.model)
    for own, expected in zip(gradients(task, ExactAtTimes(), 4), exact, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    assert (low[0] - exact[0]).norm() > 0.01 * exact[0].norm()
    assert bases
    for name, basis in lowrank.training_state(task.model).items():
        torch.testing.assert_close(basis, bases[name], rtol=0, atol=0)


def test_squares_are_of_the_perplexities_of_all_candidates():
    plain, squared = (task.measure(RUN, batch()).layers[0] for task in (Small(), SmallSquared()))
    for own, expected in ((squared, plain), (squared.mixed, plain.mixed)):
        assert own.perplexity == pytest.approx([value**2 for value in expected.perplexity])
        assert own.ranks == expected.ranks


@pytest.mark.parametrize("storage", ["input", "int8"])
def test_a_compensated_form_has_the_norm_of_the_input(storage):
    x, geometry = batch()[0][0], lowrank.ConvGeometry.of(nn.Conv2d(4, 6, 3))
    kept = [method(FEW, storage=storage).compress(x, geometry, (), "")[0] for method in (ASI, Compensated)]
    norms = [restore(each, x.dtype).dense().norm() for each in kept]
    assert norms[0] < 0.9 * x.norm()
    assert norms[1] == pytest.approx(float(x.norm()), rel=1e-5 if storage == "input" else 1e-2)


def test_a_second_iteration_captures_more_of_a_new_input():
    x, geometry = (
        batch()[0][0] * 0.8 ** torch.arange(32.0)[:, None, None, None],
        lowrank.ConvGeometry.of(nn.Conv2d(4, 6, 3)),
    )
    kept = [method(FEW).compress(x, geometry, (), "")[0] for method in (ASI, Twice)]
    once, twice = ((restore(each, x.dtype).dense() - x).norm() for each in kept)
    assert twice < 0.99 * once


def test_ranks_are_chosen_anew_at_an_epoch_s_start(monkeypatch):
    task, chosen = Small(), []
    task.convert(RUN, batch())
    monkeypatch.setattr(task, "convert", lambda run, given: chosen.append(run))
    for at in ((0, 0), (1, 0), (1, 1)):
        bias.Again().backward(RUN, task, batch(), at)
    assert chosen == [RUN]
