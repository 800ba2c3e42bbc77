"""What a layer of ASI carries from step to step: its bases, in other batches and dtypes."""

import copy
from collections import OrderedDict

import pytest
import torch
from layer_cases import (
    BOTH,
    EVERY_CONV,
    assert_exact_but_for_the_weight,
    bases_of,
    conv_model,
    converted,
    step,
)
from references import (
    TOLERANCE,
    TwoConvolutions,
    autograd,
    labelled_batch,
    left_vectors,
    low_rank_tensor,
    projected,
    random_tensor,
    same_span,
    subspace_step,
)
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, FixedBases, NonFiniteError, SettingError, Vanilla


@BOTH
def test_on_a_fixed_tensor_the_warm_start_converges_to_the_leading_singular_vectors(algorithm):
    x, ranks = low_rank_tensor(8, 4, 7, 6), (3, 2, 3, 2)
    model = conv_model(ASI(ranks, algorithm=algorithm))
    for _ in range(15):
        model(x)
    best = {mode: left_vectors(x, mode, rank) for mode, rank in enumerate(ranks)}
    tolerance = 1e-8 if algorithm == "published" else 0.05  # sequential truncation sees slightly other unfoldings
    assert all(same_span(basis, best[mode], tolerance) for mode, basis in bases_of(model[0]).items())


@BOTH
def test_without_warm_start_every_step_is_the_same_and_nothing_is_stored(algorithm):
    model, x = conv_model(ASI(2, algorithm=algorithm, warm_start=False)), random_tensor(5, 4, 7, 6)
    first, second = step(model, x), step(model, x)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not bases_of(model[0])


def test_with_warm_start_the_second_step_is_closer():
    x, grad = low_rank_tensor(8, 4, 7, 6, decay=0.6), random_tensor(8, 6, 7, 6)
    model = conv_model(ASI(2))
    exact = autograd(lowrank.convert(copy.deepcopy(model), ["0"], Vanilla()), x, grad)[2]["0.weight"]
    errors = []
    for _ in range(4):
        model.zero_grad()
        model(x).backward(grad)
        errors.append(float(torch.linalg.vector_norm(model[0].weight.grad - exact)))
    assert errors[3] < errors[0]


def test_first_bases_depend_on_seed_layer_and_mode_only():
    x = random_tensor(5, 4, 5, 5)

    def first_basis(seed, name="0"):
        model = nn.Sequential(OrderedDict([(name, nn.Conv2d(4, 6, 3, dtype=torch.float64))]))
        lowrank.convert(model, [name], ASI(1, seed=seed))
        model(x)
        return bases_of(model[0])

    torch.testing.assert_close(first_basis(1), first_basis(1), rtol=0, atol=0)
    assert not same_span(first_basis(1)[0], first_basis(2)[0])
    assert not same_span(first_basis(1)[0], first_basis(1, name="1")[0])
    assert not same_span(first_basis(1)[2], first_basis(1)[3])


