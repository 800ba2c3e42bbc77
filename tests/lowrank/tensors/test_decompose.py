from math import prod

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from references import (
    TOLERANCE,
    hosvd_input,
    left_vectors,
    low_rank_tensor,
    multiply,
    projected,
    random_tensor,
    same_span,
    subspace_step,
    svd_input,
    svd_rank,
)
from strategies import ENERGIES, SEEDS, SHAPES
from tensorly import tucker_to_tensor
from tensorly.decomposition import tucker as tensorly_tucker

from lowrank import NonFiniteError, SettingError
from lowrank.tensors.decompose import hosvd, subspace_iteration, svd
from lowrank.tensors.storage import store

ALGORITHMS = ["sequential", "published"]
GRID = [0.05, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 0.999999]


def rotated(x, seed=0):
    """`x` in another orthonormal basis per mode: the same singular values, but no zero entries."""
    for mode, size in enumerate(x.shape):
        x = multiply(x, torch.linalg.qr(random_tensor(size, size, seed=seed + mode))[0], mode)
    return x


def superdiagonal(values):
    """A cube whose singular values are `values` in every mode."""
    x = torch.zeros(3 * [len(values)], dtype=torch.float64)
    for i, value in enumerate(values):
        x[i, i, i] = value
    return x


@given(SHAPES, ENERGIES, SEEDS)
def test_hosvd_equals_tensorly_at_its_ranks(shape, energy, seed):
    x = random_tensor(*shape, seed=seed)
    mine = hosvd(x, energy)
    core, factors = tensorly_tucker(x.numpy(force=True), list(mine.ranks), init="svd", n_iter_max=0)
    torch.testing.assert_close(mine.dense(), torch.tensor(tucker_to_tensor((core, factors))), **TOLERANCE)


@given(SHAPES, ENERGIES, SEEDS)
def test_hosvd_equals_plain_svds_of_the_unfoldings(shape, energy, seed):
    x = random_tensor(*shape, seed=seed)
    assert hosvd(x, energy).ranks == tuple(svd_rank(x, mode, energy) for mode in range(x.ndim))
    torch.testing.assert_close(hosvd(x, energy).dense(), hosvd_input(x, energy), **TOLERANCE)


@given(SHAPES, ENERGIES, SEEDS)
def test_svd_equals_a_truncated_svd_of_the_batch_unfolding(shape, energy, seed):
    x = random_tensor(*shape, seed=seed)
    mine = svd(x, energy)
    torch.testing.assert_close(mine.dense(), svd_input(x, energy), **TOLERANCE)
    assert mine.ranks == (svd_rank(x, 0, energy), *shape[1:])
    assert mine.factors[1:] == (None,) * (len(shape) - 1)


@given(SHAPES, SEEDS)
def test_factors_are_orthonormal(shape, seed):
    for factor in hosvd(random_tensor(*shape, seed=seed), 0.7).factors:
        if factor is not None:
            identity = torch.eye(factor.shape[1], dtype=torch.float64)
            torch.testing.assert_close(factor.mT @ factor, identity, **TOLERANCE)


@pytest.mark.parametrize("energy", GRID)
@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (1, 7), (7, 1), (30, 2, 3), (2, 3, 30), (5, 6, 4, 3), (1, 1)])
def test_ranks_by_gram_matrices_equal_those_of_full_svds(shape, energy):
    x = low_rank_tensor(*shape, seed=len(shape), decay=0.7)
    assert hosvd(x, energy).ranks == tuple(svd_rank(x, mode, energy) for mode in range(x.ndim))


@pytest.mark.parametrize(("energy", "rank"), [(0.25, 1), (0.2501, 2), (0.5, 2), (0.75, 3), (0.7501, 4), (1.0, 4)])
@pytest.mark.parametrize("rotate", [False, True])
def test_equal_singular_values_are_cut_as_exact_arithmetic_cuts_them(energy, rank, rotate):
    x = superdiagonal([2.0, 2.0, 2.0, 2.0])
    assert hosvd(rotated(x) if rotate else x, energy).ranks == (rank, rank, rank)


