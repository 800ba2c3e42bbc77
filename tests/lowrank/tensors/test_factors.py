"""A matrix as two factors: its update and what it is made from, against dense computations."""

import copy

import pytest
import torch
from factored_cases import FULL, NAMES, SHAPES, data, network, train
from hypothesis import given
from hypothesis import strategies as st
from references import MultiplicationCounter, low_rank_tensor, random_tensor

import lowrank
from lowrank import WASI, NonFiniteError
from lowrank.tensors import factors as product
from lowrank.tensors.costs import factored_update_flops
from lowrank.tensors.factors import (
    Factors,
    factorise,
    joined,
    orthonormalised,
    refactorise,
    steady,
    subspace_step,
    subspace_update,
    tangent,
    truncated,
)

SIZES = [(8, 11, 3), (11, 8, 3), (8, 8, 1), (6, 11, 6), (11, 6, 6), (7, 7, 7)]


def held_matrix(outputs=8, inputs=11, rank=3, seed=1):
    """Factors of rank K with orthonormal columns, and a random matrix G of full rank."""
    left = torch.linalg.qr(random_tensor(outputs, rank, seed=seed))[0]
    scales = 0.7 ** torch.arange(rank, dtype=torch.float64)
    held = Factors(left, scales[:, None] * random_tensor(rank, inputs, seed=seed + 1))
    return held, random_tensor(outputs, inputs, seed=seed + 2)


def gradients_of(held, dense):
    """Those of L and R, from the gradient of their product."""
    return dense @ held.right.mT, held.left.mT @ dense


def tangent_part(held, dense):
    """G less what is normal to the columns of L and to the rows of R, by dense projections."""
    columns = held.left @ torch.linalg.pinv(held.left)
    rows = torch.linalg.pinv(held.right) @ held.right
    off_columns, off_rows = torch.eye(len(columns)).double() - columns, torch.eye(len(rows)).double() - rows
    return dense - off_columns @ dense @ off_rows


def iterated(start, dense):
    """One subspace iteration on a dense matrix."""
    basis = torch.linalg.qr(dense @ (dense.mT @ start))[0]
    return basis @ (basis.mT @ dense)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
def test_the_tangent_is_what_both_gradients_tell(outputs, inputs, rank, seed):
    held, dense = held_matrix(outputs, inputs, min(rank, outputs, inputs), seed)
    found = tangent(held, *gradients_of(held, dense))
    torch.testing.assert_close(found.dense(), tangent_part(held, dense), rtol=1e-7, atol=1e-7)
    assert found.left.shape[1] == 2 * held.left.shape[1]