@pytest.mark.parametrize("method", EVERY_CONV)
def test_the_global_random_state_is_neither_read_nor_changed(method):
    model, x = conv_model(method), random_tensor(5, 4, 7, 6)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = step(model, x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = step(converted(lowrank.revert(model)[0], method), x)
    torch.testing.assert_close(first, again, rtol=0, atol=0)


@BOTH
def test_a_batch_of_another_size_and_back(algorithm):
    layer = nn.Conv2d(4, 6, 3, padding=1, dtype=torch.float64)
    model = converted(layer, ASI([3, 2, 3, 2], algorithm=algorithm))
    for seed, size in enumerate((6, 5, 3, 1, 6, 9, 6)):
        x, grad = random_tensor(size, 4, 7, 6, seed=seed), random_tensor(size, 6, 7, 6, seed=seed + 50)
        y, grad_x, _ = autograd(layer, x, grad)
        model.zero_grad()
        x.requires_grad_(True)
        result = model(x)
        result.backward(grad)
        torch.testing.assert_close(result, y, **TOLERANCE)
        torch.testing.assert_close(x.grad, grad_x, **TOLERANCE)
        assert torch.isfinite(model[0].weight.grad).all()


@BOTH
def test_an_odd_last_batch_leaves_the_full_batchs_basis_in_place(algorithm):
    model = conv_model(ASI([3, 2, 3, 2], algorithm=algorithm))
    model(random_tensor(6, 4, 7, 6))
    before = bases_of(model[0])
    for size in (5, 2):
        x = random_tensor(size, 4, 7, 6, seed=size)
        starts = {mode: basis[:size] if mode == 0 else basis for mode, basis in bases_of(model[0]).items()}
        if size == 2:
            del starts[0]  # rank 3 is cut to the batch size: the whole mode
        kept_input = projected(x, subspace_step(x, starts, algorithm == "sequential"))
        grad = random_tensor(size, 6, 7, 6)
        expected = autograd(lowrank.revert(copy.deepcopy(model)), kept_input, grad)
        model.zero_grad()
        model(x).backward(grad)
        torch.testing.assert_close(model[0].weight.grad, expected[2]["0.weight"], **TOLERANCE)
    after = bases_of(model[0])
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


@BOTH
def test_an_image_of_another_size_starts_its_modes_afresh(algorithm):
    model = conv_model(ASI(2, algorithm=algorithm))
    model(random_tensor(5, 4, 7, 6))
    model(random_tensor(5, 4, 9, 6, seed=1))
    assert {mode: tuple(basis.shape) for mode, basis in bases_of(model[0]).items()} == {
        0: (5, 2),
        1: (4, 2),
        2: (9, 2),
        3: (6, 2),
    }


def test_ranks_above_the_dimensions_store_no_basis():
    layer, x, grad = nn.Conv2d(4, 6, 3, dtype=torch.float64), random_tensor(3, 4, 7, 6), random_tensor(3, 6, 5, 4)
    model = converted(layer, ASI([99, 2, 99, 7]))
    model(random_tensor(3, 4, 7, 6, seed=1))
    assert sorted(bases_of(model[0])) == [1]
    kept_input = projected(x, subspace_step(x, bases_of(model[0]), sequential=True))
    assert_exact_but_for_the_weight(layer, model, x, grad, kept_input)


@pytest.mark.parametrize("ranks", [[2], [2, 2, 2], [2, 2, 2, 2]])
def test_a_wrong_number_of_ranks_for_the_input_of_a_linear_layer_names_it(ranks):
    model = lowrank.convert(TwoConvolutions(), ["head"], ASI(ranks))
    with pytest.raises(SettingError, match=rf"'head'.*{len(ranks)} ranks.*2 modes"):
        model(labelled_batch()[0])


@pytest.mark.parametrize("method", [SVD(0.8), HOSVD(0.8)])
def test_values_that_are_not_finite_name_the_layer(method):
    model = lowrank.convert(TwoConvolutions(), ["second"], method)
    x, _ = labelled_batch()
    with pytest.raises(NonFiniteError, match="'second'"):
        model(x * float("nan"))


@BOTH
def test_after_a_batch_of_nan_the_iteration_recovers(algorithm):
    x = low_rank_tensor(8, 4, 7, 6)
    model = conv_model(ASI([3, 2, 3, 2], algorithm=algorithm))
    model(x)
    model(x * float("nan"))
    for _ in range(20):
        model(x)
    best = {mode: left_vectors(x, mode, rank) for mode, rank in enumerate((3, 2, 3, 2))}
    assert all(same_span(basis, best[mode], 0.05) for mode, basis in bases_of(model[0]).items())


@BOTH
def test_evaluation_with_gradients_leaves_the_state_alone(algorithm):
    model, x = conv_model(ASI(2, algorithm=algorithm)), random_tensor(5, 4, 7, 6)
    model(x)
    before = bases_of(model[0])
    model.eval()
    step(model, random_tensor(5, 4, 7, 6, seed=1))
    torch.testing.assert_close(bases_of(model[0]), before, rtol=0, atol=0)


def waves(length):
    """(B, T, C), of eight cosines along T whose energies fall slowly, and the same ones whatever T is."""
    places = (torch.arange(length) + 0.5) / length
    curves = torch.stack([0.8**k * torch.cos(k * torch.pi * places) for k in range(8)])
    return torch.einsum("bk,kt,kc->btc", random_tensor(6, 8), curves.double(), random_tensor(8, 20, seed=1))


@pytest.mark.parametrize(("before", "length"), [(24, 36), (36, 24), (24, 25)])
def test_a_length_that_changes_starts_from_the_basis_of_the_one_before(before, length):
    method, geometry, x = ASI((6, 4, 20)), lowrank.tensors.geometry.LinearGeometry(), waves(length)
    error = lambda state: (lowrank.Tucker(*split(method.compress(x, geometry, state, "0")[0])).dense() - x).norm()  # noqa: E731
    split = lambda kept: (kept[0], kept[1:])  # noqa: E731
    state = ()
    for _ in range(6):
        state = method.compress(waves(before), geometry, state, "0")[1]
    best = error(method.compress(x, geometry, state, "0")[1])
    assert error(state) < best + 0.2 * (error(()) - best)


METHODS = [ASI(2), lowrank.WASI(2), FixedBases(2), ASI(2, warm_start=False), HOSVD(0.8), Vanilla()]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.tag}")
def test_training_in_evaluation_mode_says_that_no_bases_are_stored(method, recwarn):
    model = lowrank.convert(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5)), ["1"], method).eval()
    x, optimizer = random_tensor(4, 7, 8).float(), torch.optim.SGD(model.parameters(), 0.1)
    said = lambda: sum("'1' is trained in evaluation mode" in str(one.message) for one in recwarn.list)  # noqa: E731
    for _ in range(2):  # an evaluation
        model(x).square().sum().backward()
    model.train()
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    model.eval()
    for _ in range(2):  # and one behind training
        model(x).square().sum().backward()
    assert said() == 0
    optimizer.step()
    model(x)
    assert said() == (METHODS.index(method) < 3)


