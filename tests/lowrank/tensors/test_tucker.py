from itertools import permutations
from math import prod

import pytest
import tensorly
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import TOLERANCE, multiply, random_tensor, unfold
from strategies import SEEDS, SHAPES

from lowrank import Tucker
from lowrank.tensors.tucker import (
    in_memory_order,
    iteration_order,
    mode_correlation,
    mode_order,
    mode_product,
    products,
)


@given(SHAPES, st.integers(0, 3), st.integers(1, 7), SEEDS)
def test_mode_product_multiplies_the_unfolding(shape, mode, rows, seed):
    mode %= len(shape)
    x, matrix = random_tensor(*shape, seed=seed), random_tensor(rows, shape[mode], seed=seed + 1)
    result = mode_product(x, matrix, mode)
    torch.testing.assert_close(result, multiply(x, matrix, mode), **TOLERANCE)
    assert result.is_contiguous()


@given(SHAPES, st.integers(0, 3), SEEDS)
def test_mode_product_takes_any_memory_layout(shape, mode, seed):
    mode %= len(shape)
    x = random_tensor(*reversed(shape), seed=seed).permute(*reversed(range(len(shape))))
    matrix = random_tensor(shape[mode], 3, seed=seed + 1).mT
    torch.testing.assert_close(mode_product(x, matrix, mode), multiply(x, matrix, mode), **TOLERANCE)


@pytest.mark.cpu_only("a GPU multiplies each by itself")
@pytest.mark.parametrize(
    ("shape", "beside"),
    [((1, 96, 9), True), ((40, 96, 9), True), ((9, 128, 25), True), ((5000, 7, 7), True), ((6, 96, 49), False)],
)
def test_narrow_matrices_are_not_multiplied_each_by_itself(shape, beside):
    x, matrix = random_tensor(*shape), random_tensor(160, shape[1], seed=1)
    with torch.profiler.profile() as found:
        products(x, matrix)
    assert any(event.key == "aten::bmm" for event in found.key_averages()) is not beside


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("left", "rows", "size", "right"), [(50, 40, 30, 9), (3000, 20, 33, 2), (7000, 5, 3, 7)])
def test_mode_product_of_many_narrow_matrices(left, rows, size, right, grad):
    """Laid side by side, once and in several parts; as it is, out of order, and as part of a graph."""
    x, matrix = random_tensor(left, size, right), random_tensor(rows, size, seed=1)
    other, weight = x.transpose(0, 2).contiguous().transpose(0, 2), random_tensor(left, rows, right, seed=2)
    for one in (x, other):
        leaves = [tensor.clone().requires_grad_(grad) for tensor in (one, matrix)]
        result, wanted = mode_product(*leaves, 1), torch.einsum("lnr,mn->lmr", *leaves)
        torch.testing.assert_close(result, wanted, **TOLERANCE)
        assert result.is_contiguous()
        if grad:
            found, exact = (torch.autograd.grad(y, leaves, weight) for y in (result, wanted))
            torch.testing.assert_close(found, exact, **TOLERANCE)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("given_out", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 96, 9), (1, 96, 25), (40, 96, 9), (9, 128, 25), (5000, 7, 7), (6, 96, 49), (2, 3, 4)]
)
def test_products_of_one_matrix_and_many(shape, given_out, biased):
    """Each by itself, side by side and transposed; what is not finite stays in its own."""
    (left, size, right), rows = shape, 160
    x, matrix, bias = random_tensor(*shape), random_tensor(rows, size, seed=1), random_tensor(rows, seed=2)
    x[-1, 0, -1] = float("nan")
    out = torch.full((left, rows, right), float("nan"), dtype=x.dtype) if given_out else None
    result = products(x, matrix, bias if biased else None, out)
    wanted = torch.einsum("lnr,mn->lmr", x, matrix) + (bias[:, None] if biased else 0)
    torch.testing.assert_close(result, wanted, equal_nan=True, **TOLERANCE)
    assert result.is_contiguous()
    assert out is None or result is out


@pytest.mark.cpu_only("threads are the CPU's")
def test_threads_share_larger_parts():
    """The same, in fewer parts, for each of which they have to meet."""
    x, matrix = random_tensor(512, 32, 9).float(), random_tensor(512, 32, seed=1).float()
    threads, results, calls = torch.get_num_threads(), [], []
    try:
        for several in (1, 2):
            torch.set_num_threads(several)
            with torch.profiler.profile() as found:
                results.append(products(x, matrix))
            calls.append(sum(event.count for event in found.key_averages() if event.key == "aten::mm"))
    finally:
        torch.set_num_threads(threads)
    assert calls == [32, 5]
    torch.testing.assert_close(results[1], results[0])


