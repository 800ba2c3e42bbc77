"""Methods whose Tucker form is kept in fewer bits: gradients, what is carried, bytes, and shared inputs."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import assert_equal_states, assert_exact_but_for_the_weight, conv_model, converted, step, whole_state
from references import low_rank_tensor, random_tensor
from strategies import LAYERS
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, WASI, SettingError
from lowrank.layers.layer import geometry_of
from lowrank.tensors.storage import restore

FORMS = st.sampled_from(["float32", "bfloat16", "int8"])
METHODS = [
    lambda storage: ASI(3, storage=storage),
    lambda storage: ASI(3, storage=storage, algorithm="published"),
    lambda storage: ASI(3, storage=storage, refresh=2),
    lambda storage: ASI(3, storage=storage, refresh="energy"),
    lambda storage: HOSVD(0.9, storage=storage),
    lambda storage: SVD(0.9, storage=storage),
]


def kept_by(model, x):
    """What autograd saves of an input."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    weight = model[0].weight
    return [tensor for tensor in saved if tensor.data_ptr() != weight.data_ptr()]


@pytest.mark.slow
@given(LAYERS, st.sampled_from(METHODS), FORMS)
def test_the_gradient_is_autograds_on_what_was_kept(setting, make, storage):
    method = make(storage)
    layer, x, grad = setting.layer(), setting.x(), setting.grad()
    (kept, _) = method.compress(x, geometry_of(layer), (), "0")
    assert_exact_but_for_the_weight(layer, converted(layer, method), x, grad, restore(kept, torch.float64).dense())


@pytest.mark.slow
@given(LAYERS, st.sampled_from(METHODS), FORMS)
def test_bytes_by_formula_are_those_that_autograd_keeps(setting, make, storage):
    model, x = converted(setting.layer(), make(storage)), setting.x()
    for _ in range(2):
        found = lowrank.saved_bytes(model, lambda m, b: m(b).sum(), x)
        model(x)
        state = model[0]._lowrank
        assert found == state.kept_bytes == state.formula_bytes <= x.nbytes
    assert lowrank.account(model, ["0"], x)["0"].activation_bytes == found


@pytest.mark.parametrize("refresh", [1, 2, "energy"])
@pytest.mark.parametrize(("storage", "dtype"), [("int8", torch.int8), ("bfloat16", torch.bfloat16)])
def test_bases_are_carried_in_the_same_form_and_shared_with_what_is_kept(storage, dtype, refresh):
    model = conv_model(ASI(3, storage=storage, refresh=refresh)).float()
    x = random_tensor(5, 4, 7, 6, dtype=torch.float32)
    for _ in range(3):
        kept = {tensor.data_ptr() for tensor in kept_by(model, x) if tensor.dtype == dtype}
        carried = {key: basis for key, basis in enumerate(model[0]._lowrank.bases) if basis is not None and basis.ndim}
        assert len(carried) == (8 if storage == "int8" else 4)
        assert all(basis.dtype in (dtype, torch.bfloat16) for basis in carried.values())
        assert {basis.data_ptr() for key, basis in carried.items() if key < 4} < kept


