import copy
import io
import pickle
import weakref
from collections import OrderedDict
from math import prod

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layer_cases import (
    BOTH,
    EVERY,
    EVERY_CONV,
    EXACT,
    assert_equal_states,
    bases_of,
    conv_model,
    converted,
    state_of,
    step,
)
from references import (
    TOLERANCE,
    TwoConvolutions,
    autograd,
    hosvd_input,
    labelled_batch,
    left_vectors,
    low_rank_tensor,
    projected,
    random_tensor,
    same_span,
    subspace_step,
    svd_input,
)
from strategies import ENERGIES, LAYERS
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, GradientFilter, NonFiniteError, SettingError, Vanilla

# Gradients


@pytest.mark.parametrize("method", EXACT)
@settings(max_examples=100)
@given(setting=LAYERS)
def test_at_full_rank_everything_equals_the_stock_layer(method, setting):
    stock, x, grad = nn.Sequential(setting.layer()), setting.x(), setting.grad()
    results = autograd(converted(stock[0], method), x, grad)
    for result, expected in zip(results, autograd(stock, x, grad), strict=True):
        torch.testing.assert_close(result, expected, **TOLERANCE)


# Settings that the public code of the papers gets wrong: asymmetric padding, stride equal to dilation, groups between
# one and depthwise, a depth multiplier, padding modes, and linear layers on plain vectors.
DELICATE = {
    "padding (1, 0)": (nn.Conv2d(4, 6, 3, padding=(1, 0)), (3, 4, 7, 6)),
    "padding (0, 2)": (nn.Conv2d(4, 6, 3, padding=(0, 2)), (3, 4, 7, 6)),
    "padding same, even kernel": (nn.Conv2d(4, 6, (2, 4), padding="same"), (3, 4, 7, 6)),
    "padding valid": (nn.Conv2d(4, 6, 3, padding="valid"), (3, 4, 7, 6)),
    "stride and dilation 2": (nn.Conv2d(4, 6, 3, stride=2, dilation=2), (3, 4, 9, 8)),
    "stride that skips the end": (nn.Conv2d(4, 6, 3, stride=3), (3, 4, 8, 7)),
    "two groups": (nn.Conv2d(4, 6, 3, groups=2), (3, 4, 7, 6)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), (3, 4, 7, 6)),
    "depth multiplier": (nn.Conv2d(4, 8, 3, groups=4), (3, 4, 7, 6)),
    "strided pointwise": (nn.Conv2d(4, 6, 1, stride=2), (3, 4, 7, 6)),
    "padded pointwise": (nn.Conv2d(4, 6, 1, padding=1), (3, 4, 7, 6)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (3, 4, 7, 6)),
    "replicate": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="replicate"), (3, 4, 7, 6)),
    "circular": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), (3, 4, 7, 6)),
    "linear, 2-D": (nn.Linear(5, 4), (6, 5)),
    "linear, 3-D": (nn.Linear(5, 4), (6, 3, 5)),
    "linear, 4-D": (nn.Linear(5, 4, bias=False), (2, 3, 4, 5)),
}


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("case", DELICATE)
def test_delicate_settings_are_exact_at_full_rank(case, method):
    layer, shape = DELICATE[case]
    stock, x = nn.Sequential(copy.deepcopy(layer).double()), random_tensor(*shape)
    grad = random_tensor(*stock(x).shape, seed=1)
    results = autograd(converted(stock[0], method), x, grad)
    for result, expected in zip(results, autograd(stock, x, grad), strict=True):
        torch.testing.assert_close(result, expected, **TOLERANCE)


def assert_exact_but_for_the_weight(layer, model, x, grad, kept_input):
    """Output, input and bias gradient are the stock layer's; the weight gradient is autograd's on `kept_input`."""
    y, grad_x, gradients = autograd(layer, x, grad)
    expected = {"0." + name: gradient for name, gradient in gradients.items()}
    expected["0.weight"] = autograd(layer, kept_input, grad)[2]["weight"]
    result_y, result_x, results = autograd(model, x, grad)
    torch.testing.assert_close(result_y, y, **TOLERANCE)
    torch.testing.assert_close(result_x, grad_x, **TOLERANCE)
    torch.testing.assert_close(results, expected, **TOLERANCE)


