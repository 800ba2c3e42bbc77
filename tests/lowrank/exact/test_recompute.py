"""What is computed again in the backward pass: bit for bit what PyTorch computes, and how much less is kept."""

import copy

import pytest
import torch
import torch.nn.functional as F
from leaks import no_tensor_left
from references import DEVICE, random_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import ASI, WSI, ChangedError, Vanilla
from lowrank.exact import curves, origins, recompute
from lowrank.meters.memory import held_bytes

TOKENS, SIZE = 30, 8
UNIT = 2 * TOKENS * SIZE * 8  # bytes of an activation (2, TOKENS, SIZE) in double precision


class Block(nn.Module):
    """Residual, normalisation, an MLP four times as wide, normalisation."""

    def __init__(self, activation=nn.GELU, functional=None):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.first = nn.LayerNorm(SIZE), nn.Linear(SIZE, 4 * SIZE)
        self.activation, self.functional = activation(), functional
        self.second, self.last = nn.Linear(4 * SIZE, SIZE), nn.LayerNorm(SIZE)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        with torch.no_grad():
            self.norm.weight[0] = 0  # no inverse

    def forward(self, x):
        x = x * 1
        activation = self.functional or self.activation
        return self.last(x + self.second(activation(self.first(self.norm(x)))))


def loss_of(model, x):
    return model(x).square().mean()


def results(model, x, loss=loss_of):
    leaf = x.clone().requires_grad_(True)
    model.zero_grad()
    value = loss(model, leaf)
    value.backward()
    return (
        value.detach(),
        leaf.grad,
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    )


def pair(**options):
    stock = Block(**options).double()
    return stock, copy.deepcopy(stock), random_tensor(2, TOKENS, SIZE).requires_grad_(True)


ACTIVATIONS = {
    "gelu": {},
    "tanh gelu": {"activation": lambda: nn.GELU("tanh")},
    "silu": {"activation": nn.SiLU},
    "functional gelu": {"functional": F.gelu},
    "functional silu": {"functional": F.silu},
}
BOTH = ["first", "second"]