@pytest.mark.parametrize(("energy", "rank"), [(0.64, 1), (0.6401, 2), (0.8, 2), (0.8001, 3), (0.96, 3), (0.9601, 4)])
def test_a_share_reached_exactly_needs_no_further_vector(energy, rank):
    x = rotated(superdiagonal([8.0, 4.0, 4.0, 2.0]))  # squares 64 + 16 + 16 + 4 = 100
    assert hosvd(x, energy).ranks == (rank, rank, rank)


@pytest.mark.parametrize("energy", [0.1, 0.8, 1.0])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
def test_a_constant_tensor_has_rank_one(value, energy):
    x = torch.full((3, 4, 5, 2), value, dtype=torch.float64)
    tucker = hosvd(x, energy)
    assert tucker.ranks == (1, 1, 1, 1)
    torch.testing.assert_close(tucker.dense(), x, **TOLERANCE)


@pytest.mark.parametrize("energy", [0.99999999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rank_deficient_tensor_needs_no_more_than_its_rank(energy, dtype):
    x = multiply(multiply(random_tensor(2, 3, 4), random_tensor(8, 2, seed=1), 0), random_tensor(9, 3, seed=2), 1)
    tucker = hosvd(x.to(dtype), energy)
    assert tucker.ranks == (2, 3, 4)
    torch.testing.assert_close(tucker.dense().double(), x, rtol=1e-4, atol=1e-3 if energy < 1 else 1e-5)


@pytest.mark.parametrize("decompose", [hosvd, svd])
@given(shape=SHAPES, seed=SEEDS)
def test_energy_one_loses_nothing_and_never_exceeds_the_dimension(decompose, shape, seed):
    x = random_tensor(*shape, seed=seed)
    tucker = decompose(x, 1.0)
    torch.testing.assert_close(tucker.dense(), x, **TOLERANCE)
    assert all(rank <= size for rank, size in zip(tucker.ranks, shape, strict=True))


@pytest.mark.parametrize("decompose", [hosvd, svd])
@pytest.mark.parametrize(("rank", "energy"), [(1, 0.5), (1, 1.0), (2, 0.999999)])
@pytest.mark.parametrize("shape", [(8, 7, 6, 5), (60, 3, 4), (3, 4, 60)], ids=["wide", "tall", "tall at the end"])
def test_what_is_kept_holds_no_memory_beyond_its_own(shape, rank, energy, decompose):
    # One column of a column-major matrix counts as contiguous already; as a view it would hold all the columns.
    x = sum(low_rank_tensor(*shape, seed=seed, decay=1e-9) for seed in range(rank))
    tucker = decompose(x, energy)
    assert tucker.ranks[0] == rank
    kept = [tensor for tensor in (tucker.core, *tucker.factors) if tensor is not None]
    held = [tensor.untyped_storage().nbytes() for tensor in kept]
    assert held == [tensor.nbytes for tensor in kept]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_decomposed_in_float32_and_kept_as_halves(dtype):
    x = low_rank_tensor(6, 5, 4).to(dtype)
    tucker = hosvd(x, 0.9)
    given = torch.float32 if dtype == torch.float16 else dtype  # out of whose range a core may be
    assert {tucker.core.dtype, *(u.dtype for u in tucker.factors if u is not None)} == {given}
    assert {kept.dtype for kept in store(x, tucker, "input") if kept is not None} == {dtype}
    assert tucker.ranks == hosvd(x.float(), 0.9).ranks
    torch.testing.assert_close(tucker.core, hosvd(x.float(), 0.9).core.to(given))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
@pytest.mark.parametrize("energy", [0.8, 1.0])
@pytest.mark.parametrize("decompose", [hosvd, svd])
def test_values_that_are_not_finite_raise(decompose, energy, shape, bad):
    x = random_tensor(*shape)
    x[1, 1] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        decompose(x, energy)


@pytest.mark.parametrize("energy", [0, -0.1, 1.0001, float("nan"), "0.8", None])
@pytest.mark.parametrize("decompose", [hosvd, svd])
def test_an_energy_out_of_range_raises(decompose, energy):
    with pytest.raises(SettingError, match="energy"):
        decompose(random_tensor(2, 3), energy)


def draw_starts(data, shape, seed):
    """Per mode a random start, of no more columns than the truncated unfolding has (the rest would be arbitrary)."""
    ranks = [data.draw(st.integers(1, size)) for size in shape]
    assume(all(rank**2 <= prod(ranks) for rank in ranks))
    return {m: random_tensor(n, r, seed=seed + m) for m, (n, r) in enumerate(zip(shape, ranks, strict=True)) if r < n}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(shape=SHAPES, data=st.data(), seed=SEEDS)
def test_subspace_iteration_equals_the_written_out_one(algorithm, shape, data, seed):
    x, starts = random_tensor(*shape, seed=seed), draw_starts(data, shape, seed + 1)
    tucker, bases = subspace_iteration(x, [starts.get(mode) for mode in range(x.ndim)], algorithm)
    expected = subspace_step(x, starts, algorithm == "sequential")
    assert [mode for mode, basis in enumerate(bases) if basis is not None] == sorted(expected)
    assert all(same_span(bases[mode], expected[mode]) for mode in expected)
    torch.testing.assert_close(tucker.dense(), projected(x, expected), rtol=1e-8, atol=1e-8)


def test_the_two_algorithms_differ_where_several_modes_are_cut():
    x, starts = random_tensor(6, 5, 4), [random_tensor(n, 2, seed=n) for n in (6, 5, 4)]
    dense = [subspace_iteration(x, starts, algorithm)[0].dense() for algorithm in ALGORITHMS]
    assert not torch.allclose(*dense, atol=1e-3)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_repeated_iteration_finds_the_leading_singular_vectors(algorithm):
    x, ranks = low_rank_tensor(8, 7, 6, 5), (3, 2, 3, 2)
    bases = [random_tensor(n, r, seed=n) for n, r in zip(x.shape, ranks, strict=True)]
    for _ in range(12):
        _, bases = subspace_iteration(x, bases, algorithm)
    if algorithm == "published":
        assert all(same_span(basis, left_vectors(x, mode, ranks[mode])) for mode, basis in enumerate(bases))
    # Sequential truncation sees slightly other unfoldings; it must not lose more than HOSVD does, but for a trifle.
    hosvd_error = torch.linalg.vector_norm(
        x - projected(x, {mode: left_vectors(x, mode, rank) for mode, rank in enumerate(ranks)})
    )
    error = torch.linalg.vector_norm(x - projected(x, dict(enumerate(bases))))
    assert error <= 1.01 * hosvd_error


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("ranks", [(2, 3, 2, 4), (2, 2, 2, 2)], ids=["distinct shrinks", "equal shrinks"])
def test_channels_last_input_gives_what_a_contiguous_one_gives(algorithm, ranks):
    x = random_tensor(8, 8, 8, 8)
    starts = [random_tensor(8, rank, seed=mode) for mode, rank in enumerate(ranks)]
    plain, plain_bases = subspace_iteration(x, starts, algorithm)
    other, other_bases = subspace_iteration(x.to(memory_format=torch.channels_last), starts, algorithm)
    torch.testing.assert_close(other.dense(), plain.dense(), **TOLERANCE)
    assert other.shape == plain.shape
    assert all(same_span(one, two) for one, two in zip(plain_bases, other_bases, strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_start_of_nan_is_recovered_from(algorithm):
    x = low_rank_tensor(8, 7, 6)
    bases = [torch.full((n, 2), float("nan"), dtype=torch.float64) for n in x.shape]
    for _ in range(20):
        tucker, bases = subspace_iteration(x, bases, algorithm)
    best = projected(x, {mode: left_vectors(x, mode, 2) for mode in range(3)})
    error = torch.linalg.vector_norm(x - tucker.dense())
    assert error <= 1.01 * torch.linalg.vector_norm(x - best)