@pytest.mark.parametrize(("family", "kept_input"), [(SVD, svd_input), (HOSVD, hosvd_input)])
@settings(max_examples=100)
@given(setting=LAYERS, energy=ENERGIES)
def test_truncated_only_the_weight_gradient_changes(family, kept_input, setting, energy):
    layer, x = setting.layer(), setting.x()
    model = converted(layer, family(energy))
    assert_exact_but_for_the_weight(layer, model, x, setting.grad(), kept_input(x, energy))


@BOTH
@settings(max_examples=100)
@given(setting=LAYERS, data=st.data())
def test_asi_forms_the_weight_gradient_from_one_warm_started_iteration(algorithm, setting, data):
    layer, x = setting.layer(), setting.x()
    ranks = [data.draw(st.integers(1, size)) for size in setting.shape]
    assume(all(rank**2 <= prod(ranks) for rank in ranks))  # a rank above that leaves part of its basis arbitrary
    model = converted(layer, ASI(ranks, algorithm=algorithm))
    model(random_tensor(*x.shape, seed=setting.seed + 2))
    bases = subspace_step(x, bases_of(model[0]), algorithm == "sequential")
    assert_exact_but_for_the_weight(layer, model, x, setting.grad(), projected(x, bases))


@pytest.mark.parametrize("method", EVERY_CONV)
def test_a_random_upstream_gradient_of_any_memory_layout_is_taken(method):
    model, x = conv_model(method), random_tensor(3, 4, 7, 6)
    grad = random_tensor(3, 6, 7, 6, seed=1)
    plain = autograd(model, x, grad)
    for layout in (grad.to(memory_format=torch.channels_last), grad.mT.contiguous().mT):
        for result, expected in zip(autograd(model, x, layout), plain, strict=True):
            torch.testing.assert_close(result, expected, **TOLERANCE)


@pytest.mark.parametrize("method", EVERY_CONV)
def test_channels_last_input_gives_the_same_gradients(method):
    model, x, grad = conv_model(method), random_tensor(5, 4, 7, 6), random_tensor(5, 6, 7, 6, seed=1)
    plain = autograd(model, x, grad)
    other = autograd(model, x.to(memory_format=torch.channels_last), grad)
    for result, expected in zip(other, plain, strict=True):
        torch.testing.assert_close(result, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["input", None])
@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv2d(4, 6, 3), (2, 4, 5, 5)), (nn.Linear(4, 6), (3, 4))])
def test_the_input_is_passed_by_position_or_by_its_stock_name(layer, shape, name):
    model, x = converted(layer, ASI(2)), random_tensor(*shape, dtype=torch.float32)
    y = model[0](x) if name is None else model[0](**{name: x})
    torch.testing.assert_close(y, layer(x))


# What is kept


@pytest.mark.parametrize("method", EVERY_CONV)
def test_a_frozen_weight_keeps_nothing(method):
    model = conv_model(method)
    model[0].weight.requires_grad_(False)
    saved = lowrank.saved_bytes(model, lambda m, x: m(x).square().sum(), random_tensor(3, 4, 7, 6))
    assert saved == 8 * 3 * 6 * 7 * 6  # the output, which the square keeps
    assert model[0].kept_bytes == 0


@pytest.mark.parametrize("method", EVERY_CONV)
def test_input_and_bias_gradients_flow_past_a_frozen_weight(method):
    model, x, grad = conv_model(Vanilla()), random_tensor(3, 4, 7, 6), random_tensor(3, 6, 7, 6, seed=1)
    model[0].weight.requires_grad_(False)
    lowrank.convert(model, ["0"], method)
    _, grad_x, gradients = autograd(model, x, grad)
    assert gradients["0.weight"] is None
    torch.testing.assert_close(gradients["0.bias"], grad.sum((0, 2, 3)), **TOLERANCE)
    if not isinstance(method, GradientFilter):
        torch.testing.assert_close(grad_x, autograd(lowrank.revert(model), x, grad)[1], **TOLERANCE)


@pytest.mark.parametrize("method", EVERY_CONV)
def test_kept_bytes_are_what_autograd_is_given_to_keep(method):
    model, x = conv_model(method), random_tensor(3, 4, 7, 6)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        model(x)
    assert model[0].kept_bytes == sum(saved) > 0


def test_kept_bytes_are_zero_once_the_weight_is_frozen():
    model, x = conv_model(ASI(2)), random_tensor(3, 4, 7, 6)
    model(x)
    model[0].weight.requires_grad_(False)
    model(x)
    assert model[0].kept_bytes == 0


