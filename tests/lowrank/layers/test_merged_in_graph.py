"""A convolution and the normalisation behind it in one compiled graph: what is kept, and what stands between them."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from references import random_tensor
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import ASI, GradientFilter, Vanilla

pytestmark = pytest.mark.slow


class Block(nn.Module):
    """A convolution and a normalisation by running statistics, and something in between."""

    def __init__(self, between=None, behind=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.between, self.behind = between, behind
        for seed, tensor in enumerate((self.norm.weight, self.norm.bias, self.norm.running_mean)):
            tensor.data.copy_(random_tensor(4, seed=seed))
        self.norm.weight.data[0] = 0  # a scale of zero, of which no gradient may be divided
        self.norm.running_var.copy_(random_tensor(4, seed=4).abs() + 0.5)

    def forward(self, x):
        x = x * 1
        y = self.conv(x)
        if self.between is not None:
            y = self.between(self, x, y)
        z = self.norm(y)
        return z if self.behind is None else z + self.behind(self, x, y)


def _no_grad_change(block, x, y):
    with torch.no_grad():
        y.mul_(2)
    return y


def _hook(block, x, y):
    y.register_hook(lambda grad: grad * 3)
    return y


def _ahead_of_hook(block, x, y):
    y.requires_grad_()
    y.register_hook(lambda grad: grad * 3)
    return y


def _first(block, x, y):
    y[:, 0] = 1
    return y


def _of_a_list(block, x, y):
    for one in [y]:
        one.mul_(2)
    return y


def _foreach(block, x, y):
    torch._foreach_mul_([y], 2)
    return y


def _attribute(block, x, y):
    y.mT.mul_(2)
    return y


def _beside(block, x, y):
    x.mul_(2)
    return y


def _bias(block, x, y):
    with torch.no_grad():
        block.conv.bias.mul_(2)
    return y


def _norm(block, x, y):
    with torch.no_grad():
        block.norm.running_mean.add_(1)
        block.norm.weight.mul_(2)
    return y


def _weight(block, x, y):
    return y * block.conv.weight.sum()


BETWEEN = {
    "nothing": None,
    "mul_": lambda block, x, y: y.mul_(2),
    "a view": lambda block, x, y: y.view(-1).mul_(2).view(y.shape),
    "a view by attribute": _attribute,
    "detach": lambda block, x, y: y.detach().mul_(2) + y,
    "part": _first,
    "relu_": lambda block, x, y: torch.relu_(y),
    "functional": lambda block, x, y: F.relu(y, inplace=True),
    "no_grad": _no_grad_change,
    "hook": _hook,
    "requires_grad_": _ahead_of_hook,
    "list": _of_a_list,
    "foreach": _foreach,
    "copy_": lambda block, x, y: y.copy_(y * 2),
    "another tensor": lambda block, x, y: y + 1,
    "operator": lambda block, x, y: torch.ops.aten.mul_.Scalar(y, 2),
    "its weight": _weight,
    "bias changed": _bias,
    "scale and mean changed": _norm,
    "asked": lambda block, x, y: y if y.requires_grad and y.dtype == torch.float64 and y.shape[1] == 4 else y + 1,
}


def _late_hook(block, x, y):
    y.register_hook(lambda grad: grad * 3)
    return 0


def _late_hook_in_a_checkpoint(block, x, y):
    def hooked(y):
        y.register_hook(lambda grad: grad * 3)
        return y * 1

    return checkpoint(hooked, y, use_reentrant=False)


BEHIND = {
    "a hook": _late_hook,
    "a hook in a checkpoint": _late_hook_in_a_checkpoint,
    "the output as well": lambda block, x, y: y.sin(),
    "once more": lambda block, x, y: block.norm(y).exp(),
    "a checkpoint": lambda block, x, y: checkpoint(block.norm, y, use_reentrant=False),
    "a checkpoint that changes it": lambda block, x, y: checkpoint(
        lambda y: block.norm(y.mul(2)), y, use_reentrant=False
    ),
}


def _gradients(model, forward, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = forward(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


def _assert_trains_as_stock(block, method, x, **options):
    """Two steps: what stands in the way of a compiler breaks its graph, and changes nothing."""
    torch._dynamo.reset()
    block = block.double().eval()
    model = lowrank.convert(copy.deepcopy(block), ["conv"], method)
    fast = torch.compile(model, backend="aot_eager", **options)
    for _ in range(2):
        torch.testing.assert_close(_gradients(model, fast, x), _gradients(block, block, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_whatever_is_done_between_the_two_gradients_are_stocks(between):
    _assert_trains_as_stock(Block(between), Vanilla(), random_tensor(2, 3, 6, 6))


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND)
def test_whatever_else_reads_the_output_gradients_are_stocks(behind):
    _assert_trains_as_stock(Block(behind=behind), Vanilla(), random_tensor(2, 3, 6, 6))


def test_a_break_of_the_graph_between_the_two():
    def cut(block, x, y):
        torch._dynamo.graph_break()
        return y.mul_(2)

    _assert_trains_as_stock(Block(cut), Vanilla(), random_tensor(2, 3, 6, 6))


def test_the_gradient_of_an_output_that_is_handed_out():
    class Both(Block):
        def forward(self, x):
            y = self.conv(x)
            return y, self.norm(y)

    torch._dynamo.reset()
    block, x = Both().double().eval(), random_tensor(2, 3, 6, 6)
    model = torch.compile(lowrank.convert(copy.deepcopy(block), ["conv"], Vanilla()), backend="eager")
    found, expected = (torch.autograd.grad(z.square().sum(), y)[0] for y, z in (model(x), block(x)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 3])
def test_on_a_small_image_it_is_one_graph_too(groups):
    block = Block()
    block.conv = nn.Conv2d(3, 3, 5, padding=2, groups=groups)
    block.norm = nn.BatchNorm2d(3)
    _assert_trains_as_stock(block, Vanilla(), random_tensor(2, 3, 4, 4), fullgraph=True)


@pytest.mark.parametrize("ranks", [None, 99])
def test_with_whole_ranks_a_low_rank_method_is_exact_too(ranks):
    _assert_trains_as_stock(Block(), Vanilla() if ranks is None else ASI(ranks), random_tensor(2, 3, 6, 6))


@pytest.mark.parametrize("frozen", [None, ("norm.weight",), ("norm.bias",), ("conv.weight",), ("conv.bias",)])
def test_any_parameter_may_be_frozen_or_missing(frozen):
    block = Block()
    if frozen is None:
        block.conv.bias = None
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name not in (frozen or ()))
    _assert_trains_as_stock(block, Vanilla(), random_tensor(2, 3, 6, 6), fullgraph=True)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_a_normalisation_without_scale_or_statistics(options):
    block = Block()
    block.norm = nn.BatchNorm2d(4, **options)
    _assert_trains_as_stock(block, Vanilla(), random_tensor(2, 3, 6, 6), fullgraph=True)


# What stock refuses, since it keeps what is changed there; and what has the same gradients.
LOSSY = {
    "nothing": Block(),
    "its input changed": Block(_beside),  # after which the two are apart, as in eager training
    "its input changed behind": Block(behind=lambda block, x, y: x.mul_(3).mean(1, keepdim=True)),
    "its output changed behind": Block(behind=lambda block, x, y: y.mul_(2)),
}


FEW = ASI([2, 2, 3, 3])
CASES = [(name, FEW, None) for name in LOSSY] + [("nothing", FEW, torch.bfloat16)]
CASES += [("nothing", method, None) for method in (GradientFilter(2), ASI([2, 2, 3, 3], storage="int8"))]


@pytest.mark.parametrize(("block", "method", "dtype"), CASES, ids=str)
def test_lossy_methods_give_eager_trainings_gradients(block, method, dtype):
    torch._dynamo.reset()
    model = lowrank.convert(copy.deepcopy(LOSSY[block]).eval(), ["conv"], method, recompute=False)
    twin, x = copy.deepcopy(model), random_tensor(4, 3, 8, 8, dtype=torch.float32)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype is None else {"rtol": 0.05, "atol": 0.5}
    for _ in range(3):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            torch.testing.assert_close(_gradients(model, fast, x), _gradients(twin, twin, x), **near)


def _network(*blocks):
    layers = []
    for inputs, outputs, groups in blocks:
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU6(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(blocks[-1][1], 3)).eval()


def _classified(model, batch):
    return F.cross_entropy(model(batch), torch.arange(4) % 3)


def _compiled_bytes(method, network):
    torch._dynamo.reset()
    model = lowrank.convert(copy.deepcopy(network), ["0", "3", "6"], method) if method else copy.deepcopy(network)
    batch = random_tensor(4, 4, 32, 32, dtype=torch.float32)
    fast = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    _classified(fast, batch).backward()
    return lowrank.saved_bytes(fast, _classified, batch), lowrank.saved_bytes(model, _classified, batch)


def test_a_compiled_model_keeps_as_little_as_eager_training():
    """No output of a convolution, and of an activation bits."""
    network = _network((4, 16, 1), (16, 16, 16), (16, 32, 1))
    stock, _ = _compiled_bytes(None, network)
    compiled, eager = _compiled_bytes(ASI([2, 2, 2, 2]), network)
    outputs = 4 * 32 * 32 * (16 + 16 + 32)
    inputs = 4 * 32 * 32 * (4 + 16 + 16) * 4
    assert stock > inputs + 4 * outputs
    assert compiled < 1.1 * eager
    assert compiled < 2 * outputs / 8
    exact, _ = _compiled_bytes(Vanilla(), network)
    assert inputs < exact < inputs + 2 * outputs / 8 < stock / 2


def test_an_output_that_is_handed_out_is_what_stock_hands_out():
    """Nothing of it is of a class of its own, and it holds nothing that a normalisation would need."""
    torch._dynamo.reset()
    block = Block(behind=None).double().eval()
    model = lowrank.convert(copy.deepcopy(block), ["conv"], Vanilla())
    y = torch.compile(model.conv, backend="aot_eager")(random_tensor(2, 3, 6, 6))
    torch.testing.assert_close(y, block.conv(random_tensor(2, 3, 6, 6)), rtol=1e-9, atol=1e-9)
    assert type(y) is torch.Tensor
    assert not vars(y)
    pickle.dumps(y.detach())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_convolution_and_its_normalisation_within_a_checkpoint(reentrant):
    class Checked(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=reentrant)

    torch._dynamo.reset()
    block = Checked().double().eval()
    model, x = lowrank.convert(copy.deepcopy(block), ["block.conv"], Vanilla()), random_tensor(2, 3, 6, 6)
    fast = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(_gradients(model, fast, x), _gradients(block, block, x), rtol=1e-9, atol=1e-9)


def _loss(one, parameters, x):
    return functional_call(one, parameters, (x,)).square().sum()


def _penalty(one, parameters, x):
    return grad(partial(_loss, one), 1)(parameters, x).square().sum()


TRANSFORMS = {
    "gradient": lambda one, parameters, x: grad(partial(_loss, one))(parameters, x),
    "penalty": lambda one, parameters, x: grad(partial(_penalty, one))(parameters, x),
    "per sample": lambda one, parameters, x: vmap(grad(partial(_loss, one)), (None, 0))(parameters, x[:, None]),
    "map": lambda one, parameters, x: vmap(partial(_loss, one), (None, 0))(parameters, x[:, None]),
    "jacobian": lambda one, parameters, x: jacrev(lambda x: functional_call(one, parameters, (x,)))(x),
}


@pytest.mark.slow
@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("method", [Vanilla(), ASI(1)], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_under_a_transform_in_a_graph_layers_are_the_stock_ones(transform, method, detached):
    torch._dynamo.reset()
    block = nn.Sequential(Block(), nn.ReLU()).double().eval()
    model, x = lowrank.convert(copy.deepcopy(block), ["0.conv"], method), random_tensor(2, 3, 4, 4)
    found = []
    for one in (model, block):
        parameters = {name: weight.detach() if detached else weight for name, weight in one.named_parameters()}
        run = partial(TRANSFORMS[transform], one)
        run = torch.compile(run, backend="aot_eager", fullgraph=True) if one is model else run
        found.append(run(parameters, x))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
