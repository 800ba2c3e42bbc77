"""ASI whose bases are iterated now and then: what a step keeps, when the bases are due, and resuming."""

import copy

import pytest
import torch
from layer_cases import bases_of, conv_model, step
from references import (
    TOLERANCE,
    MultiplicationCounter,
    autograd,
    low_rank_tensor,
    multiply,
    projected,
    random_tensor,
    subspace_step,
    unfold,
)
from torch import nn

import lowrank
from lowrank import ASI
from lowrank.tensors.geometry import ConvGeometry

SHAPE, RANKS = (5, 4, 7, 6), (3, 2, 3, 2)


def held_step(x, bases):
    """The channel and spatial bases as they are; the batch basis from one iteration on what these leave."""
    left = x
    for mode in (1, 2, 3):
        left = multiply(left, bases[mode].mT, mode)
    a = unfold(left, 0)
    return {**bases, 0: torch.linalg.qr(a @ (a.mT @ bases[0]))[0]}


@pytest.mark.parametrize("algorithm", ["sequential", "published"])
def test_every_third_step_iterates_and_the_others_project(algorithm):
    model = conv_model(ASI(RANKS, algorithm=algorithm, refresh=3))
    exact = copy.deepcopy(lowrank.revert(copy.deepcopy(model)))
    model(random_tensor(*SHAPE))
    for number in range(1, 8):
        x, grad = random_tensor(*SHAPE, seed=number), random_tensor(5, 6, 7, 6, seed=number)
        before = bases_of(model[0])
        before.pop(4)
        expected = subspace_step(x, before, algorithm == "sequential") if number % 3 == 0 else held_step(x, before)
        weight = autograd(exact, projected(x, expected), grad)[2]["0.weight"]
        model.zero_grad()
        model(x).backward(grad)
        torch.testing.assert_close(model[0].weight.grad, weight, **TOLERANCE)
        after = bases_of(model[0])
        assert [torch.equal(after[mode], before[mode]) for mode in (1, 2, 3)] == [number % 3 != 0] * 3


def test_bases_are_iterated_when_they_capture_less():
    model = conv_model(ASI(RANKS, refresh="energy"))
    x, other = low_rank_tensor(*SHAPE), low_rank_tensor(*SHAPE, seed=50)
    for _ in range(8):
        model(x)
    settled = bases_of(model[0])
    model(x[torch.tensor([3, 1, 4, 0, 2])] * 7)  # samples in another order, and larger, change no other mode
    moved = bases_of(model[0])
    assert all(torch.equal(moved[mode], settled[mode]) for mode in (1, 2, 3))
    settled = moved
    model(other)
    moved = bases_of(model[0])
    assert not any(torch.equal(moved[mode], settled[mode]) for mode in (1, 2, 3))
    settled.pop(4)
    iterated = subspace_step(other, settled, sequential=True)
    norm = torch.linalg.vector_norm
    expected = norm(projected(other, iterated)) ** 2 / norm(other) ** 2
    torch.testing.assert_close(moved[4], expected, **TOLERANCE)


@pytest.mark.parametrize(("captured", "iterated"), [(0.9905, False), (0.9895, True), (0.96, True)])
@pytest.mark.parametrize("before", [1.0, 0.8])
def test_bases_are_due_below_99_hundredths_of_what_they_captured(before, captured, iterated):
    """Three directions of the channel mode, each with a scene of its own, so that one iteration finds the first."""
    model = conv_model(ASI((5, 1, 7, 6), refresh="energy"))
    directions = torch.linalg.qr(random_tensor(4, 3))[0].mT
    scenes = torch.linalg.qr(random_tensor(5 * 7 * 6, 3, seed=1))[0].mT.view(3, 5, 7, 6)

    def images(*energies):
        shares = torch.tensor(energies, dtype=torch.float64)
        return torch.einsum("k,kc,kbhw->bchw", shares.sqrt(), directions, scenes)

    model(images(1, 0, 0))
    model(images(before, 0, 1 - before))
    settled = bases_of(model[0])
    torch.testing.assert_close(settled[4].double(), torch.tensor(before, dtype=torch.float64), rtol=1e-9, atol=0)
    model(images(captured * before, (1 - captured) * before, 1 - before))
    share = torch.tensor(captured * before if iterated else before, dtype=torch.float64)
    torch.testing.assert_close(bases_of(model[0])[4].double(), share, rtol=1e-9, atol=0)


@pytest.mark.parametrize("refresh", [100, "energy"])
def test_values_that_are_not_finite_are_recovered_from(refresh):
    model, x = conv_model(ASI(RANKS, refresh=refresh)), low_rank_tensor(*SHAPE)
    for batch in (x, torch.full_like(x, float("nan")), torch.full_like(x, float("inf")), x, x):
        gradients = step(model, batch)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert bases_of(model[0])[0].isfinite().all()


@pytest.mark.parametrize("refresh", [2, "energy"])
def test_smaller_batches_and_new_ranks_are_taken(refresh):
    model, x = conv_model(ASI(RANKS, refresh=refresh)), random_tensor(*SHAPE)
    for batch in (x, x[:2], x, x[:1]):
        gradients = step(model, batch)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    model[0]._lowrank.method = ASI((3, 3, 3, 2), refresh=refresh)
    step(model, x)
    assert bases_of(model[0])[1].shape == (4, 3)


def test_a_linear_layer_holds_the_modes_behind_the_batch():
    model = lowrank.convert(nn.Sequential(nn.Linear(6, 5)).double(), ["0"], ASI(2, refresh=4))
    model(random_tensor(7, 4, 6))
    before = bases_of(model[0])
    model(random_tensor(7, 4, 6, seed=1))
    assert [torch.equal(bases_of(model[0])[mode], before[mode]) for mode in range(3)] == [False, True, True]


def test_the_cost_is_that_of_the_mean_step():
    conv = nn.Conv2d(4, 6, 3, padding=1, dtype=torch.float64)
    method, geometry, x, state = ASI(RANKS, refresh=3), ConvGeometry.of(conv), random_tensor(*SHAPE), ()
    counted, steps = 0, 3
    for _ in range(steps):
        with MultiplicationCounter() as counter:
            _, state = method.compress(x, geometry, state, "layer")
        counted += 2 * counter.total
    qr = [4 * n * r**2 for n, r in zip(SHAPE, RANKS, strict=True)]
    assert method.subspace_flops(SHAPE, RANKS) == (counted + sum(qr) + 2 * qr[0]) // steps


@pytest.mark.parametrize("refresh", [0, -1, 2.0, True, "never", None])
def test_a_refresh_that_means_nothing_is_refused(refresh):
    with pytest.raises(lowrank.SettingError, match=r"refresh is .*; allowed: a whole number of steps"):
        ASI(2, refresh=refresh)


def test_bases_can_only_be_held_where_they_are_stored():
    with pytest.raises(lowrank.SettingError, match="warm_start"):
        ASI(2, warm_start=False, refresh=2)
