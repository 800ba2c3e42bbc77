import copy
import weakref
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
    assert_exact_but_for_the_weight,
    bases_of,
    conv_model,
    converted,
)
from references import (
    TOLERANCE,
    autograd,
    hosvd_input,
    kept_input,
    projected,
    random_tensor,
    subspace_step,
    svd_input,
    svd_rank,
)
from strategies import ENERGIES, LAYERS
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, ChangedError, GradientFilter, Vanilla

# Gradients


@pytest.mark.slow
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


def hosvd_ranks(x, energy):
    return [svd_rank(x, mode, energy) for mode in range(x.ndim)]


def svd_ranks(x, energy):
    return [svd_rank(x, 0, energy), *x.shape[1:]]


TRUNCATED = {SVD: (svd_input, svd_ranks), HOSVD: (hosvd_input, hosvd_ranks)}


@pytest.mark.slow
@pytest.mark.parametrize("family", TRUNCATED)
@settings(max_examples=100)
@given(setting=LAYERS, energy=ENERGIES)
def test_truncated_only_the_weight_gradient_changes(family, setting, energy):
    layer, x = setting.layer(), setting.x()
    model, (truncate, ranks) = converted(layer, family(energy)), TRUNCATED[family]
    expected = kept_input(x, truncate(x, energy), ranks(x, energy))
    assert_exact_but_for_the_weight(layer, model, x, setting.grad(), expected)


@pytest.mark.slow
@BOTH
@settings(max_examples=100)
@given(setting=LAYERS, data=st.data())
def test_asi_forms_the_weight_gradient_from_one_warm_started_iteration(algorithm, setting, data):
    layer, x = setting.layer(), setting.x()
    ranks = [data.draw(st.integers(1, size)) for size in setting.shape]
    assume(all(rank**2 <= prod(ranks) for rank in ranks))  # a rank above that leaves part of its basis arbitrary
    model = converted(layer, ASI(ranks, algorithm=algorithm))
    model(random_tensor(*x.shape, seed=setting.seed + 2))
    starts, sequential = bases_of(model[0]), algorithm == "sequential"
    kept_input = projected(x, subspace_step(x, starts, sequential))
    assert_exact_but_for_the_weight(layer, model, x, setting.grad(), kept_input)


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
    assert model[0]._lowrank.kept_bytes == 0


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
    assert model[0]._lowrank.kept_bytes == sum(saved) > 0


def test_kept_bytes_are_zero_once_the_weight_is_frozen():
    model, x = conv_model(ASI(2)), random_tensor(3, 4, 7, 6)
    model(x)
    model[0].weight.requires_grad_(False)
    model(x)
    assert model[0]._lowrank.kept_bytes == 0


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
    assert bases_of(model[0])
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in model[0]._lowrank.bases)


def test_in_place_activation_after_the_layer_changes_no_gradient():
    layer, x = nn.Conv2d(4, 6, 3, dtype=torch.float64), random_tensor(3, 4, 7, 7)
    grad = random_tensor(3, 6, 5, 5, seed=1)
    stock = autograd(nn.Sequential(layer, nn.ReLU()), x, grad)
    for method in EXACT:
        model = lowrank.convert(nn.Sequential(layer, nn.ReLU(inplace=True)), ["0"], method)
        for result, expected in zip(autograd(model, x, grad), stock, strict=True):
            torch.testing.assert_close(result, expected, **TOLERANCE)
        lowrank.revert(model)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("method", [*EXACT, HOSVD(0.8), ASI(2)])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        *((nn.Linear(5, 4), shape) for shape in ((5,), (3, 5), (2, 3, 5))),
        (nn.Linear(5, 4, bias=False), (2, 3, 2, 5)),
        *((nn.Conv2d(3, 4, 3), shape) for shape in ((2, 3, 6, 5), (3, 6, 5))),
    ],
)
def test_an_output_may_be_changed_in_place(layer, shape, method, fuse):
    """Whatever its number of dimensions; PyTorch forbids it for outputs that are views."""
    stock = nn.Sequential(copy.deepcopy(layer).double(), nn.ReLU(inplace=True))
    model = lowrank.convert(copy.deepcopy(stock), ["0"], method, fuse=fuse)
    x, outputs = random_tensor(*shape), []
    for network in (stock, model):
        y = network[0](x)
        y += 1
        y[..., 0] *= 2
        y = network[1](y)
        y.backward(random_tensor(*y.shape, seed=1))
        outputs.append((y.detach(), network[0].bias.grad if layer.bias is not None else None))
    torch.testing.assert_close(outputs[1], outputs[0], **TOLERANCE)


def test_the_weight_changed_between_forward_and_backward_is_noticed():
    model, x = conv_model(HOSVD(0.8)), random_tensor(3, 4, 7, 6).requires_grad_(True)
    y = model(x)
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(ChangedError, match=r"layer '0'.*modified by an inplace operation"):
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
