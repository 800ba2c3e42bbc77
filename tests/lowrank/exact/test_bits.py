"""Masks of one bit per element."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import random_tensor

import lowrank
from lowrank.exact import bits
from lowrank.exact.activations import relu6


def above_zero(ones, piece, out):
    out.copy_(piece > 0)


def unpacked(packed, shape, place, dtype=torch.float32):
    return bits.masked(torch.ones(shape, dtype=dtype), packed, place, lambda one, mask, out: out.copy_(mask)) == 1


@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=4),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 99),
)
def test_a_mask_comes_back_as_it_was(shape, order, seed):
    permutation = list(range(len(shape)))
    order.shuffle(permutation)
    x = random_tensor(*shape, seed=seed, dtype=torch.float32).permute(permutation)
    packed, place = bits.pack(x, above_zero)
    assert packed.dtype == torch.uint8
    assert packed.nbytes == math.ceil(x.numel() / 8)
    mask = unpacked(packed, x.shape, place)
    assert torch.equal(mask, x > 0)
    if x.numel() and min(x.shape, default=1) > 1:
        assert mask.stride() == x.stride(), "in the memory order of the tensor, so that no product has to transpose"


def test_a_tensor_with_gaps_in_memory():
    x = torch.randn(4, 6, 5)[:, ::2, 1:]
    packed, place = bits.pack(x, above_zero)
    assert torch.equal(unpacked(packed, x.shape, place), x > 0)


@pytest.mark.parametrize("count", [7, 8, 9, 64, 65, 127])
def test_pieces_join_without_a_seam(monkeypatch, count):
    monkeypatch.setattr(bits, "CHUNK", 8)
    x = random_tensor(count, seed=count, dtype=torch.float32)
    packed, place = bits.pack(x, above_zero)
    assert torch.equal(unpacked(packed, x.shape, place), x > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool])
def test_every_byte_there_is(dtype):
    every = torch.arange(256)
    mask = (every[:, None] >> torch.arange(8)) & 1 == 1
    packed, place = bits.pack(mask.to(dtype), above_zero)
    assert torch.equal(packed.long(), every)
    entries = dtype if dtype.is_floating_point else torch.float32
    assert torch.equal(unpacked(packed, mask.shape, place, entries), mask)
    for join in (bits.join_sums, bits.join_words):
        joined = torch.zeros(256, dtype=torch.uint8).copy_(join(mask.to(entries)))
        assert torch.equal(joined.long(), every)


@pytest.mark.parametrize("layout", ["dense", "transposed", "expanded", "gaps"])
def test_a_gradient_of_any_layout(monkeypatch, layout):
    monkeypatch.setattr(bits, "CHUNK", 16)
    x = torch.randn(3, 4, 5, 2).contiguous(memory_format=torch.channels_last)
    grad = {
        "dense": torch.randn(3, 4, 5, 2).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(2, 5, 4, 3).permute(3, 2, 1, 0),
        "expanded": torch.randn(3, 4, 1, 1).expand(3, 4, 5, 2),
        "gaps": torch.randn(3, 4, 5, 4)[..., ::2],
    }[layout]
    before = grad.clone()
    result = bits.masked(grad, *bits.pack(x, above_zero), lambda piece, mask, out: torch.mul(piece, mask, out=out))
    assert torch.equal(result, grad * (x > 0))
    assert result.stride() == x.stride()
    assert torch.equal(grad, before)


def test_the_work_space_is_small():
    """A tensor, its activation, the gradient and the bits; beside that a few pieces."""
    x = torch.randn(2**22, requires_grad=True)
    peak = lowrank.peak_bytes(torch.nn.Identity(), lambda _, batch: relu6(batch).sum(), x)
    assert peak < 3 * x.nbytes + x.numel() // 8 + 3 * 4 * bits.CHUNK
