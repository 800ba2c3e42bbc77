"""Products in bfloat16 of what is kept in eight bits: where they are made, and how near they come."""

import pytest
import torch
from references import autograd, multiply, random_tensor, same_span, unfold
from torch import nn

from lowrank import ASI, Tucker
from lowrank.kernels import library
from lowrank.layers.layer import geometry_of
from lowrank.tensors import halves
from lowrank.tensors.decompose import subspace_iteration
from lowrank.tensors.gradients import gradients, weight_gradient

pytestmark = pytest.mark.cpu_only("the rule is one for its processors")
ROUNDING = 2**-8  # of a number in bfloat16, at most
# Shape, mode and columns of a large product: rows of few numbers, of many, of none; the first mode and the last.
LARGE = [
    ((32, 300, 3, 3), 1, 60),
    ((16, 90, 14, 14), 1, 40),
    ((40, 70, 64), 2, 40),
    ((200, 900), 0, 40),
    ((600, 300), 1, 50),
]


@pytest.fixture(autouse=True)
def _a_processor_that_has_it(monkeypatch):
    monkeypatch.setattr(halves, "_processor_multiplies", lambda: True)


def near(found, wanted, share=2 * ROUNDING):
    """Whether they differ by so much of the norm, as by rounding to eight bits, and not by nothing, as in float32."""
    apart = (found.double() - wanted).norm() / wanted.norm()
    return found.dtype == torch.float32 and 1e-5 < apart < share


@pytest.mark.parametrize(("shape", "mode", "columns"), LARGE)
def test_large_products_are_made_in_bfloat16(shape, mode, columns):
    x, matrix = random_tensor(*shape), random_tensor(columns, shape[mode], seed=1)
    z = multiply(x, matrix, mode)
    for given in (x.float(), x.float().transpose(0, -1).contiguous().transpose(0, -1)):
        found = halves.mode_product(given, matrix.float(), mode)
        assert found.is_contiguous()
        assert near(found, z)
    assert near(halves.mode_correlation(x.float(), z.float(), mode), unfold(x, mode) @ unfold(z, mode).mT)


@pytest.mark.parametrize(
    ("shape", "mode", "columns", "dtype"),
    [
        ((32, 300, 3, 3), 1, 60, torch.float64),
        ((32, 300, 3, 3), 1, 8, torch.float32),
        ((4, 300, 3, 3), 1, 60, torch.float32),
        ((32, 8, 60, 60), 1, 60, torch.float32),
        ((16, 90, 24, 24), 1, 20, torch.float32),
        ((64, 90, 24, 24), 1, 40, torch.float32),
        ((8, 9000), 1, 80, torch.float32),
    ],
    ids=["double", "few columns", "small", "few rows", "few columns of long rows", "too large a copy", "few fibres"],
)
def test_others_are_not(shape, mode, columns, dtype):
    assert not halves.are_worth(random_tensor(*shape).to(dtype), mode, columns)


def test_nothing_is_where_the_processor_has_no_such_products(monkeypatch):
    x = random_tensor(32, 300, 3, 3).float()
    assert halves.are_worth(x, 1, 60)
    monkeypatch.setattr(halves, "_processor_multiplies", lambda: False)
    assert not halves.are_worth(x, 1, 60)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_fibre(bad):
    x, matrix = random_tensor(32, 300, 3, 3).float(), random_tensor(60, 300, seed=1).float()
    wanted = halves.mode_product(x, matrix, 1)
    x[3, 20, 1, 2] = bad
    found = halves.mode_product(x, matrix, 1)
    assert not found[3, :, 1, 2].isfinite().any()
    found[3, :, 1, 2] = wanted[3, :, 1, 2]
    assert torch.equal(found, wanted)


def starts_of(shape, ranks):
    return [
        None if rank == size else torch.linalg.qr(random_tensor(size, rank, seed=mode))[0].float()
        for mode, (size, rank) in enumerate(zip(shape, ranks, strict=True))
    ]


@pytest.mark.parametrize("held", [(), (1, 2, 3)])
@pytest.mark.parametrize(
    ("shape", "ranks"), [((32, 300, 3, 3), (30, 60, 3, 2)), ((64, 64, 128), (64, 64, 16))], ids=["all", "a share"]
)
def test_an_input_is_projected_on_orthonormal_bases(shape, ranks, held):
    x, starts = random_tensor(*shape), starts_of(shape, ranks)
    found, bases = subspace_iteration(x.float(), starts, held=held, to_eight_bits=True)
    precise, _ = subspace_iteration(x.float(), starts, held=held)
    projected = x
    for mode, basis in enumerate(bases):
        if basis is None:
            continue
        assert basis.dtype == torch.float32
        torch.testing.assert_close(basis.mT @ basis, torch.eye(ranks[mode]), rtol=0, atol=1e-5)
        projected = multiply(projected, basis.double().mT, mode)
        assert (basis is starts[mode]) is (mode in held)
    assert near(found.core, projected)
    lost = [(form.dense().double() - x).norm() / x.norm() for form in (found, precise)]
    assert lost[0] < 1.001 * lost[1]


