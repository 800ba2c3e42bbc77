"""The GPU's kernels against their rules: on the GPU with `--device cuda`, otherwise in Triton's interpreter, with
`TRITON_INTERPRET=1` in the environment."""

import math
import os

import pytest
import torch
from references import DEVICE, random_tensor

from lowrank import kernels
from lowrank.exact import bits
from lowrank.kernels import library

SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 6.0, -3.0, 3.0, 1e-45, -1e-45, 1e38, -1e38]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GATES = {
    "above": lambda x: ~(x <= 0),
    "between": lambda x: ~((x <= 0) | (x >= 6)),
    "within": lambda x: (x > 0) & (x < 6),
    "strictly above": lambda x: x > 0,
    "not zero": lambda x: x != 0,
}
on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="of a GPU's memory: --device cuda")


@pytest.fixture(scope="module")
def gpu():
    pytest.importorskip("triton", reason="there is no Triton, which comes with PyTorch for CUDA")
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET is not 1, without which Triton needs a GPU")
    from lowrank.kernels import gpu

    return gpu


def values(count, dtype, seed=0):
    x = 4 * random_tensor(count, seed=seed, dtype=torch.float32).to(dtype)
    x[: len(SPECIAL)] = torch.tensor(SPECIAL).to(dtype)[:count]
    return x


def unpacked(packed):
    return ((packed[:, None] >> torch.arange(8)) & 1).view(-1).bool()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 8, 9, 5001])
def test_bits_are_those_of_the_rule_and_gradients_its_slopes(gpu, count, dtype):
    x, grad = values(count, dtype), values(count, dtype, seed=1).flip(0)
    packed, out = torch.full((-(-count // 8),), 77, dtype=torch.uint8), torch.empty_like(grad)
    for gate, rule in GATES.items():
        assert gpu.pack(x, gate, 0.0, 6.0, packed)
        assert torch.equal(unpacked(packed)[:count], rule(x)), gate
        assert not unpacked(packed)[count:].any()
        for inner, outer in ((1.0, None), (1 / 6, None), (1.0, 0.01), (1 / 0.7, 0.0)):
            assert gpu.apply(grad, packed, inner, outer, out)
            elsewhere = torch.zeros_like(grad) if outer is None else grad.float() * outer
            expected = torch.where(rule(x), grad.float() * inner, elsewhere).to(dtype)
            torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=1e-44, equal_nan=True)


def test_booleans_are_packed_and_doubles_left_to_pytorch(gpu):
    mask, packed = values(1001, torch.float32) > 1, torch.empty(126, dtype=torch.uint8)
    assert gpu.pack(mask, "not zero", 0.0, 0.0, packed)
    assert torch.equal(unpacked(packed)[:1001], mask)
    double = torch.ones(8, dtype=torch.float64)
    assert not gpu.pack(double, "above", 0.0, 0.0, packed[:1])
    assert not gpu.apply(double, packed[:1], 1.0, None, torch.empty_like(double))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_with_and_without_them_bits_and_gradients_are_the_same(dtype):
    """Of every gate that activations have, NaN and infinities too, over the seams of what is packed at once."""
    count = 4 * bits.CHUNK + 77
    x, grad = values(count, dtype), values(count, dtype, seed=1).flip(0)
    assert "Triton" in kernels.status().gpu
    for gate in (
        *map(bits.Gate, ("above", "strictly above", "not zero")),
        *(bits.Gate(g, 0.0, 6.0) for g in ("between", "within")),
    ):
        found, place = bits.pack(x, gate)
        with library.plain():
            assert torch.equal(bits.pack(x, gate)[0], found), gate
        for slopes in (bits.Slopes(), bits.Slopes(outer=0.01), bits.Slopes(1 / 0.7, 0.0)):
            one = bits.masked(grad, found, place, slopes)
            with library.plain():
                other = bits.masked(grad, found, place, slopes)
            torch.testing.assert_close(one, other, rtol=2 * torch.finfo(dtype).eps, atol=1e-44, equal_nan=True)
