"""Which fibres of a large tensor a basis is iterated on, and what that counts."""

import pytest
import torch
from references import MultiplicationCounter, fibres_by_definition, random_tensor, unfold

from lowrank.tensors.costs import subspace_flops
from lowrank.tensors.decompose import subspace_iteration
from lowrank.tensors.sample import sampled, share_of, taken

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