def test_the_basis_is_that_of_float32_but_for_rounding():
    """Where a step has so few directions that the next ones are far below."""
    shape = (32, 300, 3, 3)
    x = multiply(random_tensor(32, 12, 3, 3), random_tensor(300, 12, seed=1), 1) + 1e-3 * random_tensor(*shape, seed=2)
    starts = [None, random_tensor(300, 12, seed=3).float(), None, None]
    _, (_, found, *_) = subspace_iteration(x.float(), starts, to_eight_bits=True)
    _, (_, wanted, *_) = subspace_iteration(x.float(), starts)
    assert same_span(found.double(), wanted.double(), tolerance=0.02)


def test_published_iterates_in_float32():
    x, starts = random_tensor(32, 300, 3, 3).float(), starts_of((32, 300, 3, 3), (30, 60, 3, 3))
    found, _ = subspace_iteration(x, starts, "published", to_eight_bits=True)
    wanted, _ = subspace_iteration(x, starts, "published")
    assert torch.equal(found.core, wanted.core)


def given(shape, ranks, outputs):
    layer = nn.Conv2d(shape[1], outputs, 1).double() if len(shape) == 4 else nn.Linear(shape[-1], outputs).double()
    factors = tuple(start if start is None else start.double() for start in starts_of(shape, ranks))
    tucker = Tucker(random_tensor(*ranks, seed=9), factors)
    with torch.no_grad():
        grad = random_tensor(*layer(tucker.dense()).shape, seed=5)
    return layer, tucker, grad, autograd(layer, tucker.dense(), grad)[2]


@pytest.mark.parametrize(
    ("shape", "ranks", "outputs"),
    [
        ((32, 300, 3, 3), (30, 60, 3, 2), 400),
        ((32, 200, 4, 4), (32, 64, 4, 4), 300),
        ((40, 16, 200), (40, 16, 60), 300),
    ],
)
def test_weight_gradients_are_autograds_but_for_rounding(shape, ranks, outputs):
    layer, tucker, grad, wanted = given(shape, ranks, outputs)
    form = tucker.to(torch.float32)
    last = grad.movedim(1, -1).contiguous().movedim(-1, 1)
    for way in (grad.float(), last.float()):
        weight, bias = gradients(form, way, geometry_of(layer), to_eight_bits=True)
        assert near(weight, wanted["weight"])
        torch.testing.assert_close(bias.double(), wanted["bias"], rtol=1e-4, atol=1e-3)
        assert near(weight_gradient(form, way, geometry_of(layer), to_eight_bits=True), wanted["weight"])


def test_of_an_input_that_is_kept_whole_they_are_made_in_float32():
    layer, tucker, grad, wanted = given((32, 300, 3, 3), (32, 300, 3, 3), 200)
    found = weight_gradient(tucker.to(torch.float32), grad.float(), geometry_of(layer), to_eight_bits=True)
    torch.testing.assert_close(found.double(), wanted["weight"], rtol=0, atol=1e-5 * wanted["weight"].abs().max())


@pytest.mark.parametrize(
    ("storage", "halved"), [("int8", True), ("bfloat16", True), ("input", False), ("float32", False)]
)
def test_a_method_uses_them_where_it_keeps_eight_bits(storage, halved, monkeypatch):
    """And with compiled kernels as without."""
    layer, shape = nn.Conv2d(300, 400, 1), (32, 300, 3, 3)
    x, grad, asked = random_tensor(*shape).float(), random_tensor(32, 400, 3, 3, seed=1).float(), []
    own = halves.unfolded
    monkeypatch.setattr(halves, "unfolded", lambda *args: asked.append(args) or own(*args))
    method, found = ASI((30, 60, 3, 2), storage=storage), []
    for plain in (False, True):
        with library.plain() if plain else torch.no_grad():
            kept, state = method.compress(x, geometry_of(layer), (), "0")
            assert bool(asked) is halved
            asked.clear()
            found.append(method.gradients(kept, grad, geometry_of(layer), shape)[0])
            assert bool(asked) is halved
            asked.clear()
            assert method.compress(x, geometry_of(layer), state, "0")
            asked.clear()
    assert (found[0] - found[1]).norm() < 5e-3 * found[0].norm()
