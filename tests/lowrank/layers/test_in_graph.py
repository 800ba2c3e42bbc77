"""A method's work as operators of a compiled graph: PyTorch's own checks of operators, and methods of others."""

import copy
from dataclasses import dataclass

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