@pytest.mark.parametrize("sizes", [(6, 11, 6), (11, 6, 6), (7, 7, 7)])
def test_at_full_rank_the_tangent_is_the_gradient(sizes):
    held, dense = held_matrix(*sizes)
    torch.testing.assert_close(tangent(held, *gradients_of(held, dense)).dense(), dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_update_and_the_plain_step_are_the_dense_iteration(sizes):
    held, _ = held_matrix(*sizes)
    for step in range(5):
        dense = random_tensor(*sizes[:2], seed=20 + step)
        gradients = gradients_of(held, dense)
        expected = iterated(held.left, held.dense() - 0.05 * tangent_part(held, dense))
        plain = subspace_step(held.left, joined([held, tangent(held, *gradients).scaled(-0.05)]))
        held = subspace_update(held, *gradients, 0.05)
        for found in (held, plain):
            torch.testing.assert_close(found.dense(), expected, rtol=0, atol=1e-11)
            identity = torch.eye(sizes[2], dtype=torch.float64)
            torch.testing.assert_close(found.left.mT @ found.left, identity, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_update_is_counted_as_it_is_executed(sizes):
    outputs, inputs, rank = sizes
    held, dense = held_matrix(*sizes)
    with MultiplicationCounter() as counter:
        subspace_update(held, *gradients_of(held, dense), 1e-3)
    given_gradients = 2 * outputs * inputs * rank
    # Two triangular solves, three Cholesky factors, and six solves with them.
    others = (outputs + inputs) * rank**2 + (1 + 12) * rank**3
    expected = factored_update_flops(*sizes, svd=False) - others
    assert 2 * (counter.total - given_gradients) == expected


@pytest.mark.parametrize("sizes", [(20, 30, 8), (40, 30, 8), (30, 30, 1)], ids=str)
def test_the_rest_of_the_gradient_enters_a_step_with_the_rate_squared(sizes):
    held, dense = held_matrix(*sizes)
    apart = []
    for rate in (1e-3, 5e-4):
        found = subspace_update(held, *gradients_of(held, dense), rate).dense()
        apart.append(float((found - iterated(held.left, held.dense() - rate * dense)).norm()))
    assert apart[1] > 1e-9
    assert apart[0] / apart[1] == pytest.approx(4, rel=0.05)


def count_plain_steps(monkeypatch):
    calls = []
    monkeypatch.setattr(product, "subspace_step", lambda *given: calls.append(given) or subspace_step(*given))
    return calls


def test_an_update_needs_no_plain_step_and_is_as_exact_in_single_precision(monkeypatch):
    plain = count_plain_steps(monkeypatch)
    exact = factorise(low_rank_tensor(60, 90, seed=1, decay=0.93), 0.999)
    single, rank = exact.to(torch.float32), exact.left.shape[1]
    assert 20 < rank < 60
    for step in range(30):
        dense = 1e-2 * random_tensor(60, 90, seed=100 + step)
        change = tangent(exact, *gradients_of(exact, dense)).scaled(-1e-2)
        exact = subspace_step(exact.left, joined([exact, change]))
        single = subspace_update(single, *gradients_of(single, dense.float()), 1e-2)
    assert plain == []
    torch.testing.assert_close(single.dense().double(), exact.dense(), rtol=0, atol=2e-5 * exact.dense().abs().max())
    torch.testing.assert_close(single.left.mT @ single.left, torch.eye(rank), rtol=0, atol=3e-6)


def test_a_large_turn_takes_a_plain_step(monkeypatch):
    plain = count_plain_steps(monkeypatch)
    held, dense = held_matrix()
    dense -= held.left @ (held.left.mT @ dense)  # across the columns of L, so that L turns and R does not grow
    expected = iterated(held.left, held.dense() - 10 * tangent_part(held, dense))
    found = subspace_update(held, *gradients_of(held, dense), 10)
    torch.testing.assert_close(found.dense(), expected, rtol=0, atol=1e-9)
    assert len(plain) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scales", [(0.0, 0.0, 0.0), (1.0, 1.0, 0.0)], ids=str)
def test_a_weight_of_less_rank_than_it_has_room_for_is_moved_downhill(dtype, scales):
    held, dense = (part.to(dtype) for part in held_matrix())
    held = Factors(held.left, held.right * torch.tensor(scales, dtype=dtype)[:, None])
    found = subspace_update(held, *gradients_of(held, dense), 0.1)
    torch.testing.assert_close(found.left.mT @ found.left, torch.eye(3, dtype=dtype), rtol=0, atol=1e-5)
    assert ((found.dense() - held.dense()) * dense).sum() < 0


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_other_factors_of_the_same_matrix_take_the_same_step(sizes):
    held, dense = held_matrix(*sizes)
    skew = random_tensor(sizes[2], sizes[2], seed=9) + 3 * torch.eye(sizes[2]).double()
    other = Factors(held.left @ skew, torch.linalg.solve(skew, held.right))
    again, *gradients = orthonormalised(other, *gradients_of(other, dense))
    torch.testing.assert_close(again.dense(), held.dense(), rtol=0, atol=1e-11)
    for found, expected in zip(gradients, gradients_of(again, dense), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    steps = subspace_update(again, *gradients, 0.1), subspace_update(held, *gradients_of(held, dense), 0.1)
    torch.testing.assert_close(steps[0].dense(), steps[1].dense(), rtol=0, atol=1e-10)


def test_factors_that_are_orthonormal_are_left_alone():
    held, dense = held_matrix()
    gradients = gradients_of(held, dense)
    again, *others = orthonormalised(held, *gradients)
    assert again is held
    assert all(a is b for a, b in zip(gradients, others, strict=True))


@pytest.mark.parametrize("lost", [1, 3])
def test_a_left_factor_of_dependent_columns_stays_finite(lost):
    held, dense = held_matrix()
    left = held.left * (torch.arange(3) >= lost)
    other = Factors(left, held.right)
    again, *gradients = orthonormalised(other, *gradients_of(other, dense))
    torch.testing.assert_close(again.dense(), other.dense(), rtol=0, atol=1e-12)
    found = subspace_update(again, *gradients, 0.1)
    assert found.left.isfinite().all()
    assert found.right.isfinite().all()
    assert lost == 3 or float(((found.dense() - other.dense()) * dense).sum()) < 0


def stale_update(held, d_left, d_right, rate):
    """The public code: the right factor is formed with the basis of the step before."""
    dense = held.dense() - rate * tangent(held, d_left, d_right).dense()
    right = (dense.mT @ held.left).mT
    return Factors(torch.linalg.qr(dense @ right.mT)[0], right)


def test_training_fails_with_a_stale_basis_and_not_with_ours(monkeypatch):
    x, _ = data(SHAPES["3-D"])
    start = lowrank.convert(network(), NAMES, WASI(energy=0.9, ranks=FULL))
    expected = start(x).detach()

    def moved():
        model = copy.deepcopy(start)
        train(model, lowrank.SGD(model.parameters(), 1e-4), SHAPES["3-D"], 2)
        return float((model(x).detach() - expected).norm() / expected.norm())

    ours = moved()
    assert 1e-6 < ours < 0.01
    monkeypatch.setattr("lowrank.optim.subspace_update", stale_update)
    assert moved() > 0.1


@given(st.sampled_from(SIZES), st.sampled_from([0.0, 1e-3, 0.1, 3.0]), st.booleans(), st.integers(0, 9))
def test_steady_factors_are_those_nearest_to_the_ones_before(sizes, moved, single, seed):
    outputs, inputs, rank = sizes
    before = torch.linalg.qr(random_tensor(outputs, rank, seed=seed))[0]
    turned = torch.linalg.qr(random_tensor(rank, rank, seed=seed + 1))[0]  # as whoever orthogonalises may do
    left = torch.linalg.qr(before + moved * random_tensor(outputs, rank, seed=seed + 2))[0] @ turned
    found = Factors(left, random_tensor(rank, inputs, seed=seed + 3))
    if single:
        found, before = found.to(torch.float32), before.float()
    kept = steady(found, before)
    tolerance = {"rtol": 0, "atol": 1e-5 if single else 1e-13}
    torch.testing.assert_close(kept.dense(), found.dense(), **tolerance)
    torch.testing.assert_close(kept.left.mT @ kept.left, torch.eye(rank).to(kept.left), **tolerance)
    overlap = kept.left.mT @ before  # symmetric and not negative where no turn brings the two nearer
    torch.testing.assert_close(overlap, overlap.mT, **tolerance)
    assert torch.linalg.eigvalsh(overlap).min() > -tolerance["atol"]


def test_the_nearest_matrix_of_a_rank_is_that_of_the_singular_values():
    matrix = joined(held_matrix(seed=1)[:1] + held_matrix(seed=5)[:1])
    u, s, v = torch.linalg.svd(matrix.dense())
    torch.testing.assert_close(truncated(matrix, 3).dense(), u[:, :3] * s[:3] @ v[:3])
    torch.testing.assert_close(truncated(matrix, 99).dense(), matrix.dense())


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_the_rank_is_that_of_the_energy(energy, shape):
    weight = low_rank_tensor(*shape)
    values = torch.linalg.svdvals(weight).square()
    shares = values.cumsum(0) / values.sum()
    rank = int((shares < energy * (1 - 1e-12)).sum()) + 1 if energy < 1 else int((values > 1e-28).sum())
    found = factorise(weight, energy)
    assert found.left.shape[1] == min(rank, *shape)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(found.dense(), u[:, :rank] * s[:rank] @ v[:rank])


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
    ids=str,
)
@pytest.mark.parametrize("sizes", [*SIZES, (60, 90, 20)], ids=str)
def test_a_product_of_factors_is_taken_apart_again_without_a_loss(sizes, dtype, tolerance):
    for seed in range(12):
        held, dense = held_matrix(*sizes, seed=10 * seed)
        weight = held.to(dtype).dense()
        found = refactorise(weight, sizes[2], energy=0.1)
        assert found.left.shape == (sizes[0], sizes[2])
        scale = weight.double().norm()
        assert float((found.dense() - weight).double().norm() / scale) < tolerance
    if sizes[2] < min(sizes[:2]):
        other = refactorise(dense.to(dtype), sizes[2], energy=0.5)
        assert other.left.shape[1] == factorise(dense.to(dtype), 0.5).left.shape[1]


@pytest.mark.parametrize(("dtype", "rest"), [(torch.float64, 1e-10), (torch.float32, 1e-3)], ids=str)
def test_a_weight_with_a_rest_above_its_rank_is_not_cut_to_it(dtype, rest):
    held, dense = held_matrix(20, 30, 4)
    weight = (held.dense() / held.dense().norm() + rest * dense / dense.norm()).to(dtype)
    found = refactorise(weight, 4, energy=1)
    assert found.left.shape[1] == 20
    torch.testing.assert_close(found.dense(), weight)


def test_a_weight_of_lower_rank_fills_the_room_that_there_is():
    held, _ = held_matrix()
    found = refactorise(held.dense(), 5, energy=0.1)
    torch.testing.assert_close(found.left.mT @ found.left, torch.eye(5).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.dense(), held.dense(), rtol=0, atol=1e-12)
    nothing = refactorise(torch.zeros(4, 6), 3, energy=0.9)
    assert nothing.left.shape == (4, 3)
    assert not nothing.dense().any()


@pytest.mark.parametrize("energy", [0.5, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(energy, value):
    weight = torch.ones(4, 5)
    weight[1, 2] = value
    for take_apart in (lambda: factorise(weight, energy), lambda: refactorise(weight, 2, energy)):
        with pytest.raises(NonFiniteError, match="the weight has NaN"):
            take_apart()