@given(SHAPES, st.integers(0, 3), st.integers(1, 7), SEEDS)
def test_mode_correlation_is_the_product_of_unfoldings(shape, mode, size, seed):
    mode %= len(shape)
    x = random_tensor(*shape, seed=seed)
    z = random_tensor(*shape[:mode], size, *shape[mode + 1 :], seed=seed + 1)
    torch.testing.assert_close(mode_correlation(x, z, mode), unfold(x, mode) @ unfold(z, mode).mT, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("right", [1, 2, 4, 9, 16, 49])
@pytest.mark.parametrize("sizes", [(1, 1), (8, 3), (8, 8), (32, 32), (100, 3)])
def test_mode_correlation_in_halves_is_as_close_as_they_are(dtype, right, sizes):
    """Over so many samples that a sum in the halves themselves would be several times as far off as their rounding."""
    x, z = ((random_tensor(2000, n, right, seed=n) + 0.2).div(8).to(dtype) for n in sizes)
    expected = torch.einsum("lnr,lmr->nm", x.double(), z.double())
    assert (mode_correlation(x, z, 1).double() - expected).norm() < torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("shape", [(3, 9, 4, 5), (2, 40, 4), (6, 31, 2), (50, 3)])
@pytest.mark.parametrize("size", [1, 3, 9])
def test_mode_correlation_of_many_fibres(shape, size):
    for mode in range(len(shape)):
        x, z = random_tensor(*shape), random_tensor(*shape[:mode], size, *shape[mode + 1 :], seed=1)
        torch.testing.assert_close(mode_correlation(x, z, mode), unfold(x, mode) @ unfold(z, mode).mT, **TOLERANCE)


def projecting(left, n, right, rank):
    return 1 + rank / 12 + (0 if left == 1 else 20 / n if right == 1 else 500 / n / right)


def iterating(left, n, right, rank):
    row = n if right == 1 else right
    return (rank + 0.5) / 12 * (1 if left == 1 or row >= 16 else 2.5 if row >= 8 else 5)


@pytest.mark.parametrize(("ordered", "each"), [(mode_order, projecting), (iteration_order, iterating)])
@given(SHAPES, st.data())
def test_the_order_of_modes_is_one_of_least_cost(ordered, each, shape, data):
    ranks = [data.draw(st.integers(1, size)) for size in shape]
    if any(8 < rank < size for rank, size in zip(ranks, shape, strict=True)):
        each = projecting

    def cost(order):
        total, size = 0.0, 1.0
        for mode in order:
            n, left, right = shape[mode], prod(shape[:mode]), prod(shape[mode + 1 :])
            if ranks[mode] < n:
                total += size * each(left, n, right, ranks[mode])
                size *= ranks[mode] / n
        return total

    order = ordered(shape, ranks)
    assert sorted(order) == list(range(len(shape)))
    assert cost(order) == pytest.approx(min(map(cost, permutations(range(len(shape))))))
    shrinks = [ranks[mode] < shape[mode] for mode in order]
    assert shrinks == sorted(shrinks, reverse=True)


def test_an_image_is_iterated_along_its_long_rows_and_a_small_one_along_its_channels():
    assert iteration_order((64, 192, 28, 28), (8, 8, 4, 4))[:2] == [2, 3]
    assert iteration_order((64, 384, 14, 14), (8, 8, 4, 4))[0] == 1


@given(SHAPES, st.data(), SEEDS)
def test_dense_equals_tensorly(shape, data, seed):
    ranks = [data.draw(st.integers(1, size)) for size in shape]
    core = random_tensor(*ranks, seed=seed)
    factors = [random_tensor(n, r, seed=seed + 1 + m) for m, (n, r) in enumerate(zip(shape, ranks, strict=True))]
    expected = tensorly.tucker_to_tensor((core.numpy(force=True), [factor.numpy(force=True) for factor in factors]))
    torch.testing.assert_close(Tucker(core, tuple(factors)).dense(), torch.tensor(expected), **TOLERANCE)


def test_a_missing_factor_is_the_identity_and_takes_no_memory():
    core, factor = random_tensor(2, 5, 3), random_tensor(7, 2, seed=1)
    tucker = Tucker(core, (factor, None, None))
    assert tucker.shape == (7, 5, 3)
    assert tucker.ranks == (2, 5, 3)
    assert tucker.nbytes == 8 * (2 * 5 * 3 + 7 * 2)
    torch.testing.assert_close(tucker.dense(), multiply(core, factor, 0), **TOLERANCE)


def test_to_changes_the_dtype_of_core_and_factors():
    tucker = Tucker(random_tensor(2, 3), (random_tensor(4, 2), None)).to(torch.float32)
    assert tucker.core.dtype == tucker.factors[0].dtype == torch.float32
    assert tucker.factors[1] is None


@pytest.mark.parametrize(
    ("x", "place"),
    [
        (random_tensor(2, 3, 4, 5), [0, 1, 2, 3]),
        (random_tensor(2, 3, 4, 5).to(memory_format=torch.channels_last), [0, 3, 1, 2]),
        (random_tensor(2, 3, 4).permute(2, 0, 1), [2, 0, 1]),
    ],
    ids=["contiguous", "channels_last", "permuted"],
)
def test_memory_order_is_a_contiguous_view_of_a_dense_tensor(x, place):
    ordered, found = in_memory_order(x)
    assert found == place
    assert ordered.is_contiguous()
    assert ordered.data_ptr() == x.data_ptr()
    assert torch.equal(ordered.permute(place), x)


@pytest.mark.parametrize("x", [random_tensor(4, 6)[:, ::2], random_tensor(4, 1).expand(4, 3)])
def test_a_tensor_with_gaps_is_copied_in_its_own_order(x):
    ordered, place = in_memory_order(x)
    assert place == [0, 1]
    assert ordered.is_contiguous()
    assert torch.equal(ordered, x)