def test_one_layer_says_for_its_whole_model_that_no_bases_are_stored(recwarn):
    model = lowrank.convert(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 4)), ["0"], ASI(2))
    for one in [lowrank.convert(model, ["1", "2"], ASI(2)), copy.deepcopy(model)]:
        optimizer = torch.optim.SGD(one.eval().parameters(), 0.1)
        for _ in range(3):
            one(random_tensor(4, 7, 8).float()).square().sum().backward()
            optimizer.step()
    said = [str(one.message) for one in recwarn.list if "trained in evaluation mode" in str(one.message)]
    assert [one.partition(" is")[0] for one in said] == ["layer '0'"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_stored(mode):
    model, x = conv_model(ASI(2)), random_tensor(5, 4, 7, 6)
    with mode():
        y = model(x)
    assert not bases_of(model[0])
    torch.testing.assert_close(y, lowrank.revert(model)(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method",
    [
        *(ASI(2), ASI(2, algorithm="published"), ASI(2, refresh=2), ASI(2, refresh="energy")),
        *(FixedBases(2), FixedBases(2, storage="bfloat16")),
    ],
    ids=repr,
)
def test_a_model_changes_its_dtype_between_steps(start, dtype, method):
    model = conv_model(method).to(start)
    step(model, random_tensor(5, 4, 7, 6, dtype=start))
    model.to(dtype)
    gradients = step(model, random_tensor(5, 4, 7, 6, seed=1, dtype=dtype))
    assert gradients["0.weight"].dtype == dtype
    assert torch.isfinite(gradients["0.weight"]).all()


def test_bases_follow_the_model_to_another_device():
    model = conv_model(ASI(2))
    step(model, random_tensor(5, 4, 7, 6))
    model.to("meta")
    y = model(random_tensor(5, 4, 7, 6).to("meta"))
    assert y.device.type == "meta"


def test_the_description_names_the_method():
    assert "HOSVD(energy=0.8)" in repr(conv_model(HOSVD(0.8)))
