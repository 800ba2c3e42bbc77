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
from lowrank.tensors import storage
from lowrank.tensors.sample import sampled

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


SHAPES = {  # of a tensor, the mode, the rank, the share of its fibres, and which are in turn
    "batch": ((6, 10, 5, 7), 0, 3, 1),
    "channels": ((6, 10, 5, 7), 1, 4, 1),
    "height": ((6, 10, 5, 7), 2, 3, 1),
    "width": ((6, 10, 5, 7), 3, 5, 1),
    "tokens": ((9, 33, 20), 1, 20, 1),
    "many rows": ((3, 700, 5), 1, 9, 1),
    "one plane in four": ((8, 21, 6, 5), 2, 3, 4),
    "another one in four": ((8, 21, 6, 5), 2, 3, 4, 3),
    "one row in two": ((8, 20, 6, 5), 3, 3, 2, 1),
    "places of an image": ((8, 6, 70), 1, 2, -3),
    "other places": ((8, 6, 70), 1, 2, -3, 2, 1),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_basis_spans_what_the_operators_find(gpu, case):
    shape, mode, rank, share, *turn = SHAPES[case]
    x = random_tensor(*shape, dtype=torch.float32)
    start = random_tensor(shape[mode], rank, seed=1, dtype=torch.float32)
    found = gpu.iterate(x, mode, start, share, *turn)
    torch.testing.assert_close(found.mT @ found, torch.eye(rank), rtol=0, atol=2e-6)
    part, at = sampled(x.double(), mode, share, *turn)
    part = part.movedim(at, 0).flatten(1)
    expected = torch.linalg.qr((part @ (part.mT @ start.double())).cpu())[0]  # whose signs are LAPACK's
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=1e-4)


def test_a_basis_of_nothing_is_drawn_and_that_of_a_part_with_nothing_stays(gpu):
    start = torch.linalg.qr(random_tensor(9, 5, dtype=torch.float32))[0].contiguous()
    for x in (torch.zeros(8, 9, 64), torch.full((8, 9, 64), math.nan)):
        found = gpu.iterate(x, 1, start, 1)
        torch.testing.assert_close(found.mT @ found, torch.eye(5), rtol=0, atol=2e-6)
        assert (found.abs() > 1e-4).all()
    torch.testing.assert_close(
        (gpu.iterate(torch.zeros(8, 9, 64), 1, start, -2).mT @ start).abs(), torch.eye(5), rtol=0, atol=2e-6
    )
    x, start = torch.zeros(8, 9, 64), torch.eye(9)[:, :5].contiguous()
    x[:, 5:] = random_tensor(8, 4, 64, dtype=torch.float32)
    for _ in range(2):  # to come away from directions that hold nothing
        start = gpu.iterate(x, 1, start, -2)
    assert torch.linalg.matrix_norm(start[5:]) > 1.9


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf, 1e-30, 1e30])
def test_a_basis_is_orthonormal_and_finite_whatever_the_numbers(gpu, value):
    for x in (torch.full((4, 9, 6), value), value * random_tensor(4, 9, 6, dtype=torch.float32)):
        for start in (random_tensor(9, 5, dtype=torch.float32), torch.full((9, 5), value)):
            found = gpu.iterate(x, 1, start, 1)
            torch.testing.assert_close(found.mT @ found, torch.eye(5), rtol=0, atol=2e-6)


def test_bases_of_doubles_and_of_very_long_modes_are_left_to_the_operators(gpu):
    assert gpu.iterate(torch.ones(3, 4, dtype=torch.float64), 1, torch.ones(4, 2, dtype=torch.float64), 1) is None
    assert gpu.iterate(torch.ones(3, 20000), 1, torch.ones(20000, 2), 1) is None


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (64, 8), (1000, 5), (33, 1)])
def test_rounded_numbers_and_scales_are_those_of_the_operators(gpu, shape):
    x = random_tensor(*shape, dtype=torch.float32)
    special = x.clone()
    special.view(-1)[0] = 0
    special.view(-1)[-1], special[:, 0] = math.nan, special[:, 0] * 1e-38
    for given in (x, special, torch.full(shape, math.inf)):
        for name in ("columns", "blocks"):
            with library.plain():
                values, scales = getattr(storage, f"round_{name}")(given)
                restored = getattr(storage, name)(values, scales, torch.float32)
            found = getattr(gpu, f"round_{name}")(given)
            assert torch.equal(found[0], values)
            torch.testing.assert_close(found[1], scales, rtol=0, atol=0, equal_nan=True)
            back = getattr(gpu, f"restore_{name}")(*found)
            torch.testing.assert_close(back, restored, rtol=0, atol=0, equal_nan=True)
