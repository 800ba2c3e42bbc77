"""Bases fixed for good: those of the first batch's HOSVD, by full SVDs; gradients, bytes and what is carried."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import assert_exact_but_for_the_weight, bases_of, conv_model, converted, step
from references import TOLERANCE, autograd, left_vectors, low_rank_tensor, projected, random_tensor
from strategies import LAYERS
from torch import nn

import lowrank
from lowrank import FixedBases, NonFiniteError
from lowrank.tensors.storage import restore


@pytest.mark.parametrize("ranks", [(1, 2, 3, 2), (9, 3, 99, 2), 3])
def test_the_gradient_is_that_of_the_projection_on_the_first_batch(ranks):
    method, layer = FixedBases(ranks), nn.Conv2d(4, 6, 3, padding=1).double()
    first, second = low_rank_tensor(5, 4, 7, 6, decay=0.7), low_rank_tensor(5, 4, 7, 6, seed=9, decay=0.7)
    model = converted(layer, method)
    model(first)
    given_ranks = [ranks] * 4 if isinstance(ranks, int) else ranks
    bases = {mode: left_vectors(first, mode, min(given_ranks[mode], first.shape[mode])) for mode in (1, 2, 3)}
    for x in (first, second):
        grad = random_tensor(*layer(x).shape, seed=3)
        assert_exact_but_for_the_weight(layer, model, x, grad, projected(x, bases))


def saved_by(model, x):
    """Where the tensors lie that autograd saves."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    return {tensor.data_ptr() for tensor in saved}


def test_the_bases_stay_the_same_tensors_and_are_what_is_kept():
    for storage in ("input", "bfloat16", "int8"):
        model = conv_model(FixedBases(2, storage=storage)).float()
        step(model, random_tensor(5, 4, 7, 6).float())
        before = [basis for basis in model[0]._lowrank.bases if basis is not None]
        pointers = saved_by(model, random_tensor(4, 4, 7, 6, seed=1).float())
        after = [basis for basis in model[0]._lowrank.bases if basis is not None]
        assert all(first is second for first, second in zip(before, after, strict=True))
        assert {basis.data_ptr() for basis in after} < pointers


@pytest.mark.slow
@given(LAYERS, st.integers(1, 8), st.sampled_from(["input", "bfloat16", "int8"]))
def test_bytes_by_formula_are_those_that_autograd_keeps(setting, ranks, storage):
    model, x = converted(setting.layer(), FixedBases(ranks, storage=storage)), setting.x()
    for _ in range(2):
        found = lowrank.saved_bytes(model, lambda m, b: m(b).sum(), x)
        model(x)
        assert found == model[0]._lowrank.kept_bytes == model[0]._lowrank.formula_bytes <= x.nbytes
    assert lowrank.account(model, ["0"], x)["0"].activation_bytes == found


@pytest.mark.slow
@given(LAYERS, st.sampled_from(["float32", "int8"]))
def test_the_gradient_is_autograds_on_what_was_kept(setting, storage):
    method = FixedBases(3, storage=storage)
    layer, x, grad = setting.layer(), setting.x(), setting.grad()
    kept, _ = method.compress(x, None, (), "0")
    assert_exact_but_for_the_weight(layer, converted(layer, method), x, grad, restore(kept, torch.float64).dense())


def test_a_resumed_run_has_the_same_bases():
    for storage in ("input", "int8"):
        model, resumed = (conv_model(FixedBases(2, storage=storage)) for _ in range(2))
        step(model, random_tensor(5, 4, 7, 6))
        resumed.load_state_dict(model.state_dict())
        lowrank.load_training_state(resumed, lowrank.training_state(model))
        x = random_tensor(5, 4, 7, 6, seed=1)
        torch.testing.assert_close(step(resumed, x), step(model, x), rtol=0, atol=0)
        assert bases_of(resumed[0]).keys() == bases_of(model[0]).keys()


def test_images_of_another_size_find_bases_anew():
    model = conv_model(FixedBases(2))
    step(model, random_tensor(5, 4, 7, 6))
    x = random_tensor(5, 4, 9, 8)
    fresh = step(conv_model(FixedBases(2)), x)["0.weight"]
    torch.testing.assert_close(step(model, x)["0.weight"], fresh, **TOLERANCE)
    assert model[0]._lowrank.bases[2].shape == (9, 2)


def test_a_first_batch_that_is_not_finite_is_refused_and_named():
    x = random_tensor(5, 4, 7, 6)
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="layer '0'"):
        conv_model(FixedBases(2))(x)


def test_its_tag():
    assert FixedBases([2, 3]).tag == "fixed_bases"
    assert FixedBases(2, storage="int8").tag == "fixed_bases_int8_rank2"


def test_full_ranks_are_exact():
    layer, x = nn.Linear(6, 5).double(), random_tensor(40, 6)
    model, grad = converted(layer, FixedBases(99)), random_tensor(40, 5, seed=1)
    torch.testing.assert_close(autograd(model, x, grad)[2]["0.weight"], autograd(layer, x, grad)[2]["weight"])