@pytest.mark.parametrize("refresh", [1, 3, "energy"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_a_resumed_run_goes_on_bit_for_bit(storage, refresh):
    method = ASI((3, 4, 2, 3), storage=storage, refresh=refresh)
    model, x = conv_model(method), [random_tensor(5, 4, 7, 6, seed=seed) for seed in range(5)]
    step(model, x[0])
    step(model, x[1])
    saved = lowrank.training_state(model)
    resumed = conv_model(method)
    resumed.load_state_dict(model.state_dict())
    lowrank.load_training_state(resumed, saved)
    for batch in x[2:]:
        torch.testing.assert_close(step(resumed, batch), step(model, batch), rtol=0, atol=0)
    assert_equal_states(whole_state(resumed), whole_state(model))


def test_a_state_of_another_storage_is_a_start_as_well():
    x = low_rank_tensor(8, 4, 7, 6, decay=0.7)
    models = {storage: conv_model(ASI(3, storage=storage)) for storage in ("input", "int8")}
    for model in models.values():
        for _ in range(20):
            gradient = step(model, x)["0.weight"]
    for storage, other in (("input", "int8"), ("int8", "input")):
        started = conv_model(ASI(3, storage=other))
        lowrank.load_training_state(started, lowrank.training_state(models[storage]))
        fresh = step(conv_model(ASI(3, storage=other)), x)["0.weight"]
        apart, before = ((found - gradient).norm() for found in (step(started, x)["0.weight"], fresh))
        assert apart < 0.02 * gradient.norm() < before


def test_a_smaller_batch_leaves_the_basis_of_the_full_one():
    model = conv_model(ASI(3, storage="int8"))
    step(model, random_tensor(6, 4, 7, 6))
    before = lowrank.training_state(model)
    step(model, random_tensor(4, 4, 7, 6, seed=1))
    after = lowrank.training_state(model)
    assert all(torch.equal(after[key], before[key]) for key in ("0.bases.0", "0.bases.5"))
    assert not torch.equal(after["0.bases.1"], before["0.bases.1"])


@pytest.mark.parametrize("refresh", [1, 2, "energy"])
def test_values_that_are_not_finite_show_and_the_next_step_recovers(refresh):
    model, x = conv_model(ASI(3, storage="int8", refresh=refresh)), random_tensor(5, 4, 7, 6)
    expected = step(copy.deepcopy(model), x)["0.weight"]
    step(model, x)
    bad = x.clone()
    bad[0, 0, 0, 0] = float("nan")
    assert step(model, bad)["0.weight"].isnan().any()
    for _ in range(30):
        found = step(model, x)["0.weight"]
    assert found.isfinite().all()
    scale = step(conv_model(lowrank.Vanilla()), x)["0.weight"].norm()
    assert (found - expected).norm() < scale


def test_eight_bits_cost_half_a_percent_for_each_of_five_parts():
    layer, x = nn.Conv2d(16, 8, 3, padding=1), low_rank_tensor(16, 16, 12, 12, decay=0.8).float()
    grad = random_tensor(16, 8, 12, 12).float()
    exact = {}
    for storage in ("input", "int8"):
        model = converted(layer, HOSVD(0.99, storage=storage))
        model(x).backward(grad)
        exact[storage] = (model[0].weight.grad.clone(), model[0]._lowrank.kept_bytes)
    apart = (exact["int8"][0] - exact["input"][0]).norm() / exact["input"][0].norm()
    assert 0.003 < apart < 0.015
    assert exact["int8"][1] < 0.29 * exact["input"][1]


@pytest.mark.parametrize("method", [ASI(99, storage="int8"), HOSVD(1.0, storage="int8"), SVD(1.0, storage="int8")])
@pytest.mark.parametrize("shape", [(6, 50), (2, 3, 40)])
def test_an_input_at_full_rank_is_kept_rounded_without_factors(method, shape):
    model, x = converted(nn.Linear(shape[-1], 4), method), random_tensor(*shape).float()
    y = model(x)
    assert model[0]._lowrank.kept_bytes <= x.numel() + 2 * -(-x.numel() // 32)
    y.backward(torch.ones_like(y))
    expected = torch.ones(4, 1) @ x.reshape(-1, shape[-1]).sum(0, keepdim=True)
    torch.testing.assert_close(model[0].weight.grad, expected, rtol=0, atol=0.02 * x.abs().max() * x[..., 0].numel())


def test_factored_weights_take_gradients_from_the_stored_form():
    x, exact = low_rank_tensor(6, 5, 12, decay=0.8).float(), {}
    for storage in ("input", "int8"):
        torch.manual_seed(0)
        model = lowrank.convert(nn.Sequential(nn.Linear(12, 9)), ["0"], WASI((4, 4, 8), energy=0.99, storage=storage))
        for _ in range(10):
            gradients = step(model, x)
        exact[storage] = gradients
        assert model[0]._lowrank.kept_bytes == model[0]._lowrank.formula_bytes
    for name in ("0.left", "0.right"):
        assert 0 < (exact["int8"][name] - exact["input"][name]).norm() < 0.03 * exact["input"][name].norm()


def test_an_input_that_two_layers_are_given_is_shared_in_one_storage_alone():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(30, 4), nn.Linear(30, 4)

        def forward(self, x):
            return self.a(x) + self.b(x)

    x = random_tensor(20, 30).float()
    for storages, shared in ((("int8", "int8"), True), (("int8", "input"), False)):
        methods = {name: ASI(5, storage=storage) for name, storage in zip("ab", storages, strict=True)}
        model = lowrank.convert(Two(), methods)
        model(x)
        assert (model.b._lowrank.kept_bytes == 0) == shared


@pytest.mark.parametrize(
    ("method", "tag"),
    [
        (ASI(storage="int8"), "asi_int8"),
        (ASI(2, storage="int8", refresh=10), "asi_int8_rank2_every10"),
        (HOSVD(0.8, storage="int8"), "hosvd_int8_0.8"),
        (SVD(0.8, storage="bfloat16"), "svd_bfloat16_0.8"),
        (WASI(energy=0.9, storage="int8"), "wasi_0.9_int8"),
    ],
)
def test_tags_say_the_storage(method, tag):
    assert method.tag == tag


def test_a_plan_brings_the_storage_of_each_layer():
    plan = lowrank.RankPlan({"a": (2, 2), "b": (3, 3)}, {}, 0, 0.0, {"a": "int8", "b": "input"})
    assert [ASI(plan).for_layer(name).storage for name in "ab"] == ["int8", "input"]
    assert ASI(plan).tag == "asi_mixed"
    with pytest.raises(SettingError, match=r"'b' were chosen for storage 'input', not 'int8'"):
        ASI(plan, storage="int8").for_layer("b")
    one = lowrank.RankPlan({"a": (2, 2)}, {}, 0, 0.0, {"a": "int8"})
    assert ASI(one).tag == ASI(one, storage="int8").tag == "asi_int8"
