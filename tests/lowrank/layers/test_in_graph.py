"""A method's work as operators of a compiled graph: PyTorch's own checks of operators, and methods of others."""

import copy
import gc
import subprocess
import sys
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from layer_cases import step
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, FixedBases, GradientFilter, Rounded, Vanilla
from lowrank.errors import LowRankError
from lowrank.layers import in_graph
from lowrank.layers.factored_function import _in_graph as factor_gradients
from lowrank.methods.base import Method
from lowrank.tensors.geometry import ConvGeometry, LinearGeometry

CONV = ConvGeometry.of(nn.Conv2d(3, 4, 3, padding=1))
METHODS = [
    ASI(2),
    ASI([4, 3, 2, 2]),  # modes that are kept whole
    ASI(99),  # the input itself
    ASI(2, storage="int8"),
    ASI(2, storage="bfloat16", refresh=2),
    ASI(2, refresh="energy"),
    ASI(2, warm_start=False, algorithm="published"),
    GradientFilter(2),
    FixedBases(2),
    Rounded(),
    Vanilla(),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_they_are_operators_as_pytorch_wants_them(method):
    """Nothing that is given is changed or returned, and the sizes that are told ahead are those that come."""
    part, x = in_graph.part(method, CONV, "conv"), random_tensor(4, 3, 6, 6, dtype=torch.float32)
    state = ()
    for _ in range(3):
        checked = torch.library.opcheck(in_graph._compressed, (x, list(state), part))
        assert set(checked.values()) == {"SUCCESS"}
        kept, state = in_graph.compress(method, CONV, "conv", x, state)
    assert all(one is not x for one in state)
    for bias in (True, False):
        given = (list(kept), random_tensor(4, 4, 6, 6, dtype=torch.float32), [4, 3, 6, 6], [4, 3, 3, 3], part, bias)
        assert set(torch.library.opcheck(in_graph._gradients, given).values()) == {"SUCCESS"}


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_they_give_what_the_method_gives(method):
    x = random_tensor(4, 3, 6, 6, dtype=torch.float32)
    grad, own, found = random_tensor(4, 4, 6, 6, dtype=torch.float32), (), ()
    for _ in range(3):
        kept, own = method.compress(x, CONV, own, "conv")
        same, found = in_graph.compress(method, CONV, "conv", x, found)
        torch.testing.assert_close([*same, *found], [*kept, *own], rtol=0, atol=0)
        assert [one is x for one in same] == [one is x for one in kept]
    expected = method.gradients(kept, grad, CONV, (4, 3, 6, 6))
    torch.testing.assert_close(
        in_graph.gradients(method, CONV, "conv", same, grad, (4, 3, 6, 6), (4, 3, 3, 3), True), expected, rtol=0, atol=0
    )


def test_gradients_of_two_factors_are_one_too():
    x = random_tensor(4, 5, 6, dtype=torch.float32)
    kept, _ = in_graph.compress(ASI(2), LinearGeometry(), "linear", x, ())
    grad, left, right = random_tensor(4, 5, 7).float(), random_tensor(7, 3).float(), random_tensor(3, 6).float()
    for through in (None, grad @ left):
        given = (list(kept), grad, left, right, through, False)
        assert set(torch.library.opcheck(factor_gradients, given).values()) == {"SUCCESS"}


def test_parts_that_differ_in_anything_have_names_of_their_own():
    parts = [(ASI(2), CONV, "a"), (ASI(3), CONV, "a"), (ASI(2), CONV, "b"), (ASI(2), LinearGeometry(), "a")]
    parts += [(Held(2, torch.zeros(2)), CONV, "a") for _ in range(2)]  # look alike, and may change
    names = [in_graph.part(*one) for one in parts]
    assert len({*names}) == len(parts)
    assert [in_graph.part(*one) for one in parts] == names
    assert in_graph.part(ASI(2), CONV, "a") == names[0]


def test_parts_are_let_go_with_the_last_method_that_is_equal():
    one, other, own = ASI(2, seed=5), ASI(2, seed=5), Held(3, torch.zeros(2))
    shared, alone = in_graph.part(one, CONV, "let go"), in_graph.part(own, CONV, "let go")
    assert in_graph.part(other, CONV, "let go") == shared
    gone = weakref.ref(own)
    del one, own
    in_graph.part(other, CONV, "another")
    assert (gone(), alone in in_graph._PARTS) == (None, False)
    alike = Held(3, torch.zeros(2))
    assert in_graph.part(alike, CONV, "let go") != alone  # a backward pass may still ask for it
    assert in_graph._PARTS[shared].method is other
    del other
    in_graph.part(ASI(3), CONV, "another")
    assert shared not in in_graph._PARTS


def trained(method, names="02", frozen=""):
    """A small network that is compiled, and its input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    lowrank.convert(model, list(names), method)
    for name in frozen:
        model[int(name)].weight.requires_grad_(False)
    return model, random_tensor(2, 3, 8, 8, dtype=torch.float32).requires_grad_()


@pytest.mark.slow
def test_a_graph_is_trained_whatever_model_is_gone():
    first, x = trained(ASI(2, seed=6))
    loss = torch.compile(first, backend="aot_eager")(x).square().sum()
    expected = torch.autograd.grad(loss, x, retain_graph=True)
    second, _ = trained(ASI(2, seed=6))  # equal, and of a graph of its own
    compiled = torch.compile(second, backend="aot_eager")
    compiled(x).square().sum().backward()
    del first
    gc.collect()
    torch.testing.assert_close(torch.autograd.grad(loss, x), expected, rtol=0, atol=0)  # its model is gone
    third, _ = trained(ASI(3, seed=6))
    torch.compile(third, backend="aot_eager")(x).square().sum().backward()
    compiled(x).square().sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["2", "02"])
def test_a_method_with_an_input_gradient_of_its_own_has_it_where_the_weight_is_frozen(frozen):
    found = []
    for compiled in (False, True):
        model, x = trained(GradientFilter(2), frozen=frozen)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        run(x).square().sum().backward()
        found.append([x.grad, *(one.grad for one in model.parameters())])
    for own, expected in zip(*found, strict=True):
        assert (own is None) == (expected is None)
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-6)


@dataclass(frozen=True)
class FirstImages(Method):
    """Somebody's: keeps a view of the input, and counts in Python's numbers."""

    count: int = 2

    @property
    def tag(self) -> str:
        return f"first{self.count}"

    def compress(self, x, geometry, state, name):
        seen = int(state[0]) + 1 if state and not x.is_meta else 1
        return (x[: self.count],), (torch.tensor(seen),)

    def weight_gradient(self, kept, grad, geometry, shape):
        return geometry.weight_gradient(kept[0], grad[: self.count])

    def cost(self, x, geometry, out_channels, input_gradient):
        raise NotImplementedError


@dataclass(frozen=True)
class Held(FirstImages):
    """Holds a tensor."""

    held: torch.Tensor | None = None


@dataclass(frozen=True)
class LargeOnes(FirstImages):
    """Keeps as many images as are large, and does not say that this depends on numbers."""

    def compress(self, x, geometry, state, name):
        count = 1 if x.is_meta else max(2, int((x.flatten(1).norm(dim=1) > 1).sum()))
        return (x[:count],), ()


@dataclass(frozen=True)
class Scaled(FirstImages):
    """Keeps the input and a part of that, of other numbers than its fields tell; carries a part of what it carries."""

    scale: Any = field(default=1.0, repr=False, compare=False)

    def compress(self, x, geometry, state, name):
        scaled = x * torch.as_tensor(self.scale, dtype=x.dtype).to(x.device).sum()
        mean = scaled.mean(0)
        return (scaled, None, scaled[:1], x[:0]), (x.new_empty(2, 0), mean, mean[:1], x.new_empty(0, 3))

    def weight_gradient(self, kept, grad, geometry, shape):
        return geometry.weight_gradient(kept[0], grad) + kept[2].sum()


def test_parts_of_others_that_look_alike_are_their_own():
    methods = [Scaled(scale=2), Scaled(scale=3), *(Held(2, np.ones(2)) for _ in range(2))]
    names = [in_graph.part(method, CONV, "a") for method in methods]
    assert len({*names}) == 4
    assert [in_graph.part(method, CONV, "a") for method in (Scaled(scale=2), Scaled(scale=3))] == names[:2]


@pytest.mark.slow
def test_parts_of_others_are_no_other_processs():
    """A graph that was compiled is kept on disk, with the sizes of what the method kept as it was written then."""
    code = "print(in_graph.part(FirstImages(), CONV, 'a'), in_graph.part(ASI(2), CONV, 'a'), sep='\\n')"
    code = f"import sys; sys.path[:0] = {sys.path!r}; from test_in_graph import *; {code}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    same = [one == in_graph.part(method, CONV, "a") for one, method in zip(found, (FirstImages(), ASI(2)), strict=True)]
    assert same == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_methods_that_look_alike_hold_tensors_and_give_views_and_empty_ones(backend):
    """The one of the first model was asked for the second one's gradients."""
    torch._dynamo.reset()
    for scale in (1.0, 3.0, torch.tensor(2.0), torch.tensor([1.0, 4.0])):
        model = lowrank.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), ["0"], Scaled(scale=scale))
        twin, fast = copy.deepcopy(model), torch.compile(model, fullgraph=True, backend=backend)
        for seed in range(2):
            x = random_tensor(4, 3, 6, 6, seed=seed, dtype=torch.float32)
            found = {name.removeprefix("_orig_mod."): value for name, value in step(fast, x).items()}
            torch.testing.assert_close(found, step(twin, x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(lowrank.training_state(model), lowrank.training_state(twin))


@pytest.mark.slow
def test_a_method_of_others_is_compiled_as_it_is():
    torch._dynamo.reset()
    model = lowrank.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), ["0"], FirstImages())
    twin, fast = copy.deepcopy(model), torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = random_tensor(4, 3, 6, 6, seed=seed, dtype=torch.float32)
        found = {name.removeprefix("_orig_mod."): value for name, value in step(fast, x).items()}
        torch.testing.assert_close(found, step(twin, x), rtol=1e-5, atol=1e-6)
    assert lowrank.training_state(model)["0.bases.0"].item() == 3


@pytest.mark.slow
def test_sizes_that_depend_on_numbers_are_refused_with_the_way_out():
    torch._dynamo.reset()
    model = lowrank.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), ["0"], LargeOnes())
    with pytest.raises(LowRankError, match=r"layer '0': what first2 keeps has other sizes .* chooses_by_data"):
        torch.compile(model, backend="aot_eager")(random_tensor(4, 3, 6, 6, dtype=torch.float32))
