"""Pooling that keeps places or shapes: PyTorch's values and gradients, and how much less it keeps."""

import pytest
import torch
import torch.nn.functional as F
from function_cases import compare, kept
from hypothesis import assume, given
from hypothesis import strategies as st
from references import DEVICE, random_tensor

from lowrank.exact import pooling

SIDES = st.tuples(st.integers(1, 4), st.integers(1, 4))


@pytest.mark.slow
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=SIDES,
    stride=st.none() | SIDES,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    ceil_mode=st.booleans(),
    channels_last=st.booleans(),
)
def test_pooling_of_every_geometry(size, kernel, stride, padding, dilation, ceil_mode, channels_last):
    assume(all(2 * p <= k for p, k in zip(padding, kernel, strict=True)))
    x = random_tensor(2, 3, *size)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if all(n + 2 * p >= span for n, p, span in zip(size, padding, spans, strict=True)):
        settings = (kernel, stride, padding, dilation, ceil_mode)
        compare(lambda v: F.max_pool2d(v, *settings), lambda v: pooling.max_pool2d(v, *settings), x)
    # Of a padded average in channels last PyTorch's own gradient on a GPU leaves the padding out of account.
    known = DEVICE == "cpu" or not (channels_last and any(padding))
    if known and all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)):
        for count_include_pad, divisor in ((True, None), (False, None), (True, 3)):
            average = (kernel, stride, padding, ceil_mode, count_include_pad, divisor)
            compare(lambda v, a=average: F.avg_pool2d(v, *a), lambda v, a=average: pooling.avg_pool2d(v, *a), x)


@pytest.mark.parametrize("shape", [(9, 8, 121, 121), (9, 364, 321)])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_a_large_batch_is_pooled_as_a_small_one(shape, form):
    x = random_tensor(*shape)
    x = x.contiguous(memory_format=form) if len(shape) == 4 else x
    compare(lambda v: F.max_pool2d(v, 3, 2, 1), lambda v: pooling.max_pool2d(v, 3, 2, 1), x)


def test_ties_go_to_the_element_that_pytorch_takes():
    x = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    compare(lambda v: F.max_pool2d(v, 3, 2, 1), lambda v: pooling.max_pool2d(v, 3, 2, 1), x)


@pytest.mark.parametrize("size", [1, 2, (3, 5), (None, 4)])
def test_adaptive_pooling(size):
    x = random_tensor(2, 3, 7, 8)
    compare(lambda v: F.adaptive_avg_pool2d(v, size), lambda v: pooling.adaptive_avg_pool2d(v, size), x)
    assert kept(lambda v: pooling.adaptive_avg_pool2d(v, size), x) == 0


def test_pooling_keeps_a_byte_per_output_or_nothing():
    x = random_tensor(2, 3, 8, 8)
    assert kept(lambda v: pooling.max_pool2d(v, 2), x) == 2 * 3 * 4 * 4
    assert kept(lambda v: pooling.avg_pool2d(v, 2), x) == 0


def test_what_a_byte_cannot_number_is_left_to_pytorch():
    x = random_tensor(1, 1, 40, 40)
    compare(lambda v: F.max_pool2d(v, 17), lambda v: pooling.max_pool2d(v, 17), x)
    _y, indices = pooling.max_pool2d(x.requires_grad_(True), 2, return_indices=True)
    assert torch.equal(indices, F.max_pool2d(x, 2, return_indices=True)[1])
