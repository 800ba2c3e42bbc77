"""Gradients of the two factors of a weight from a Tucker form of the input: against autograd, and what they cost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import TOLERANCE, LargeTensors, MultiplicationCounter, random_tensor

from lowrank.tensors.gradients import factor_gradient_macs, factor_gradients
from lowrank.tensors.tucker import Tucker

SHAPES = [(20, 6), (4, 5, 6), (2, 3, 4, 6)]


def tucker_of(shape, ranks, seed=0):
    factors = [
        random_tensor(size, rank, seed=seed + 10 + mode) if rank < size else None
        for mode, (size, rank) in enumerate(zip(shape, ranks, strict=True))
    ]
    return Tucker(random_tensor(*ranks, seed=seed), tuple(factors))


def case(shape, ranks, outputs, rank, seed=0):
    left, right = random_tensor(outputs, rank, seed=seed + 1), random_tensor(rank, shape[-1], seed=seed + 2)
    return tucker_of(shape, ranks, seed + 3), random_tensor(*shape[:-1], outputs, seed=seed + 4), left, right


def by_autograd(tucker, grad, left, right):
    left, right = left.clone().requires_grad_(), right.clone().requires_grad_()
    y = torch.nn.functional.linear(tucker.dense(), left @ right)
    return torch.autograd.grad(y, (left, right), grad)


@given(st.data(), st.sampled_from(SHAPES), st.integers(1, 8), st.integers(1, 6))
def test_they_are_those_of_autograd_on_the_input_that_was_kept(choose, shape, outputs, rank):
    ranks = tuple(choose.draw(st.integers(1, size)) for size in shape)
    given_case = case(shape, ranks, outputs, rank)
    expected = by_autograd(*given_case)
    for through in (None, given_case[1] @ given_case[2]):
        found = factor_gradients(*given_case, through)
        torch.testing.assert_close(found, tuple(expected), **TOLERANCE)


RANKS = {
    "whole": lambda shape: shape,
    "few channels": lambda shape: (*shape[:-1], 2),
    "more channels than the weight's rank": lambda shape: (*shape[:-1], 5),
    "few of all": lambda shape: tuple(min(2, size) for size in shape),
    "all channels": lambda shape: (*(min(2, size) for size in shape[:-1]), shape[-1]),
}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_their_multiplications_are_counted_as_they_are_executed(shape, ranks, known):
    given_case = case(shape, ranks(shape), outputs=7, rank=3)
    through = given_case[1] @ given_case[2] if known else None
    with MultiplicationCounter() as counter:
        factor_gradients(*given_case, through)
    assert counter.total == factor_gradient_macs(shape, ranks(shape), 7, 3, known)


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_nothing_of_the_weights_size_is_formed(ranks):
    shape, outputs = (3, 4, 60), 70
    kept = tuple(min(10 * rank, size) for rank, size in zip(ranks((3, 4, 6)), shape, strict=True))
    given_case = case(shape, kept, outputs, 20)
    with LargeTensors(outputs * 60) as large:
        factor_gradients(*given_case)
    assert large.found == []
