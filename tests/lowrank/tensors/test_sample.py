"""Which fibres of a large tensor a basis is iterated on, and what that counts."""

from contextlib import nullcontext
from math import prod

import pytest
import torch
from references import MultiplicationCounter, fibres_by_definition, multiply, random_tensor, unfold

from lowrank.kernels import library
from lowrank.tensors.costs import subspace_flops
from lowrank.tensors.decompose import subspace_iteration
from lowrank.tensors.sample import sampled, share_of, taken, turn_of

SHAPES = [
    (32, 27, 24, 20),
    (8, 44, 34, 28),
    (40, 200, 9, 13),
    (2, 22, 83, 76),
    (33, 140, 88),
    (32, 60, 150),
    (64, 90, 7, 7),
    (64, 40, 14, 14),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_they_are_those_of_the_definition_and_as_many_as_are_counted(shape):
    x = random_tensor(*shape)
    shares = {mode: share_of(shape, mode, 2) for mode in range(len(shape))}
    assert shares[0] == 1
    assert any(share != 1 for share in shares.values())
    for mode, share in shares.items():
        part, place = sampled(x, mode, share)
        assert part.numel() == taken(shape, mode, 2)
        assert part.numel() >= 128 * 2 * shape[mode]
        if share != 1:
            wanted = fibres_by_definition(x, mode, share)
            found = unfold(part, place)
            torch.testing.assert_close(found @ found.mT, wanted @ wanted.mT)


@pytest.mark.parametrize("passes", [1, 7, 15, 16, 101])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_every_pass_they_are_those_of_the_definition(shape, passes):
    x = random_tensor(*shape)
    for mode in range(1, len(shape)):
        share = share_of(shape, mode, 2)
        turn = turn_of(passes, prod(shape[mode + 1 :]), share)
        part, place = sampled(x, mode, share, *turn)
        assert part.numel() >= 128 * 2 * shape[mode]
        if share != 1:
            wanted = fibres_by_definition(x, mode, share, *turn)
            found = unfold(part, place)
            torch.testing.assert_close(found @ found.mT, wanted @ wanted.mT)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_a_round_of_passes_each_number_is_in_turn_once(shape):
    for mode in range(1, len(shape)):
        share = share_of(shape, mode, 2)
        right = prod(shape[mode + 1 :])
        counts = times_taken(shape, mode, share, [turn_of(passes, right, share) for passes in range(abs(share))])
        if share > 0:
            assert (counts == 1).all()
        else:  # what the share does not divide is at one end or the other
            assert counts.max() <= 2
            assert (counts[..., right % share : right - right % -share] > 0).all()


@pytest.mark.parametrize("every", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_number_is_left_out_for_good_where_only_some_passes_count(shape, every):
    """As with activations that are computed again in the backward pass, and with bases that are kept for some steps."""
    for mode in range(1, len(shape)):
        share = share_of(shape, mode, 2)
        turns = {turn_of(passes, prod(shape[mode + 1 :]), share) for passes in range(every - 1, 400 * every, every)}
        assert (times_taken(shape, mode, share, turns) > 0).all()


def times_taken(shape, mode, share, turns):
    """How often each number is in the parts of some turns, (left, n, right)."""
    places = torch.arange(prod(shape)).view(shape)
    parts = torch.cat([sampled(places, mode, share, *turn)[0].flatten() for turn in turns])
    return parts.bincount(minlength=prod(shape)).view(prod(shape[:mode]), shape[mode], -1)


def only(x, mode, share, turn):
    """What the fibres of a turn hold, and zeros elsewhere."""
    mask = torch.zeros(x.shape)
    places = torch.arange(x.numel()).view(x.shape)
    mask.view(-1)[sampled(places, mode, share, *turn)[0].flatten()] = 1
    return x * mask


@pytest.mark.parametrize(
    ("shape", "mode", "rank", "share"),
    [((32, 128, 128), 2, 4, 8), ((64, 90, 7, 7), 1, 8, -3), ((8, 44, 34, 28), 3, 3, 4)],
)
@pytest.mark.parametrize("within", [True, False], ids=["in one turn alone", "in all turns but one"])
@pytest.mark.parametrize("kernels", [True, False])
def test_what_one_turn_does_not_see_is_found_by_another_and_not_lost(shape, mode, rank, share, within, kernels):
    directions = random_tensor(shape[mode], rank, seed=1)
    few = random_tensor(*[rank if m == mode else n for m, n in enumerate(shape)], seed=2)
    x = multiply(few, directions, mode).float().contiguous()
    assert share_of(shape, mode, rank) == share
    turns, right = abs(share), prod(shape[mode + 1 :])
    seen = turns // 2  # in the middle of the first round
    part = only(x, mode, share, turn_of(seen, right, share))
    x = part if within else x - part
    starts = [random_tensor(n, rank, seed=3).float() if m == mode else None for m, n in enumerate(shape)]
    errors = []
    with nullcontext() if kernels else library.plain():
        for passes in range(2 * turns):
            tucker, starts = subspace_iteration(x, starts, passes_before=passes)
            errors.append(((x - tucker.dense()).norm() / x.norm()).item())
    missed = [error > 0.5 for error in errors]
    assert missed == ([True] * seen + [False] * (2 * turns - seen) if within else [False] * 2 * turns)


@pytest.mark.parametrize("kernels", [True, False])
def test_a_basis_that_sees_nothing_of_a_part_that_has_something_is_given_up(kernels):
    x = torch.zeros(32, 128, 128)
    x[..., 64:] = random_tensor(32, 128, 1, seed=1).float() * random_tensor(64).float()
    starts = [None, None, torch.eye(128)[:, :4]]
    with nullcontext() if kernels else library.plain():
        for passes in range(3):
            tucker, starts = subspace_iteration(x, starts, passes_before=passes)
    torch.testing.assert_close(tucker.dense(), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_every_place_of_the_other_modes_is_taken_as_often(mode):
    shape = (32, 24, 32, 40)
    share = share_of(shape, mode, 2)
    for other in (other for other in range(1, 4) if other != mode):
        places = torch.arange(shape[other]).view([-1 if m == other else 1 for m in range(4)])
        part, _ = sampled(places.expand(shape).contiguous(), mode, share)
        counts = part.flatten().bincount(minlength=shape[other])
        assert counts.min() == counts.max() > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_multiplications_are_counted_as_they_are_executed(shape):
    ranks = [min(n, rank) for n, rank in zip(shape, (2, 3, 2, 2), strict=False)]
    starts = [random_tensor(n, r, seed=n) if r < n else None for n, r in zip(shape, ranks, strict=True)]
    with MultiplicationCounter() as counter:
        subspace_iteration(random_tensor(*shape), starts)  # in double precision: by operators
    qr = sum(4 * n * r**2 for n, r in zip(shape, ranks, strict=True) if r < n)
    assert subspace_flops(shape, ranks, True) == 2 * counter.total + qr


@pytest.mark.parametrize(
    ("shape", "mode", "rank", "share"),
    [
        ((64, 576, 7, 7), 1, 8, -3),  # a vector of each image's places
        ((64, 160, 14, 14), 1, 8, -12),
        ((64, 160, 14, 14), 1, 9, -8),  # fewer would be too few for so many columns
        ((31, 1160, 14, 14), 1, 4, -4),  # few samples
        ((64, 32, 56, 56), 2, 4, 16),
        ((64, 24, 56, 56), 2, 4, 8),  # of 16, a third of the channels would never be taken
        ((16, 64, 56, 56), 2, 4, 4),
    ],
)
def test_the_fewest_are_taken_that_tell_enough(shape, mode, rank, share):
    assert share_of(shape, mode, rank) == share
    assert taken(shape, mode, rank) >= 128 * rank * shape[mode]


@pytest.mark.parametrize(
    ("shape", "mode", "rank"),
    [((32, 27, 8, 20), 2, 2), ((64, 384, 7, 7), 1, 13), ((1, 64, 112, 112), 1, 4), ((300000, 8), 0, 2)],
    ids=["a small tensor", "few for the rank", "one image, of which some columns would never be taken", "the batch"],
)
def test_where_they_are_few_all_are_taken(shape, mode, rank):
    assert share_of(shape, mode, rank) == 1
