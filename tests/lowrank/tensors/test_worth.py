"""The rule for small tensors, against a count by real tensors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank.errors import SettingError
from lowrank.tensors import worth
from lowrank.tensors.geometry import ConvGeometry


def test_bytes_a_call_decide():
    assert worth.is_worth(100, 10, 10)
    assert not worth.is_worth(99, 10, 10)
    assert worth.is_worth(1, -1, math.inf), "what takes less time is worth it at any price"
    assert worth.is_worth(1, 1000, 0)
    assert not worth.is_worth(0, -1, 0), "what saves nothing never is"


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merging_counts_the_output_and_the_weight(groups, dtype):
    layer = nn.Conv2d(8, 12, (3, 2), 2, 1, groups=groups).to(dtype)
    x = torch.randn(2, 8, 9, 7, dtype=dtype)
    output, weight = F.conv2d(x, layer.weight, None, 2, 1, 1, groups).nbytes, layer.weight.nbytes
    calls = 46 + (4 * weight + 2 * (x.nbytes + output)) / worth.MOVED_A_CALL
    for smallest, expected in ((0.999 * output / calls, True), (1.001 * output / calls, False)):
        found = worth.merging_is_worth(ConvGeometry.of(layer), tuple(x.shape), 12, dtype.itemsize, smallest)
        assert found == expected


def test_a_large_output_is_worth_it_and_a_large_weight_is_not():
    thin, wide = (ConvGeometry.of(nn.Conv2d(c, c, 3, padding=1)) for c in (4, 256))
    assert worth.merging_is_worth(thin, (8, 4, 512, 512), 4, 4, math.inf)
    assert not worth.merging_is_worth(wide, (1, 256, 8, 8), 256, 4, 2**10)


def test_beyond_the_cache_products_take_passes_less():
    """Of their input and output, which other layers do not; a strided one is no product."""
    shape, megabyte = (16, 16, 64, 64), 2**20 / worth.MOVED_A_CALL
    found = {
        name: worth.merging_calls(ConvGeometry.of(layer), shape, 32, 4)
        for name, layer in (("one", nn.Conv2d(16, 32, 1)), ("three", nn.Conv2d(16, 32, 3, padding=1)))
    }
    passes = 2 * (8 - 1) + 4 * (4 - 1)  # of 8 MiB and 4 MiB, but for the first
    weights = 4 * 4 * 32 * 16 * (9 - 1) / worth.MOVED_A_CALL
    assert found["three"] - found["one"] == pytest.approx(passes * megabyte + weights)
    strided = worth.merging_calls(ConvGeometry.of(nn.Conv2d(16, 32, 1, 2)), shape, 32, 4)
    assert strided > 0 > found["one"]


def test_ahead_of_everything_trained_only_time_counts():
    assert not worth.merging_ahead_is_worth(2**22)
    assert worth.merging_ahead_is_worth(2**24)


def test_computing_again_counts_the_output_and_its_products():
    layer, x = nn.Conv2d(8, 12, 3, groups=4), torch.randn(2, 8, 9, 7)
    output = layer(x)
    macs = output.numel() * 2 * 9
    calls = worth._AGAIN + macs / worth.MACS_A_CALL + 6 * output.nbytes / worth.MOVED_A_CALL
    for smallest, expected in ((0.999 * output.nbytes / calls, True), (1.001 * output.nbytes / calls, False)):
        assert worth.again_is_worth(output.numel(), 18, 4, smallest) == expected
    assert not worth.again_is_worth(10**9, 1, 4, 2**15), "passes over a large tensor take time as well"


@pytest.mark.parametrize("smallest", [-1, math.nan, True, "large", None])
def test_what_is_no_price(smallest):
    with pytest.raises(SettingError, match="smallest is"):
        worth.check_smallest(smallest)
