"""How several processes share the samples: what one process would take with the joined batch, and each one once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from classification.data.sampler import AugmentingShuffle, EachOnce, EpochShuffle
from experiment.processes import Place

LENGTHS, COUNTS, SIZES = st.integers(1, 200), st.integers(1, 5), st.integers(1, 9)


def batches(order, size):
    return [order[start : start + size] for start in range(0, len(order), size)]


@given(LENGTHS, COUNTS, SIZES, st.integers(0, 3))
def test_together_they_train_on_the_batches_of_one_process(length, count, size, epoch):
    shares = [EpochShuffle(length, 5, Place(rank, count)) for rank in range(count)]
    whole = EpochShuffle(length, 5)
    for sampler in [*shares, whole]:
        sampler.set_epoch(epoch)
    orders = [list(share) for share in shares]
    assert [len(order) for order in orders] == [len(share) for share in shares] == [length // count] * count
    joined = batches(list(whole), size * count)
    for number, parts in enumerate(zip(*(batches(order, size) for order in orders), strict=True)):
        together = [index for part in parts for index in part]
        assert len({len(part) for part in parts}) == 1
        expected = joined[number]
        assert sorted(together) == sorted(expected[: len(together)])
        assert len(expected) - len(together) < count


@given(LENGTHS, COUNTS)
def test_an_image_is_drawn_the_same_in_whichever_process(length, count):
    whole = dict(AugmentingShuffle(length, 5))
    shares = [pair for rank in range(count) for pair in AugmentingShuffle(length, 5, Place(rank, count))]
    assert all(whole[index] == seed for index, seed in shares)
    assert len(shares) == length // count * count


@given(LENGTHS, COUNTS, SIZES)
def test_every_sample_is_evaluated_once_in_equally_many_batches(length, count, size):
    if length < count:
        with pytest.raises(ValueError, match=f"{length} samples are too few for {count} processes"):
            EachOnce(length, size, Place(0, count))
        return
    shares = [list(EachOnce(length, size, Place(rank, count))) for rank in range(count)]
    assert sorted(index for share in shares for batch in share for index in batch) == list(range(length))
    assert {len(share) for share in shares} == {len(EachOnce(length, size, Place(0, count)))}
    assert all(1 <= len(batch) <= size + 1 for share in shares for batch in share)
    if count == 1:
        assert shares[0] == batches(list(range(length)), size)