@BOTH
def test_a_step_leaves_no_graph_and_no_activation_behind(algorithm):
    model, x = conv_model(ASI(2, algorithm=algorithm)), random_tensor(3, 4, 7, 6)
    hidden = (x.requires_grad_(True) * 2).contiguous()
    reference = weakref.ref(hidden)
    y = model(hidden)
    del hidden
    assert reference() is None  # nothing of the full activation outlives the forward pass
    y.square().sum().backward()
    assert all(not basis.requires_grad and basis.grad_fn is None for basis in bases_of(model[0]).values())


@BOTH
def test_state_holds_no_memory_beyond_its_own(algorithm):
    model = conv_model(ASI(2, algorithm=algorithm))
    model(random_tensor(5, 4, 7, 6))
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in model[0].buffers())


def test_in_place_activation_after_the_layer_changes_no_gradient():
    layer, x = nn.Conv2d(4, 6, 3, dtype=torch.float64), random_tensor(3, 4, 7, 7)
    grad = random_tensor(3, 6, 5, 5, seed=1)
    stock = autograd(nn.Sequential(layer, nn.ReLU()), x, grad)
    for method in EXACT:
        model = lowrank.convert(nn.Sequential(layer, nn.ReLU(inplace=True)), ["0"], method)
        for result, expected in zip(autograd(model, x, grad), stock, strict=True):
            torch.testing.assert_close(result, expected, **TOLERANCE)
        lowrank.revert(model)


def test_the_weight_changed_between_forward_and_backward_is_noticed():
    model, x = conv_model(HOSVD(0.8)), random_tensor(3, 4, 7, 6).requires_grad_(True)
    y = model(x)
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Inputs of unusual shape


@pytest.mark.parametrize("method", EVERY_CONV)
def test_an_empty_batch_of_a_convolution_gives_zero_gradients(method):
    _, grad_x, gradients = autograd(conv_model(method), random_tensor(0, 4, 7, 6), random_tensor(0, 6, 7, 6))
    assert grad_x.shape == (0, 4, 7, 6)
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (2, 0, 5)])
def test_an_empty_batch_of_a_linear_layer_gives_zero_gradients(method, shape):
    model = converted(nn.Linear(5, 4, dtype=torch.float64), method)
    _, grad_x, gradients = autograd(model, random_tensor(*shape), random_tensor(*shape[:-1], 4))
    assert grad_x.shape == shape
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("method", EVERY_CONV)
def test_an_unbatched_image_is_a_batch_of_one(method):
    model, x, grad = conv_model(method), random_tensor(4, 7, 6), random_tensor(6, 7, 6, seed=1)
    single = autograd(model, x, grad)
    batched = autograd(model, x[None], grad[None])
    torch.testing.assert_close(single[0], batched[0][0], **TOLERANCE)
    torch.testing.assert_close(single[1], batched[1][0], **TOLERANCE)
    torch.testing.assert_close(single[2], batched[2], **TOLERANCE)


@pytest.mark.parametrize("method", EXACT)
def test_an_unbatched_vector_is_taken_by_a_linear_layer(method):
    layer, x, grad = nn.Linear(5, 4, dtype=torch.float64), random_tensor(5), random_tensor(4, seed=1)
    stock = autograd(nn.Sequential(layer), x, grad)
    for result, expected in zip(autograd(converted(layer, method), x, grad), stock, strict=True):
        torch.testing.assert_close(result, expected, **TOLERANCE)


# ASI from step to step


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
    assert not state_of(model)


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


@pytest.mark.parametrize("ranks", [[2, 2], [2, 2, 2], [2, 2, 2, 2, 2]])
def test_a_wrong_number_of_ranks_names_the_layer(ranks):
    model = lowrank.convert(TwoConvolutions(), ["second"], ASI(ranks))
    with pytest.raises(SettingError, match=rf"'second'.*{len(ranks)} ranks.*4 modes"):
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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_stored(mode):
    model, x = conv_model(ASI(2)), random_tensor(5, 4, 7, 6)
    with mode():
        y = model(x)
    assert not state_of(model)
    torch.testing.assert_close(y, lowrank.revert(model)(x), rtol=0, atol=0)


# State in checkpoints


@BOTH
@pytest.mark.parametrize(
    "ranks",
    [(2, 2, 2, 2), (99, 2, 2, 2), (2, 99, 2, 2), (2, 2, 2, 99), (2, 2, 99, 99), (99, 2, 99, 99), (99, 99, 99, 99)],
)
def test_a_resumed_run_goes_on_bit_for_bit(algorithm, ranks):
    method = ASI(ranks, algorithm=algorithm)
    model, x = conv_model(method), [random_tensor(5, 4, 7, 6, seed=seed) for seed in range(4)]
    step(model, x[0])
    step(model, x[1])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    resumed = conv_model(method)
    resumed.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for batch in x[2:]:
        torch.testing.assert_close(step(resumed, batch), step(model, batch), rtol=0, atol=0)
    assert_equal_states(resumed.state_dict(), model.state_dict())


