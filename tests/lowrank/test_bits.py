"""Masks of one bit per element."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank import bits


@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=4),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 99),
)
def test_a_mask_comes_back_as_it_was(shape, order, seed):
    permutation = list(range(len(shape)))
    order.shuffle(permutation)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).permute(permutation)
    packed, place = bits.pack(x, lambda piece: piece > 0)
    assert packed.dtype == torch.uint8
    assert packed.nbytes == math.ceil(x.numel() / 8)
    mask = bits.unpack(packed, x.shape, place)
    assert torch.equal(mask, x > 0)
    if x.numel() and min(x.shape, default=1) > 1:
        assert mask.stride() == x.stride(), "in the memory order of the tensor, so that no product has to transpose"


def test_a_tensor_with_gaps_in_memory():
    x = torch.randn(4, 6, 5)[:, ::2, 1:]
    packed, place = bits.pack(x, lambda piece: piece > 0)
    assert torch.equal(bits.unpack(packed, x.shape, place), x > 0)


@pytest.mark.parametrize("count", [7, 8, 9, 64, 65, 127])
def test_pieces_join_without_a_seam(monkeypatch, count):
    monkeypatch.setattr(bits, "CHUNK", 8)
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    packed, place = bits.pack(x, lambda piece: piece > 0)
    assert torch.equal(bits.unpack(packed, x.shape, place), x > 0)


def test_every_byte_there_is():
    every = torch.arange(256)
    mask = (every[:, None] >> torch.arange(8)) & 1 == 1
    packed, place = bits.pack(mask.float(), lambda piece: piece > 0)
    assert torch.equal(packed.long(), every)
    assert torch.equal(bits.unpack(packed, mask.shape, place), mask)
