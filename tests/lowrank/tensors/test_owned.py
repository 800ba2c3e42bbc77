"""A gradient that nobody else has is written to; one that somebody has, or may ask for, stays as it is."""

import pickle
import subprocess
import sys
from functools import partial
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from references import random_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank.exact import activations, curves
from lowrank.tensors.owned import counts_alone

pytestmark = pytest.mark.skipif(not counts_alone(), reason="this version of PyTorch does not count references")
SHAPE = 4, 6, 5, 8
CURVES = {
    "ReLU": (F.relu, activations.relu),
    "ReLU6": (F.relu6, activations.relu6),
    "LeakyReLU": (F.leaky_relu, activations.leaky_relu),
    "Hardsigmoid": (F.hardsigmoid, activations.hardsigmoid),
    "SiLU": (F.silu, curves.silu),
    "GELU": (F.gelu, curves.gelu),
    "GELU by tanh": (lambda x: F.gelu(x, approximate="tanh"), lambda x: curves.gelu(x, "tanh")),
    "Hardswish": (F.hardswish, curves.hardswish),
    "dropout": (lambda x: F.dropout(x, 0.3), lambda x: activations.dropout(x, 0.3)),
}


class Gives(torch.autograd.Function):
    """The identity, with a gradient that somebody made."""

    @staticmethod
    def forward(ctx, x, gradient):
        ctx.gradient = gradient
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.gradient(grad), None


class Keeps(Gives):
    """The identity, whose gradient is a tensor that it has saved."""

    @staticmethod
    def forward(ctx, x, kept):
        ctx.save_for_backward(kept)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0], None


# Who else has the gradient of y = curve(x): each returns what is to be as with the stock function.


def nobody(x, curve):
    y = curve(x)
    (y * y).sum().backward()
    return []


def who_called(x, curve):
    given = random_tensor(*SHAPE, seed=3).float()
    curve(x).backward(given)
    return [given]


def who_asked(x, curve):
    y = curve(x)
    return list(torch.autograd.grad((y * y).sum(), [y, x]))


def who_retains(x, curve):
    y = curve(x)
    y.retain_grad()
    (y * y).sum().backward()
    return [y.grad]


def _of_memory(storage):
    return torch.empty(0).set_(storage).view(SHAPE)


def hook(keep, shown=torch.as_tensor):
    def case(x, curve):
        kept = []
        y = curve(x)
        y.register_hook(lambda grad: kept.append(keep(grad)))
        (y * y).sum().backward()
        return [shown(one) for one in kept]

    return case


def hook_of_the_node(x, curve):
    kept = []
    y = curve(x)
    y.grad_fn.register_hook(lambda made, given: kept.extend([*made[:1], *given]))
    (y * y).sum().backward()
    return kept


def hook_ahead_of_the_node(x, curve):
    kept = []
    y = curve(x)
    y.grad_fn.register_prehook(lambda given: kept.extend(given))
    (y * y).sum().backward()
    return kept


def hook_of_a_module(x, curve):
    class Module(nn.Module):
        def forward(self, x):
            return curve(x)

    module, kept = Module(), []
    module.register_full_backward_hook(lambda _, made, given: kept.extend([one.clone() for one in (*made, *given)]))
    y = module(x * 1.0)
    (y * y).sum().backward()
    return kept


def another_branch(x, curve):
    a, kept = curve(x), []
    b = x * 2
    b.register_hook(lambda grad: kept.append(grad.clone()))
    c = a + b
    (c * c).sum().backward()
    return kept


def a_later_branch(x, curve):
    b, kept = torch.sin(x), []
    b.register_hook(lambda grad: kept.append(grad.clone()))
    c = curve(x) + b  # the activation's node runs ahead of the sine's
    (c * c).sum().backward()
    return kept


def parts_of_one(x, curve):
    whole = torch.cat([curve(x), curve(x + 1)])
    whole.retain_grad()
    (whole * whole).sum().backward()
    return [whole.grad]


def a_constant(x, curve):
    constant = random_tensor(*SHAPE, seed=4).float()
    Gives.apply(curve(x), lambda _: constant).sum().backward()
    return [constant]


def of_inference_mode(x, curve):
    def gradient(_):
        with torch.inference_mode():
            return random_tensor(*SHAPE, seed=4).float()

    Gives.apply(curve(x), gradient).sum().backward()
    return []


def all_of_one_number(x, curve):
    y = curve(x[:1, :1, :1, :1].expand(SHAPE))
    Gives.apply(
        y, lambda _: torch.empty(0).set_(torch.full((1,), 0.7).untyped_storage(), 0, SHAPE, (0, 0, 0, 0))
    ).sum().backward()
    return []


def numpy_memory(x, curve):
    array = np.asarray(random_tensor(*SHAPE, seed=4).float())
    memory = array.copy()
    Gives.apply(curve(x), lambda _: torch.from_numpy(memory)).sum().backward()
    return [torch.from_numpy(memory)]


def another_library(x, curve):
    memory = random_tensor(*SHAPE, seed=4).float().numpy().copy()
    Gives.apply(curve(x), lambda _: torch.from_dlpack(memory)).sum().backward()
    return [torch.from_numpy(memory)]


def what_is_saved(x, curve):
    kept = random_tensor(*SHAPE, seed=4).float()
    Keeps.apply(curve(x), kept).sum().backward()
    return [kept]


def the_same_twice(x, curve):
    y, given = curve(x), random_tensor(*SHAPE, seed=5).float()
    found = [torch.autograd.grad(y, x, given, retain_graph=True)[0] for _ in range(2)]
    z = (y * y).sum()
    return [given, *found, *(torch.autograd.grad(z, x, retain_graph=True)[0] for _ in range(2))]


