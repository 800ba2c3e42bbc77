"""Activations, pooling and dropout called as functions: as lean as modules, and right however called."""

import copy

import pytest
import torch
import torch.nn.functional as F
from block_cases import assert_equal, results
from networks import frozen_statistics, with_statistics
from references import random_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lowrank
from lowrank import ASI, HOSVD, Vanilla
from lowrank.exact.expressions import EXPRESSIONS
from lowrank.exact.functions import LEAN_FUNCTIONS, MATRIX_PRODUCTS
from lowrank.meters.memory import held_bytes


class AsModules(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.pool, self.last, self.leaky = nn.MaxPool2d(2), nn.Conv2d(4, 5, 1), nn.LeakyReLU(0.1)
        self.average, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(20, 3)

    def forward(self, x):
        x = self.pool(self.act(self.norm(self.conv(x))))
        return self.head(self.average(self.leaky(self.last(x))).flatten(1))


class AsFunctions(AsModules):
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        x = F.adaptive_avg_pool2d(F.leaky_relu(self.last(x), 0.1), 2)
        return self.head(x.flatten(1))


class AsMethods(AsModules):
    def forward(self, x):
        x = F.max_pool2d(input=self.norm(self.conv(x)).relu(), kernel_size=2)
        x = F.adaptive_avg_pool2d(F.leaky_relu(self.last(x), negative_slope=0.1), output_size=2)
        return self.head(torch.flatten(x, 1))


class InPlace(AsModules):
    def forward(self, x):
        x = F.max_pool2d(torch.relu_(self.norm(self.conv(x))), 2)
        x = F.adaptive_avg_pool2d(F.leaky_relu(self.last(x), 0.1, inplace=True), 2)
        return self.head(x.flatten(1))


class ThroughHelpers(AsModules):
    """The functions are called somewhere else: in a child without layers, in a nested function."""

    def __init__(self):
        super().__init__()
        self.helper = Helper()

    def forward(self, x):
        x = self.helper(self.norm(self.conv(x)))
        return self.head((lambda y: F.adaptive_avg_pool2d(F.leaky_relu(y, 0.1), 2))(self.last(x)).flatten(1))


class Helper(nn.Module):
    def forward(self, x):
        return F.max_pool2d(F.relu(x), 2)


KINDS = [AsFunctions, AsMethods, InPlace, ThroughHelpers]
CONVS = ["conv", "last"]


def build(kind, dtype=torch.float64):
    torch.manual_seed(0)
    return frozen_statistics(with_statistics(kind())).to(dtype)


def images():
    return random_tensor(3, 3, 10, 9)


def kept_bytes(model):
    return lowrank.saved_bytes(model, lambda m, x: m(x * 1).sum(), images().requires_grad_())


@pytest.mark.parametrize("method", [Vanilla(), ASI(2)], ids=lambda method: method.tag)
@pytest.mark.parametrize("kind", KINDS)
def test_as_much_is_kept_as_with_modules(kind, method):
    modules = lowrank.convert(build(AsModules), CONVS, method)
    model = build(kind)
    before = kept_bytes(model)
    lowrank.convert(model, CONVS, method)
    assert kept_bytes(model) == kept_bytes(modules) < before


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_every_gradient_are_the_stock_ones(kind):
    stock = build(kind)
    model, x = lowrank.convert(copy.deepcopy(stock), CONVS, HOSVD(1.0)), images()
    for mode in (frozen_statistics, nn.Module.train, nn.Module.eval):
        mode(stock), mode(model)
        assert_equal(results(model, x), results(stock, x))
        with torch.no_grad():
            torch.testing.assert_close(model(x), stock(x))


SUMS = {
    "+": lambda y, x: y + x,
    "the other way round": lambda y, x: x + y,
    "+=": lambda y, x: y.__iadd__(x),
    "torch.add": torch.add,
    "add": lambda y, x: y.add(x),
    "add_": lambda y, x: y.add_(x),
}


@pytest.mark.parametrize("way", SUMS)
def test_behind_a_sum_functions_are_as_lean(way):
    """As at the end of a residual block."""

    class Residual(nn.Module):
        def __init__(self, functional):
            super().__init__()
            self.stem, self.functional, self.act = nn.Conv2d(3, 3, 1), functional, nn.ReLU()
            self.conv, self.norm, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x = self.stem(x)
            y = SUMS[way](self.norm(self.conv(x)), x)
            return self.last(F.relu(y) if self.functional else self.act(y))

    stocks = [build(lambda f=functional: Residual(f)) for functional in (True, False)]
    models = [lowrank.convert(copy.deepcopy(stock), ["stem", "conv", "last"], ASI(1)) for stock in stocks]
    assert kept_bytes(models[0]) == kept_bytes(models[1]) < kept_bytes(stocks[0])
    model = lowrank.convert(copy.deepcopy(stocks[0]), ["stem", "conv", "last"], HOSVD(1.0))
    assert_equal(results(model, images()), results(stocks[0], images()))


@pytest.mark.parametrize("look", [lambda y: y.detach().mean(), lambda y: y.data.mean(), lambda y: y.mean().item()])
def test_a_look_at_an_inner_tensor_costs_no_memory(look):
    """As for a log: of the detached, of the data, of a number."""

    class Logging(AsFunctions):
        def forward(self, x):
            y = self.norm(self.conv(x))
            self.seen = [look(y)]
            x = self.last(F.max_pool2d(F.relu(y), 2))
            self.seen.append(look(x))
            return self.head(F.adaptive_avg_pool2d(F.leaky_relu(x, 0.1), 2).flatten(1))

    quiet = lowrank.convert(build(AsFunctions), CONVS, Vanilla())
    assert kept_bytes(lowrank.convert(build(Logging), CONVS, Vanilla())) == kept_bytes(quiet)


CALLS = {
    F.relu: [{}, {"inplace": True}],
    torch.relu: [{}],
    torch.Tensor.relu: [{}],
    F.relu_: [{}],
    torch.relu_: [{}],
    torch.Tensor.relu_: [{}],
    F.relu6: [{}, {"inplace": True}],
    F.hardtanh: [{}, {"min_val": -0.3, "max_val": 0.6}, {"inplace": True}],
    F.hardsigmoid: [{}, {"inplace": True}],
    F.leaky_relu: [{}, {"negative_slope": 0.3}, {"inplace": True}],
    F.dropout: [{}, {"p": 0.2}, {"p": 0.2, "training": False}, {"inplace": True}],
    F.max_pool2d: [{"kernel_size": 2}, {"kernel_size": (2, 3), "stride": 1, "padding": 1, "ceil_mode": True}],
    F.avg_pool2d: [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}],
    F.adaptive_avg_pool2d: [{"output_size": 1}, {"output_size": (2, None)}],
    F.gelu: [{}, {"approximate": "tanh"}],
    F.silu: [{}, {"inplace": True}],
    F.layer_norm: [{"normalized_shape": (7,)}, {"normalized_shape": (8, 7), "eps": 0.1}],
    F.rms_norm: [{"normalized_shape": (7,)}, {"normalized_shape": (8, 7), "eps": 0.1}],
    F.group_norm: [{"num_groups": 2}, {"num_groups": 4, "eps": 0.1}],
    F.instance_norm: [{}, {"eps": 0.1}],
    F.hardswish: [{}, {"inplace": True}],
    F.mish: [{}, {"inplace": True}],
    F.softplus: [{}, {"beta": 2, "threshold": 1}],
    **{f: [{"dim": 1}, {"dim": -1, "dtype": torch.float64}] for f in (F.softmax, torch.softmax, torch.Tensor.softmax)},
    F.normalize: [{}, {"dim": -1, "p": 1.0}],
    **{function: [{}] for function in (torch.sigmoid, torch.Tensor.sigmoid, torch.tanh, torch.Tensor.tanh)},
    **{function: [{"exponent": 3}, {"exponent": 2.0}] for function in (torch.pow, torch.Tensor.pow)},
    torch.Tensor.__pow__: [{"exponent": 2.0}],
}


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_every_function_in_every_way_to_call_it(function):
    """On the output of a convolution, by position and by name, with an outcome that is in turn used twice."""

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.options = nn.Conv2d(3, 4, 3, padding=1), {}

        def forward(self, x):
            y = self.conv(x)
            F.relu(y.detach())  # so that the code is seen to call functions
            z = function(y, **self.options)
            return torch.cat([z.flatten(1), (z * z).flatten(1)], 1)

    for options in CALLS[function]:
        torch.manual_seed(0)
        stock = Caller().double()
        stock.options = options
        model, x = lowrank.convert(copy.deepcopy(stock), ["conv"], Vanilla()), random_tensor(2, 3, 8, 7)
        assert_equal(results(model, x), results(stock, x))


