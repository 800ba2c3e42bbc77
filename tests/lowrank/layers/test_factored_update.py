"""The update of a weight that is held as factors, as a function of matrices: against the dense computation."""

import copy

import pytest
import torch
from factored_cases import FULL, NAMES, SHAPES, data, network, train
from references import low_rank_tensor, random_tensor

import lowrank
from lowrank import WASI
from lowrank.tensors import factors as iteration
from lowrank.tensors.factors import Factors, factorise, gradient_factors, joined, subspace_update, truncated
from lowrank.tensors.factors import subspace_step as weight_step


def moved_matrix(outputs=8, inputs=11, rank=3, gradient_rank=2):
    weight = factorise(low_rank_tensor(outputs, inputs, seed=1, decay=0.7), 1.0)
    weight = Factors(weight.left[:, :rank], weight.right[:rank])
    gradient = Factors(random_tensor(outputs, gradient_rank, seed=2), random_tensor(gradient_rank, inputs, seed=3))
    return weight, gradient


def plain_update(weight, change):
    return weight_step(weight.left, joined([weight, change]))


@pytest.mark.parametrize("update", [plain_update, subspace_update])
@pytest.mark.parametrize("gradient_rank", [1, 2, 7])
@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(8, 11, 3), (11, 8, 3), (8, 8, 1), (6, 11, 6), (11, 6, 6)])
def test_an_update_is_the_dense_one(outputs, inputs, rank, gradient_rank, update):
    weight, gradient = moved_matrix(outputs, inputs, rank, gradient_rank)
    for step in range(5):
        dense = weight.dense() - 0.1 * gradient.dense()
        basis = torch.linalg.qr(dense @ (dense.mT @ weight.left))[0]
        weight = update(weight, gradient.scaled(-0.1))
        torch.testing.assert_close(weight.dense(), basis @ (basis.mT @ dense), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(weight.left.mT @ weight.left, torch.eye(rank, dtype=torch.float64))
        gradient = Factors(random_tensor(outputs, 2, seed=20 + step), random_tensor(2, inputs, seed=30 + step))


def count_plain_steps(monkeypatch):
    calls = []
    monkeypatch.setattr(iteration, "subspace_step", lambda *given: calls.append(given) or weight_step(*given))
    return calls


def test_a_small_update_needs_no_plain_step_and_is_as_exact_in_single_precision(monkeypatch):
    plain = count_plain_steps(monkeypatch)
    weight = factorise(low_rank_tensor(60, 90, seed=1, decay=0.93), 0.999)
    assert 20 < weight.left.shape[1] < 60
    exact, single = weight, weight.to(torch.float32)
    for step in range(30):
        change = Factors(random_tensor(60, 3, seed=100 + step), random_tensor(3, 90, seed=200 + step)).scaled(1e-4)
        exact = plain_update(exact, change)
        single = subspace_update(single, change.to(torch.float32))
    assert plain == []
    torch.testing.assert_close(single.dense().double(), exact.dense(), rtol=0, atol=2e-5 * exact.dense().abs().max())
    torch.testing.assert_close(single.left.mT @ single.left, torch.eye(single.left.shape[1]), rtol=0, atol=3e-6)


def test_a_basis_that_is_not_orthonormal_and_a_large_turn_take_a_plain_step(monkeypatch):
    plain = count_plain_steps(monkeypatch)
    weight, change = moved_matrix()
    skewed = Factors(weight.left @ (torch.eye(3) + 0.01 * torch.ones(3, 3)).double(), weight.right)
    for start, moved in ((skewed, change.scaled(0.01)), (weight, change.scaled(1e4))):
        found = subspace_update(start, moved)
        torch.testing.assert_close(found.dense(), plain_update(start, moved).dense(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.left.mT @ found.left, torch.eye(3, dtype=torch.float64))
    assert len(plain) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_of_zeros_or_of_less_rank_than_it_has_room_for_is_updated(dtype):
    weight, change = (factors.to(dtype) for factors in moved_matrix())
    nothing = Factors(weight.left, torch.zeros_like(weight.right))
    less = Factors(weight.left, weight.right * torch.tensor([[1.0], [1.0], [0.0]], dtype=dtype))
    for start in (nothing, less):
        found = subspace_update(start, change.scaled(0.1))
        dense = start.dense() + 0.1 * change.dense()
        torch.testing.assert_close(found.left.mT @ found.left, torch.eye(3, dtype=dtype), rtol=0, atol=1e-5)
        projection = found.left @ (found.left.mT @ dense)
        torch.testing.assert_close(found.dense(), projection, rtol=1e-4, atol=1e-5)
        assert (found.dense() - dense).norm() < 0.9 * dense.norm()


def stale_step(start, matrix):
    """The public code: the right factor is formed with the basis of the step before."""
    dense = matrix.dense()
    right = (dense.mT @ start).mT
    return Factors(torch.linalg.qr(dense @ right.mT)[0], right)


def fresh_step(start, matrix):
    return weight_step(start, matrix)


def drift(step):
    """Relative change of a weight that nothing moves, over three steps: it is of its own rank, so it should stay."""
    weight, _ = moved_matrix()
    before, worst = weight.dense(), 0.0
    for _ in range(3):
        weight = step(weight.left, weight)
        worst = max(worst, float((weight.dense() - before).norm() / before.norm()))
    return worst


def test_a_weight_that_nothing_moves_stays_and_with_a_stale_basis_it_does_not():
    assert drift(fresh_step) < 1e-12
    assert drift(stale_step) > 0.5


def test_training_fails_with_a_stale_basis_and_not_with_ours(monkeypatch):
    stock = train(network(), torch.optim.SGD(network().parameters(), 0.0), SHAPES["3-D"], 0)

    def loss_after(step):
        monkeypatch.setattr("lowrank.optim.subspace_update", lambda w, change: step(w.left, joined([w, change])))
        model = lowrank.convert(copy.deepcopy(stock), NAMES, WASI(energy=0.9, ranks=FULL))
        train(model, lowrank.SGD(model.parameters(), 1e-4), SHAPES["3-D"], 2)
        reference = lowrank.convert(copy.deepcopy(stock), NAMES, WASI(energy=0.9, ranks=FULL))
        x, _ = data(SHAPES["3-D"])
        return float(((model(x) - reference(x)).norm() / reference(x).norm()).detach())

    assert loss_after(fresh_step) < 0.01
    assert loss_after(stale_step) > 0.1


def test_three_spans_of_the_gradient_are_all_that_a_step_reads():
    weight, _ = moved_matrix(20, 30, 2)
    x, grad = random_tensor(50, 30, seed=4), random_tensor(50, 20, seed=5)
    held = gradient_factors(x, grad, weight)
    assert held.left.shape == (20, 6)
    exact = Factors(grad.mT @ x, torch.eye(30, dtype=torch.float64))
    for step, decay in ((0.01, 0.0), (3.0, 0.0), (0.2, 0.3)):
        results = [
            weight_step(weight.left, joined([weight.scaled(1 - step * decay), gradient.scaled(-step)])).dense()
            for gradient in (held, exact)
        ]
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_the_nearest_matrix_of_a_rank_is_that_of_the_singular_values():
    matrix = joined(moved_matrix())
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
    torch.testing.assert_close(found.dense(), truncated(Factors(weight, torch.eye(shape[1]).double()), rank).dense())
