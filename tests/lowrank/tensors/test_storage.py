"""Tucker forms in fewer bits: bytes, rounding, and what comes back of numbers that are not finite."""

from math import ceil, prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import multiply, random_tensor
from strategies import SHAPES

from lowrank import ASI, HOSVD, SVD, SettingError
from lowrank.tensors.storage import STORAGES, kept_ranks, restore, round_blocks, round_columns, store, stored_bytes
from lowrank.tensors.tucker import Tucker

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def form(shape, ranks, dtype=torch.float64, seed=0):
    """A Tucker form with the factors that are not the identity, and the tensor that it stands for."""
    core = random_tensor(*ranks, seed=seed).to(dtype)
    sizes = zip(shape, ranks, strict=True)
    factors = [random_tensor(n, r, seed=seed + 1 + n).to(dtype) if r < n else None for n, r in sizes]
    dense = core.double()
    for mode, factor in enumerate(factors):
        dense = dense if factor is None else multiply(dense, factor.double(), mode)
    return Tucker(core, tuple(factors)), dense.to(dtype)


def slow_rounding(numbers):
    """A column or block as it comes back, number by number; the scale in bfloat16 is the upper half of a float32."""
    largest = np.float32(max(abs(float(number)) for number in numbers))
    bits = int((largest / np.float32(127)).view(np.uint32))
    bits += 0x7FFF + (bits >> 16 & 1)
    scale = float(np.uint32(bits & 0xFFFF0000).view(np.float32))
    return [scale * max(-127, min(127, round(float(number) / scale))) for number in numbers]


def test_a_column_of_a_factor_has_a_scale_and_every_32_numbers_of_the_core():
    tucker, x = form((40, 9, 12), (3, 9, 5), torch.float32)
    kept = store(x, tucker, "int8")
    core, first, second, third, blocks, *scales = kept
    assert [tensor.dtype for tensor in (core, first, third)] == [torch.int8] * 3
    assert second is None
    assert scales[1] is None
    assert blocks.shape == (ceil(3 * 9 * 5 / 32),)
    assert (scales[0].shape, scales[2].shape) == ((3,), (5,))
    back = restore(kept, torch.float64)
    flat = tucker.core.flatten().tolist()
    expected = [value for at in range(0, len(flat), 32) for value in slow_rounding(flat[at : at + 32])]
    torch.testing.assert_close(back.core.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    for mode in (0, 2):
        columns = [slow_rounding(column) for column in tucker.factors[mode].T.tolist()]
        expected = torch.tensor(columns, dtype=torch.float64).T
        torch.testing.assert_close(back.factors[mode], expected, rtol=1e-12, atol=0)
    assert back.factors[1] is None


@given(SHAPES, st.data(), DTYPES, st.sampled_from(STORAGES))
def test_bytes_are_those_of_the_tensors_and_never_more_than_the_input(shape, data, dtype, storage):
    ranks = tuple(data.draw(st.integers(1, size)) for size in shape)
    tucker, x = form(shape, ranks, dtype)
    kept = store(x, tucker, storage)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept if tensor is not None)
    assert found == stored_bytes(shape, kept_ranks(shape, ranks, storage), dtype, storage)
    assert found <= x.nbytes
    assert restore(kept, dtype).shape == shape