def test_every_lean_function_is_tried_here():
    elsewhere = {F.batch_norm, torch.batch_norm, F.scaled_dot_product_attention, torch.addcmul, *MATRIX_PRODUCTS}
    assert set(LEAN_FUNCTIONS) - set(CALLS) <= elsewhere | set(EXPRESSIONS)


# Checkpoints within a model, each of which runs code of the model again


class Checkpointed(nn.Module):
    """As `way` says, a block of functions is run again in the backward pass."""

    def __init__(self, way):
        super().__init__()
        self.stem, self.block, self.tail, self.way = nn.Conv2d(3, 3, 1), AsFunctions(), nn.Linear(3, 3), way

    def forward(self, x):
        return self.tail(F.relu(self.way(self.block, self.stem(x))))


def piece_by_piece(block, x, **options):
    y = checkpoint(lambda x: F.relu(block.norm(block.conv(x))), x, **options)
    y = checkpoint(F.max_pool2d, y, 2, **options)
    y = checkpoint(lambda y: F.leaky_relu(block.last(y), 0.1), y, **options)
    return block.head(checkpoint(F.adaptive_avg_pool2d, y, 2, **options).flatten(1))


def apart(block, x, **options):
    """A lazy output goes in and out of checkpoints."""
    y = checkpoint(block.norm, checkpoint(block.conv, x, **options), **options)
    return block.head(
        F.adaptive_avg_pool2d(checkpoint(block.last, checkpoint(F.relu, y, **options), **options), 2).flatten(1)
    )


