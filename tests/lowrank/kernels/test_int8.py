"""Rounding to int8 and back in one compiled pass against PyTorch's operators."""

import math

import pytest
import torch

from lowrank import kernels
from lowrank.kernels import library, rounding
from lowrank.tensors.storage import blocks, columns, round_blocks, round_columns

pytestmark = [
    pytest.mark.cpu_only("compiled kernels work in its memory"),
    pytest.mark.skipif(not kernels.status().active, reason=str(kernels.status())),
]
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1e-31, 1e-28]


def values(count, special):
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)).exp() - 1
    x[: count // 4] = torch.arange(count // 4) - 63.5  # ties
    places = torch.randperm(count, generator=torch.Generator().manual_seed(1))[: len(SPECIAL)]
    x[places] = torch.tensor(SPECIAL)[: len(places)] if special else 0.0
    return x


def same(ours, plain):
    """Scales equal; values too, but where a scale is not finite, which is all that counts there."""
    (found, scale), (wanted, other) = ours, plain
    assert (found.dtype, scale.dtype) == (torch.int8, torch.bfloat16)
    torch.testing.assert_close(scale, other, rtol=0, atol=0, equal_nan=True)
    return found, wanted, scale


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("shape", [(1,), (31,), (32,), (33,), (4, 5, 6, 7), (3, 70001)])
def test_blocks(shape, special):
    x = values(math.prod(shape), special).view(shape)
    assert rounding.round_blocks(x) is not None
    with library.plain():
        plain = round_blocks(x)
    found, wanted, scale = same(round_blocks(x), plain)
    finite = scale.isfinite().repeat_interleave(32)[: x.numel()].view(shape)
    assert torch.equal(found[finite], wanted[finite])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        back = blocks(found, scale, dtype)
        with library.plain():
            other = blocks(wanted, scale, dtype)
        torch.testing.assert_close(back, other, rtol=0, atol=0, equal_nan=True)
        assert back[~finite].isnan().all()


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (960, 8), (33, 64)])
def test_columns(shape, special):
    x = values(math.prod(shape), special).view(shape)
    assert rounding.round_columns(x) is not None
    with library.plain():
        plain = round_columns(x)
    found, wanted, scale = same(round_columns(x), plain)
    finite = scale.isfinite()
    assert torch.equal(found[:, finite], wanted[:, finite])
    for dtype in (torch.float32, torch.float16, torch.float64):
        back = columns(found, scale, dtype)
        with library.plain():
            other = columns(wanted, scale, dtype)
        torch.testing.assert_close(back, other, rtol=0, atol=0, equal_nan=True)
        assert back[:, ~finite].isnan().all()


@pytest.mark.parametrize("threads", [2, 3])
def test_several_threads_do_what_one_does(threads):
    x, before, found = values(9 * 65536 + 5, False), torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            rounded, scale = round_blocks(x)
            found.append((rounded, scale, blocks(rounded, scale, torch.float32)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_views_halves_and_doubles_are_rounded_as_ever():
    x = values(600, False).view(20, 30)
    assert rounding.round_columns(x.mT) is None
    assert rounding.round_blocks(x.double()) is None
    for seen in (x.mT, x[:, ::2], x.bfloat16(), x.double()):
        with library.plain():
            plain = round_columns(seen), round_blocks(seen)
        for ours, wanted in zip((round_columns(seen), round_blocks(seen)), plain, strict=True):
            assert torch.equal(ours[0], wanted[0])
            assert torch.equal(ours[1], wanted[1])