@BOTH
def test_the_state_is_that_of_the_latest_step_and_is_in_the_state_dict(algorithm):
    model, x = conv_model(ASI(2, algorithm=algorithm)), random_tensor(5, 4, 7, 6)
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    step(model, x)
    assert [tuple(basis.shape) for basis in state_of(model).values()] == [(5, 2), (4, 2), (7, 2), (6, 2)]
    first = {key: value.clone() for key, value in state_of(model).items()}
    step(model, random_tensor(5, 4, 7, 6, seed=1))
    assert not any(torch.equal(value, first[key]) for key, value in state_of(model).items())


def test_a_stock_checkpoint_loads_strictly_and_starts_the_bases_afresh():
    stock, x = TwoConvolutions(), labelled_batch()[0]
    model = lowrank.convert(TwoConvolutions(), ["first", "second"], ASI(2))
    fresh = lowrank.convert(copy.deepcopy(stock), ["first", "second"], ASI(2))
    step(model, x)
    model.load_state_dict(stock.state_dict(), strict=True)
    assert not state_of(model)
    torch.testing.assert_close(step(model, x), step(fresh, x), rtol=0, atol=0)


def test_a_converted_checkpoint_loads_into_a_stock_model():
    stock, model = TwoConvolutions(), lowrank.convert(TwoConvolutions(), ["first", "head"], ASI(2))
    step(model, labelled_batch()[0])
    assert state_of(model)
    stock.load_state_dict(lowrank.stock_state_dict(model.state_dict()), strict=True)
    assert_equal_states(stock.state_dict(), lowrank.revert(model).state_dict())


def test_a_checkpoint_of_another_batch_size_loads_and_trains():
    model, other = conv_model(ASI(2)), conv_model(ASI(2))
    step(model, random_tensor(8, 4, 7, 6))
    step(other, random_tensor(5, 4, 7, 6))
    other.load_state_dict(model.state_dict(), strict=True)
    assert_equal_states(state_of(other), state_of(model))
    assert torch.isfinite(step(other, random_tensor(5, 4, 7, 6))["0.weight"]).all()


def test_loading_a_checkpoint_does_not_tie_the_model_to_it():
    model, other = conv_model(ASI(2)), conv_model(ASI(2))
    step(model, random_tensor(5, 4, 7, 6))
    checkpoint_state = {key: value.clone() for key, value in model.state_dict().items()}
    other.load_state_dict(checkpoint_state)
    step(other, random_tensor(5, 4, 7, 6, seed=1))
    assert_equal_states(checkpoint_state, model.state_dict())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("method", EVERY_CONV)
def test_a_copy_goes_on_as_the_original_and_apart_from_it(copier, method):
    model, x = conv_model(method), [random_tensor(5, 4, 7, 6, seed=seed) for seed in range(3)]
    step(model, x[0])
    twin = copier(model)
    step(twin, x[2])  # must not move the original
    twin = copier(model)
    torch.testing.assert_close(step(twin, x[1]), step(model, x[1]), rtol=0, atol=0)
    assert_equal_states(twin.state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [torch.float64, torch.float32, torch.bfloat16])
@BOTH
def test_a_model_changes_its_dtype_between_steps(start, dtype, algorithm):
    model = conv_model(ASI(2, algorithm=algorithm)).to(start)
    step(model, random_tensor(5, 4, 7, 6, dtype=start))
    model.to(dtype)
    gradients = step(model, random_tensor(5, 4, 7, 6, seed=1, dtype=dtype))
    assert gradients["0.weight"].dtype == dtype
    assert torch.isfinite(gradients["0.weight"]).all()


def test_state_moves_with_the_model():
    model = conv_model(ASI(2))
    step(model, random_tensor(5, 4, 7, 6))
    assert {basis.dtype for basis in bases_of(model.to(torch.float32)[0]).values()} == {torch.float32}
    assert {basis.device.type for basis in bases_of(model.to("meta")[0]).values()} == {"meta"}


def test_the_description_names_the_method():
    assert "HOSVD(energy=0.8)" in repr(conv_model(HOSVD(0.8)))