WAYS = {
    "the block": lambda block, x, **options: checkpoint(block, x, **options),
    "piece by piece": piece_by_piece,
    "convolution and norm apart": apart,
    "one within another": lambda block, x, **options: checkpoint(
        lambda x: checkpoint(block, x * 1, **options) * 2, x, **options
    ),
    "a part of it twice": lambda block, x, **options: checkpoint(block, x, **options) + checkpoint(block, x, **options),
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("names", [["stem"], ["stem", "block.conv", "block.last"]], ids=["outside", "all"])
@pytest.mark.parametrize("method", [Vanilla(), HOSVD(1.0), ASI(999)], ids=lambda method: method.tag)
@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_inside_the_model(way, method, names, reentrant):
    stock = build(lambda: Checkpointed(lambda block, x: WAYS[way](block, x, use_reentrant=reentrant)))
    model, x = lowrank.convert(copy.deepcopy(stock), names, method), images()
    assert_equal(results(model, x), results(stock, x))
    for network in (stock, model):  # and from the output itself, as where the loss is computed elsewhere
        network.zero_grad()
        y = network(x.clone().requires_grad_() * 1)
        y.backward(random_tensor(*y.shape, seed=4))
    for (name, found), (_, expected) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("by", ["backward", "torch.autograd.backward", "torch.autograd.grad"])
def test_a_backward_pass_from_an_unread_output_runs_functions_again_as_the_forward_pass_did(by, reentrant):
    """The network ends in a convolution that a normalisation could follow."""

    class Ending(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            inner = lambda x: F.max_pool2d(F.relu(self.norm(self.block(x))), 2)  # noqa: E731
            return self.last(checkpoint(inner, self.stem(x), use_reentrant=reentrant))

    stock = build(Ending)
    model, gradients = lowrank.convert(copy.deepcopy(stock), ["stem", "block", "last"], HOSVD(1.0)), []
    for network in (stock, model):
        y = network(images())
        grad = random_tensor(*y.shape, seed=3)
        if by == "torch.autograd.grad" and not reentrant:
            gradients.append(torch.autograd.grad(y, list(network.parameters()), grad))
            continue
        y.backward(grad) if by == "backward" else torch.autograd.backward([y], [grad])
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_block_holds_its_input_alone(reentrant):
    way = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)  # noqa: E731
    stock = build(lambda: Checkpointed(way))
    model = lowrank.convert(copy.deepcopy(stock), ["stem", "block.conv"], Vanilla())
    held, stock_held = (held_bytes(m, lambda m, x: m(x * 1).sum(), images().requires_grad_()) for m in (model, stock))
    assert held <= stock_held + 2 * 3 * 3 * 8  # bits, and a mask of the last activation


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_sequential(reentrant):
    layers = [m for _ in range(3) for m in (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())]
    stock = frozen_statistics(with_statistics(nn.Sequential(*layers))).double()
    model, x = lowrank.convert(copy.deepcopy(stock), ["0", "3"], HOSVD(1.0)), random_tensor(2, 3, 8, 7)
    gradients = []
    for network in (stock, model):
        leaf = x.clone().requires_grad_()
        checkpoint_sequential(network, 2, leaf * 1, use_reentrant=reentrant).square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in network.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", [Vanilla(), HOSVD(1.0)], ids=lambda method: method.tag)
@pytest.mark.parametrize("family", ["Bert", "Llama", "ViT"])
def test_checkpointing_of_hugging_face(family, method, reentrant):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": 40, **small}
    config = {
        "Bert": lambda: transformers.BertConfig(**words, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        "Llama": lambda: transformers.LlamaConfig(num_key_value_heads=2, **words),
        "ViT": lambda: transformers.ViTConfig(image_size=8, patch_size=4, **small, hidden_dropout_prob=0.0),
    }[family]()
    torch.manual_seed(0)
    stock = getattr(transformers, f"{family}Model")(config).double().train()
    model = copy.deepcopy(stock)
    names = lowrank.trailing_layers(model, "all", "linear")
    lowrank.convert(model, names, method)
    given = (random_tensor(2, 3, 8, 8),) if family == "ViT" else (torch.randint(3, 40, (2, 6)),)
    stock(*given)[0].square().mean().backward()
    for network in (stock, model):
        network.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant and hasattr(model, "enable_input_require_grads") and family != "ViT":
        model.enable_input_require_grads()
    model(*given)[0].square().mean().backward()
    for (name, found), (_, expected) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        if reentrant and found.grad is None:
            continue  # a reentrant checkpoint trains nothing where its input wants no gradient
        torch.testing.assert_close(found.grad, expected.grad, msg=lambda m, n=name: f"{n}: {m}")


# What else an output of this kind meets


def test_the_models_class_is_its_own():
    model = build(AsFunctions)
    kind, attributes = type(model), dict(vars(type(model)))
    lowrank.convert(model, CONVS, ASI(2))
    model(images())
    assert type(model) is kind
    assert dict(vars(kind)) == attributes


def test_other_models_and_other_code_are_not_touched():
    model = lowrank.convert(build(AsFunctions), CONVS, Vanilla())
    y = model(images())
    saved = []
    x = images().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        F.relu(x * 1)
    assert saved == [torch.float64], "PyTorch's own, which keeps its output"
    assert y.requires_grad


def test_an_output_is_saved_and_copied_as_an_ordinary_tensor(tmp_path):
    model = lowrank.convert(build(AsFunctions), CONVS, Vanilla())
    y = model.last(F.relu(model.norm(model.conv(images()))))
    torch.save(y.detach(), tmp_path / "y")
    assert type(torch.load(tmp_path / "y", weights_only=True)) is torch.Tensor
    assert type(copy.deepcopy(y.detach())) is torch.Tensor
    torch.testing.assert_close(torch.load(tmp_path / "y"), y.detach())
    assert y.detach().numpy(force=True).shape == y.shape


def test_a_random_function_draws_what_it_draws_in_the_stock_model():
    class Dropping(AsModules):
        def forward(self, x):
            x = F.dropout(F.relu(self.conv(x)), 0.3, self.training)
            return self.head(F.adaptive_avg_pool2d(F.dropout(self.last(x), 0.5, True), 2).flatten(1))

    stock = build(Dropping)
    model, x = lowrank.convert(copy.deepcopy(stock), CONVS, HOSVD(1.0)), images()
    for layout in (torch.contiguous_format, torch.channels_last):
        assert_equal(
            results(model, x.contiguous(memory_format=layout)), results(stock, x.contiguous(memory_format=layout))
        )