def assert_the_same(first, second):
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[2].keys() == second[2].keys()
    for name, grad in first[2].items():
        torch.testing.assert_close(second[2][name], grad, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("options", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_a_block_has_the_same_gradients_and_keeps_residuals_alone(options):
    stock, model, x = pair(**options)
    lowrank.convert(model, BOTH, Vanilla())
    assert_the_same(results(stock, x.detach()), results(model, x.detach()))
    statistics = 4 * 2 * TOKENS * 8  # mean and deviation of two normalisations
    loss_output = UNIT
    before, after = (lowrank.saved_bytes(network, loss_of, x) for network in (stock, model))
    assert before == pytest.approx((1 + 1 + 4 + 4 + 1) * UNIT + statistics + loss_output, abs=64)
    assert after == pytest.approx((1 + 1) * UNIT + statistics + loss_output, abs=64)
    assert held_bytes(model, loss_of, x) == pytest.approx(
        after, abs=64 if DEVICE == "cpu" else 4 * 512
    )  # a GPU gives blocks


@pytest.mark.parametrize("method", [ASI([2, 3, 4]), WSI(energy=1)], ids=lambda method: method.tag)
def test_compressed_inputs_need_no_exact_ones(method):
    _, model, x = pair()
    lowrank.convert(model, BOTH, method, everywhere=True)
    reference = copy.deepcopy(model)
    lowrank.revert(reference)
    lowrank.convert(reference, BOTH, method, fuse=False)
    lowrank.load_training_state(reference, lowrank.training_state(model))  # factors have no sign of their own
    _, grad, gradients = results(reference, x.detach())
    _, own_grad, own = results(model, x.detach())
    torch.testing.assert_close(own_grad, grad, rtol=1e-12, atol=1e-12)
    for name, expected in gradients.items():
        torch.testing.assert_close(own[name], expected, rtol=1e-12, atol=1e-12)
    compressed = (
        sum(layer._lowrank.kept_bytes for layer in lowrank.converted_layers(model)) if isinstance(method, ASI) else 0
    )
    assert lowrank.saved_bytes(model, loss_of, x) <= 3 * UNIT + 4 * 2 * TOKENS * 8 + compressed + 64


@pytest.mark.parametrize(("ranks", "exact"), [([2, 9, 8], True), ([1, 1, 1], False)])
def test_an_input_that_takes_nothing_is_left_exact_unless_its_form_takes_a_32nd(ranks, exact):
    """The second layer's, of 3840 numbers, has a form of 1 + 4 + 30 + 32, of higher ranks a multiple of that."""
    stock, model, _ = pair()
    x = random_tensor(4, TOKENS, SIZE).requires_grad_(True)
    lowrank.convert(model, {"second": ASI(ranks)})
    plain = lowrank.convert(copy.deepcopy(stock), ["second"], ASI(ranks), fuse=False)
    _, _, found = results(model, x.detach())
    for name, expected in results(stock if exact else plain, x.detach())[2].items():
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-12)
    own = lowrank.convert(copy.deepcopy(stock), ["second"], Vanilla())
    added = lowrank.saved_bytes(model, loss_of, x) - lowrank.saved_bytes(own, loss_of, x)
    assert added == (0 if exact else (1 + 4 + 30 + 32) * 8)


def test_without_a_normalisation_ahead_the_smaller_tensor_is_kept():
    class Bare(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.first, self.second = nn.Linear(SIZE, width).double(), nn.Linear(width, SIZE).double()

        def forward(self, x):
            return self.second(F.gelu(self.first(x * 1)))

    x = random_tensor(2, TOKENS, SIZE).requires_grad_(True)
    for width, kept in ((4 * SIZE, 1), (SIZE // 2, 0.5)):
        model = lowrank.convert(Bare(width), BOTH, ASI([1, 1, 1]))
        compressed = sum(layer._lowrank.kept_bytes for layer in _after_a_step(model, x))
        assert lowrank.saved_bytes(model, loss_of, x) == pytest.approx((kept + 1) * UNIT + compressed, abs=64)


def _after_a_step(model, x):
    loss_of(model, x).backward()
    return list(lowrank.converted_layers(model))


def test_a_class_token_does_not_hold_on_to_all_tokens():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(SIZE).double(), nn.Linear(SIZE, 3).double()

        def forward(self, x):
            return self.head((torch.tanh(x) * 2)[:, 0])

    x = random_tensor(2, TOKENS, SIZE).requires_grad_(True)
    model = Head()
    before = lowrank.saved_bytes(model, loss_of, x)
    stock = results(model, x.detach())
    lowrank.convert(model, ["head"], Vanilla())
    assert_the_same(stock, results(model, x.detach()))
    assert before - lowrank.saved_bytes(model, loss_of, x) == UNIT - 2 * SIZE * 8


def test_a_tensor_that_was_changed_in_place_is_kept_as_it_is():
    class Changed(Block):
        def forward(self, x):
            y = self.norm(x * 1)
            y += 1
            return self.last(self.second(self.activation(self.first(y))))

    torch.manual_seed(0)
    stock = Changed().double()
    model = lowrank.convert(copy.deepcopy(stock), BOTH, Vanilla())
    assert_the_same(results(stock, random_tensor(2, 5, SIZE)), results(model, random_tensor(2, 5, SIZE)))


def test_a_hook_that_replaces_an_output_is_respected():
    stock, _, x = pair()
    stock.norm.register_forward_hook(lambda module, inputs, output: output * 2)
    model = lowrank.convert(copy.deepcopy(stock), BOTH, Vanilla())
    assert_the_same(results(stock, x.detach()), results(model, x.detach()))


def test_under_autocast_checkpointing_and_without_gradients():
    stock, model, x = pair()
    stock, model, x = stock.float(), model.float(), x.detach().float()
    lowrank.convert(model, BOTH, Vanilla())

    def autocast(model, x):
        with torch.autocast(DEVICE, torch.bfloat16):
            return model(x).float().square().mean()

    for loss in (autocast, lambda m, x: checkpoint(m, x, use_reentrant=False).square().mean()):
        expected, own = results(stock, x, loss), results(model, x, loss)
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(model(x), stock(x))


def test_every_module_and_function_is_exact_on_its_own():
    x = random_tensor(4, 5, SIZE)
    calls = {
        (F.gelu, curves.gelu): ({}, {"approximate": "tanh"}),
        (F.silu, curves.silu): ({}, {"inplace": True}),
        (F.layer_norm, recompute.layer_norm): (
            {"normalized_shape": (5, SIZE)},
            {"normalized_shape": (SIZE,), "weight": x[0, 0], "eps": 0.1},
        ),
    }
    for functions, settings in calls.items():
        for options in settings:
            grads = []
            for own in functions:
                leaf = x.clone().requires_grad_(True)
                y = own(leaf * 1, **options)
                y.backward(random_tensor(*y.shape, seed=3))
                grads.append((y.detach(), leaf.grad))
            assert torch.equal(grads[0][0], grads[1][0])
            assert torch.equal(grads[0][1], grads[1][1])


def test_nothing_is_kept_alive():
    _, model, x = pair()
    lowrank.convert(model, BOTH, Vanilla())
    loss_of(model, x).backward()
    before = len(origins._ORIGINS)
    with no_tensor_left():
        for _again in range(3):
            loss_of(model, x).backward()
    assert len(origins._ORIGINS) == before


CHANGED = pytest.mark.parametrize("name", ["first.weight", "first.bias", "input"])


@CHANGED
def test_a_source_that_is_changed_before_the_backward_pass_is_an_error(name):
    """What is computed again would be another tensor than the forward pass had."""
    model = nn.Sequential(nn.LayerNorm(SIZE), nn.Linear(SIZE, 4 * SIZE), nn.GELU(), nn.Linear(4 * SIZE, SIZE))
    lowrank.convert(model.double(), ["1", "3"], Vanilla())
    x = random_tensor(2, TOKENS, SIZE)
    y = model(x)
    with torch.no_grad():
        {"first.weight": model[1].weight, "first.bias": model[1].bias, "input": x}[name].mul_(2)
    with pytest.raises(ChangedError, match=r"in place between forward and backward pass.*fuse=False"):
        y.square().mean().backward()


@CHANGED
def test_a_source_that_is_changed_ahead_of_the_activation_is_not_used(name):
    """PyTorch keeps the input of the activation, and nothing else of all this."""

    class Stepping(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first = nn.LayerNorm(SIZE, elementwise_affine=False), nn.Linear(SIZE, 4 * SIZE)
            self.activation, self.second = nn.GELU(), nn.Linear(4 * SIZE, SIZE)

        def forward(self, x):
            normal = self.norm(x)
            hidden = self.first(normal)
            with torch.no_grad():
                changed = normal if name == "input" else self.get_parameter(name)
                changed.copy_(changed.flip(-1))
            return self.second(self.activation(hidden))

    torch.manual_seed(0)
    stock = Stepping().double()
    stock.first.weight.requires_grad_(name != "input")
    model = lowrank.convert(copy.deepcopy(stock), BOTH, Vanilla())
    gradients = []
    for network in (stock, model):
        y = network(random_tensor(2, 5, SIZE))
        y.backward(random_tensor(*y.shape, seed=1))
        gradients.append({key: p.grad for key, p in network.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


def test_explain_says_what_is_left():
    _, model, x = pair()
    lowrank.convert(model, BOTH, ASI([2, 2, 2]))
    text = str(lowrank.explain(model, loss_of, x))
    assert "computed again from it" in text
    stock = str(lowrank.explain(Block().double(), loss_of, x))
    assert "convert makes it compute that again" in stock


PARTS = {
    "rows": lambda v: v[:, :, ::2],
    "images": lambda v: v[1:],
    "another shape": lambda v: v.view(3, 4, 2, -1),
    "turned": lambda v: v.transpose(2, 3),
    "all": lambda v: v,
}


class Part(nn.Module):
    """An activation in place of a part of what a normalisation keeps, whose result is not used."""

    def __init__(self, norm, activation):
        super().__init__()
        self.conv, self.norm, self.activation = nn.ConvTranspose2d(4, 8, 2), norm, activation

    def forward(self, x):
        y = self.conv(x)
        self.norm(y)
        return self.activation(self.take(y)) * 1.0


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(8, track_running_stats=False), nn.InstanceNorm2d(8, affine=True)], ids=str
)
@pytest.mark.parametrize("activation", [nn.SiLU(True), nn.Hardswish(True), nn.Mish(True), nn.ReLU(True)], ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_an_activation_in_place_of_a_part_of_what_is_kept(part, activation, norm):
    torch.manual_seed(0)
    own = {"take": lambda self, v: PARTS[part](v)}
    stock = type("Own", (Part,), own)(norm, activation).double()
    model = lowrank.convert(copy.deepcopy(stock), ["conv"], lowrank.Vanilla())
    gradients = []
    for network in (stock, model):
        x = random_tensor(3, 4, 5, 5).requires_grad_()
        network(x).square().sum().backward()
        gradients.append([x.grad, network.conv.weight.grad, network.conv.bias.grad])
    torch.testing.assert_close(gradients[1], gradients[0])