@given(SHAPES, st.data(), st.sampled_from(["float32", "bfloat16", "int8"]))
def test_what_comes_back_is_near(shape, data, storage):
    ranks = tuple(data.draw(st.integers(1, size)) for size in shape)
    tucker, x = form(shape, ranks, seed=data.draw(st.integers(0, 99)))
    kept = store(x, tucker, storage)
    back = restore(kept, torch.float64)
    kept_as = kept_ranks(shape, ranks, storage)
    if kept_as == tuple(shape):
        tucker = Tucker(x, (None,) * x.ndim)
    elif kept_as != ranks:  # one mode is left whole, by a product
        (whole,) = [mode for mode, rank in enumerate(ranks) if rank != kept_as[mode]]
        core = torch.tensordot(tucker.factors[whole], tucker.core, ([1], [whole])).movedim(0, whole)
        tucker = Tucker(core, tuple(None if mode == whole else u for mode, u in enumerate(tucker.factors)))
    pairs = zip((back.core, *back.factors), (tucker.core, *tucker.factors), strict=True)
    share = {"float32": 2**-24, "bfloat16": 2**-8, "int8": (1 + 2**-8) / 254}[storage]
    for found, wanted in pairs:
        assert (found is None) == (wanted is None)
        assert found is None or float((found - wanted).abs().max()) <= share * float(wanted.abs().max()) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("shape", "ranks", "kept"),
    [
        ((64, 320, 3, 3), (64, 128, 2, 1), (64, 320, 2, 1)),  # 128 = 64 x 2 x 1
        ((64, 320, 3, 3), (64, 127, 2, 1), (64, 127, 2, 1)),
        ((64, 1152, 3, 3), (7, 7, 1, 1), (64, 7, 1, 1)),  # of two such modes the batch
        ((8, 40, 30), (2, 4, 8), (2, 4, 30)),
        ((8, 40, 30), (1, 1, 1), (1, 1, 1)),  # one number is not worth it
        ((50, 40), (8, 8), (8, 8)),  # a matrix keeps both factors
    ],
)
def test_a_mode_that_the_others_leave_uncut_has_no_factor(shape, ranks, kept):
    assert kept_ranks(shape, ranks) == kept
    assert stored_bytes(shape, kept, torch.float32) <= stored_bytes(shape, ranks, torch.float32)


@given(SHAPES, st.sampled_from(["bfloat16", "int8"]), st.integers(0, 99))
def test_what_was_rounded_once_is_not_changed_by_rounding_it_again(shape, storage, seed):
    for ranks in (shape, tuple(max(1, size // 2) for size in shape)):
        tucker, x = form(shape, ranks, torch.float32, seed)
        once = restore(store(x, tucker, storage), torch.float32)
        twice = restore(store(once.dense(), once, storage), torch.float32)
        for first, second in zip((once.core, *once.factors), (twice.core, *twice.factors), strict=True):
            assert (first is None and second is None) or torch.equal(first, second)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_block_or_column_with_a_number_that_is_not_finite_comes_back_as_nan(wrong):
    core, factor = random_tensor(7, 11).float(), random_tensor(9, 3).float()
    core[1, 2], factor[4, 1] = wrong, wrong
    x = Tucker(core, (None, None))
    kept = store(core, x, "int8")
    flat = restore(kept, torch.float32).core.flatten()
    assert flat[:32].isnan().all()
    assert flat[32:].isfinite().all()
    values, scale = round_columns(factor)
    assert (values.float() * scale.float())[:, 1].isnan().all()
    assert (values.float() * scale.float())[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-20, 1e37])
def test_numbers_of_any_size_have_a_scale(size):
    x = size * random_tensor(5, 7).float()
    values, scale = round_blocks(x)
    back = restore((values, None, None, scale, None, None), torch.float32).core
    assert (back - x).abs().max() <= max(size / 50, 1e-30)


def test_an_input_that_is_not_rounded_is_kept_itself():
    x = random_tensor(4, 5)
    for storage, other in (("input", x), ("float32", x.float())):
        kept = store(other, Tucker(other, (None, None)), storage)
        assert kept[0] is other


def test_a_float_is_never_stored_wider_than_it_is():
    tucker, x = form((8, 9), (2, 3), torch.bfloat16)
    assert all(tensor.dtype == torch.bfloat16 for tensor in store(x, tucker, "float32"))


def test_the_bytes_by_hand():
    assert stored_bytes((64, 100, 9, 9), (10, 20, 9, 5), torch.float32, "int8") == (
        9000 + 2 * 282 + 66 * 10 + 102 * 20 + 11 * 5
    )
    assert stored_bytes((64, 100, 9, 9), (10, 20, 9, 5), torch.float32) == 4 * (9000 + 640 + 2000 + 45)
    assert stored_bytes((64, 100, 9, 9), (64, 100, 9, 9), torch.float32, "bfloat16") == 2 * prod((64, 100, 9, 9))


def test_another_storage_is_refused():
    for make in (lambda s: ASI(2, storage=s), lambda s: HOSVD(0.8, storage=s), lambda s: SVD(0.8, storage=s)):
        with pytest.raises(SettingError, match=r"storage is 'int4'; allowed: input, float32, bfloat16, int8"):
            make("int4")