def a_checkpoint(reentrant):
    def case(x, curve):
        y = checkpoint(lambda x: curve(x * 1.0), x, use_reentrant=reentrant)
        kept = []
        y.register_hook(lambda grad: kept.append(grad))
        (y * y).sum().backward()
        return kept

    return case


def second_derivatives(x, curve):
    y = curve(x)
    z = (y * y).sum()
    (first,) = torch.autograd.grad(z, x, create_graph=True)
    return [first.detach(), *torch.autograd.grad(first.pow(2).sum(), x)]


def a_batch_of_gradients(x, curve):
    y = curve(x)
    rows = torch.eye(3)
    return list(torch.autograd.grad((y * y).sum((1, 2, 3))[:3], x, rows, is_grads_batched=True))


def anomaly_mode(x, curve):
    with torch.autograd.detect_anomaly(check_nan=True):
        y = curve(x)
        return list(torch.autograd.grad((y * y).sum(), [x, y]))


CASES = {
    "nobody": nobody,
    "who called": who_called,
    "who asked": who_asked,
    "who retains": who_retains,
    "a hook": hook(lambda grad: grad),
    "a hook, without its graph": hook(lambda grad: grad.detach()),
    "a hook, a part": hook(lambda grad: grad[1:2]),
    "a hook, as NumPy": hook(lambda grad: grad.numpy()),
    "a hook, within a list": hook(lambda grad: [grad][0]),
    "a hook, its memory": hook(lambda grad: _of_memory(grad.untyped_storage())),
    "a hook, the object of its memory": hook(lambda grad: grad.untyped_storage(), _of_memory),
    "a hook, its memory of a type": hook(lambda grad: grad.storage(), lambda memory: _of_memory(memory.untyped())),
    "a hook, for another process": hook(ForkingPickler.dumps, pickle.loads),
    "a hook of the node": hook_of_the_node,
    "a hook ahead of the node": hook_ahead_of_the_node,
    "a hook of a module": hook_of_a_module,
    "another branch": another_branch,
    "a later branch": a_later_branch,
    "parts of one": parts_of_one,
    "a constant": a_constant,
    "inference mode": of_inference_mode,
    "all of one number": all_of_one_number,
    "NumPy": numpy_memory,
    "another library": another_library,
    "what is saved": what_is_saved,
    "the same twice": the_same_twice,
    "a checkpoint": a_checkpoint(False),
    "a reentrant checkpoint": a_checkpoint(True),
    "second derivatives": second_derivatives,
    "a batch of gradients": a_batch_of_gradients,
    "anomaly mode": anomaly_mode,
}


@pytest.mark.filterwarnings(
    "ignore:Anomaly Detection", "ignore:.*__array__", "ignore:The given NumPy array", "ignore:TypedStorage"
)
@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("case", CASES)
def test_what_somebody_else_has_is_as_with_the_stock_function(case, name):
    if (case, name) == ("second derivatives", "Hardsigmoid"):
        pytest.skip("PyTorch has none")
    stock, own = CURVES[name]
    found = []
    for curve in (stock, own):
        torch.manual_seed(1)
        leaf = (2 * random_tensor(*SHAPE)).float().requires_grad_()
        x = leaf * 1.5
        kept = CASES[case](x if x.requires_grad else leaf, curve)
        found.append([*kept, *([] if leaf.grad is None else [leaf.grad])])
    wanted, other = found
    assert len(other) == len(wanted)
    for one, another in zip(other, wanted, strict=True):
        assert torch.equal(one, another)


@pytest.mark.cpu_only("elsewhere gradients are not written to")
@pytest.mark.parametrize("name", CURVES)
def test_what_nobody_else_has_is_written_to(name):
    x = random_tensor(*SHAPE).float().requires_grad_() * 1.0
    places = []
    x.register_hook(lambda grad: places.append(grad.data_ptr()))
    y = CURVES[name][1](x)
    y.register_hook(lambda grad: places.append(grad.data_ptr()))
    (y * y).sum().backward()
    assert places[0] == places[1]


def test_the_first_count_may_be_within_a_backward_pass():
    """Where hooks take what autograd saves, which it is not to disturb."""
    code = """
import torch
from lowrank.exact import activations
from lowrank.tensors import owned
x = torch.randn(3, 4, requires_grad=True) * 1.0
saved = []
with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
    y = activations.relu(x)
    z = y.exp().sum()
    before = len(saved)
    x.register_hook(lambda grad: saved.append(grad.data_ptr()))
    y.register_hook(lambda grad: saved.append(grad.data_ptr()))
    assert not owned.counts_alone.cache_info().currsize
    z.backward()
assert owned.counts_alone.cache_info().currsize
assert len(saved) == before + 2 and saved[-1] == saved[-2]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", CURVES)
def test_a_gradient_may_stand_for_several(name):
    """To the last bit what the stock function gives for one after the other; its rule for a batch rounds GELU's
    otherwise."""
    given, gradients = random_tensor(3, *SHAPE, seed=6).float(), []
    for curve in CURVES[name]:
        torch.manual_seed(1)
        x = (2 * random_tensor(*SHAPE)).float().requires_grad_()
        gradients.append(partial(torch.autograd.grad, curve(x * 1.0), x, retain_graph=True))
    stock, own = gradients
    found = torch.func.vmap(lambda one: own(grad_outputs=one * 2)[0])(given)
    assert torch.equal(found, torch.stack([stock(grad_outputs=one * 2)[0] for one in given]))
