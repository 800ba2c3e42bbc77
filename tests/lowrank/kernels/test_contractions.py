"""Weight gradients in one compiled call, against autograd in double precision and against PyTorch's operators."""

import ctypes
from unittest import mock

import pytest
import torch
from references import autograd, random_tensor
from torch import nn

from lowrank import ASI, Tucker, kernels
from lowrank.kernels import contractions, library
from lowrank.tensors import gradients
from lowrank.tensors.geometry import ConvGeometry
from lowrank.tensors.plans import candidate_plans, plan_gradient

pytestmark = [
    pytest.mark.cpu_only("compiled kernels work in its memory"),
    pytest.mark.skipif(not kernels.status().active, reason=str(kernels.status())),
]
# Channels, outputs, options of the layer; shape of its input without the channels; ranks. Images narrower than a
# vector, as wide, and wider; fewer and more outputs than are made together; strides, paddings, whole channels.
POINTWISE = [
    (9, 30, {}, (16, 7, 7), (5, 4, 3, 3)),
    (6, 7, {}, (9, 13, 17), (3, 4, 4, 3)),
    (5, 3, {}, (3, 16, 16), (2, 5, 5, 1)),
    (5, 17, {"stride": 2}, (6, 17, 9), (2, 3, 4, 4)),
    (6, 8, {"groups": 2}, (7, 9, 33), (3, 6, 4, 4)),
    (6, 8, {"groups": 2, "stride": (1, 3)}, (7, 4, 40), (3, 5, 2, 4)),
]
DEPTHWISE = [
    (6, {"kernel_size": 3, "padding": 1}, (9, 15, 33), (4, 3, 4, 4)),
    (6, {"kernel_size": 5, "padding": 2, "stride": 2}, (5, 21, 16), (2, 6, 3, 4)),
    (19, {"kernel_size": 3, "padding": 1}, (16, 7, 7), (8, 8, 4, 4)),
    (4, {"kernel_size": 7, "padding": 3}, (3, 8, 11), (2, 2, 3, 3)),
    (5, {"kernel_size": (3, 2), "padding": (2, 0), "dilation": (2, 1)}, (6, 12, 20), (3, 4, 5, 2)),
    (3, {"kernel_size": 3, "padding": "same", "dilation": 2}, (4, 9, 14), (3, 2, 1, 1)),
]
DENSE = [
    (4, 5, {"kernel_size": (3, 2), "padding": (1, 0)}, (6, 12, 31), (3, 2, 4, 3)),
    (3, 10, {"kernel_size": 3, "padding": 1, "stride": 2}, (8, 24, 24), (3, 3, 4, 4)),
    (6, 8, {"kernel_size": 3, "padding": 1, "groups": 2}, (5, 10, 9), (3, 6, 4, 4)),
    (6, 8, {"kernel_size": 3, "padding": 1, "groups": 2}, (5, 10, 9), (3, 4, 4, 4)),
]
# Batches that are kept whole.
WHOLE = [
    ((9, 30, {"kernel_size": 1}), (2, 7, 7), (2, 4, 3, 3)),
    ((6, 7, {"kernel_size": 1, "stride": 2}), (8, 13, 17), (8, 4, 4, 3)),
    ((5, 3, {"kernel_size": 1}), (3, 16, 16), (3, 5, 4, 1)),
    ((6, 6, {"kernel_size": 3, "padding": 1, "groups": 6}), (2, 15, 33), (2, 3, 4, 4)),
    ((19, 19, {"kernel_size": 5, "padding": 2, "stride": 2, "groups": 19}), (8, 9, 9), (8, 19, 4, 4)),
    ((4, 5, {"kernel_size": (3, 2), "padding": (1, 0)}), (2, 12, 31), (2, 2, 4, 3)),
    ((3, 10, {"kernel_size": 3, "padding": 1, "stride": 2}), (11, 24, 24), (11, 3, 4, 4)),
    ((6, 8, {"kernel_size": 3, "padding": 1, "groups": 2}), (5, 10, 9), (5, 4, 4, 4)),
]
# Numbers of a core that are no whole vectors, on images narrower than one; many channels.
NARROW = [
    ((channels, 30, {"kernel_size": 1}), (batch, side, side), (rank, channels - 1, *sides))
    for batch, rank in ((16, 4), (4, 4), (3, 3))
    for channels, side, sides in ((9, 4, (3, 3)), (61, 5, (3, 3)), (61, 7, (3, 2)), (30, 6, (2, 3)))
]
SETTINGS = [
    *WHOLE,
    *NARROW,
    *(((inputs, outputs, {"kernel_size": 1, **options}), *sizes) for inputs, outputs, options, *sizes in POINTWISE),
    *(((channels, channels, {"groups": channels, **options}), *sizes) for channels, options, *sizes in DEPTHWISE),
    *(((inputs, outputs, options), *sizes) for inputs, outputs, options, *sizes in DENSE),
]


@pytest.fixture(params=[4, 8, 16])
def width(request):
    """As on a processor whose vectors have at most so many numbers."""
    library.library().set_width(request.param)
    yield
    library.library().set_width(16)


def given(layer, sizes, ranks):
    """A layer, the Tucker form of its input in float32, and a gradient of its output."""
    inputs, outputs, options = layer
    module = nn.Conv2d(inputs, outputs, dtype=torch.float64, **options)
    shape = (sizes[0], inputs, *sizes[1:])
    factors = tuple(
        None if rank == size else random_tensor(size, rank, seed=mode).float()
        for mode, (size, rank) in enumerate(zip(shape, ranks, strict=True))
    )
    tucker = Tucker(random_tensor(*ranks, seed=9).float(), factors)
    with torch.no_grad():
        grad = random_tensor(*module(tucker.to(torch.float64).dense()).shape, seed=5).float()
    return module, tucker, grad, ConvGeometry.of(module)


def orders(tucker, grad, geometry):
    """Those that a compiled contraction makes, by kind."""
    factored = tuple(factor is not None for factor in tucker.factors)
    plans = candidate_plans(geometry, tucker.shape, tucker.ranks, factored, grad.shape[1])
    return [(plan.kind, plan) for plan in plans if plan.kind is not None]


def by_order(plan, *form):
    """Both gradients by one order, and how many compiled contractions that took."""
    answers, own = [], contractions.contract
    contract = lambda *asked: answers.append(own(*asked)) or answers[-1]  # noqa: E731
    chosen = mock.patch.object(gradients, "plan_gradient", return_value=plan)
    with chosen, mock.patch.object(contractions, "contract", contract):
        return gradients.gradients(*form), sum(answer is not None for answer in answers)


def exact(module, tucker, grad):
    return autograd(module, tucker.to(torch.float64).dense(), grad.double())[2]


def assert_near(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


@pytest.mark.parametrize("setting", SETTINGS)
def test_both_gradients_are_autograds_by_every_kind(width, setting):
    module, *form = given(*setting)
    tucker, grad, geometry = form
    wanted, made = exact(module, tucker, grad), set()
    for kind, plan in orders(tucker, grad, geometry):
        (weight, bias), calls = by_order(plan, *form)
        assert calls == 1
        assert_near(weight, wanted["weight"])
        assert_near(bias, wanted["bias"])
        made.add(kind)
    pointwise, own = geometry.pointwise, geometry.groups == grad.shape[1] == tucker.shape[1]
    images = {"images"} if tucker.factors[0] is not None else set()
    whole = {"spread", "samples"} | images if pointwise else {"windows"} | ({"rows"} if own else set())
    assert made - {"windows"} == whole - {"windows"}
    assert pointwise or "windows" in made


@pytest.mark.parametrize("setting", [*SETTINGS[-16::6], *WHOLE])
def test_the_operators_make_the_same(setting):
    module, *form = given(*setting)
    wanted = exact(module, *form[:2])
    for _, plan in orders(*form):
        with library.plain():
            (weight, bias), calls = by_order(plan, *form)
        assert calls == 0
        assert_near(weight, wanted["weight"])
        assert_near(bias, wanted["bias"])


@pytest.mark.parametrize("setting", [(POINTWISE[0], 40), (POINTWISE[1], 13), (DEPTHWISE[0], 6)])
@pytest.mark.parametrize("samples", [24, 8])
def test_they_are_the_same_with_any_number_of_threads(samples, setting):
    (channels, *_), outputs = setting
    depthwise = outputs == channels
    layer = (channels, outputs, {"kernel_size": 3, "groups": channels} if depthwise else {"kernel_size": 1})
    _, *form = given(layer, (samples, 30, 31), (8, min(channels, 5), 4, 4))
    before = torch.get_num_threads()
    try:
        for _, plan in orders(*form):
            torch.set_num_threads(1)
            wanted, _ = by_order(plan, *form)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                found, calls = by_order(plan, *form)
                assert calls == 1
                assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_more_scratch_is_written_than_was_asked_for(width, setting, monkeypatch):
    _, *form = given(*setting)
    own, rooms, beyond = contractions.kernel_and_room, [], 64

    def guarded(name, *tensors):
        kernel, room_of = own(name, *tensors)

        def run(plan, memory, threads):
            guard = (ctypes.c_float * beyond).from_address(memory[6] + 4 * rooms[-1])
            guard[:] = [7.0] * beyond
            kernel(plan, memory, threads)
            assert guard[:] == [7.0] * beyond

        return run, lambda plan, threads: rooms.append(room_of(plan, threads)) or rooms[-1] + beyond

    monkeypatch.setattr(contractions, "kernel_and_room", guarded)
    for _, plan in orders(*form):
        by_order(plan, *form)
    assert rooms


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_not_finite_stays_with_its_output_channel(width, bad, setting):
    module, *form = given(*setting)
    tucker, grad, geometry = form
    grad[1, 2, -1, -1] = bad  # the numbers behind it are another channel's
    wanted = exact(module, tucker, grad)
    others = [at for at in range(grad.shape[1]) if at != 2]
    for _, plan in orders(tucker, grad, geometry):
        (weight, bias), calls = by_order(plan, *form)
        assert calls == 1
        assert not weight[2].isfinite().all()
        assert not bias[2].isfinite()
        assert_near(weight[others], wanted["weight"][others])
        assert_near(bias[others], wanted["bias"][others])


def test_what_it_cannot_take_goes_the_usual_way():
    """Images narrower than any vector, other layouts, other precision, more ranks than pay: the same values."""
    for sizes, ranks in (((9, 1, 3), (3, 4, 1, 2)), ((30, 9, 9), (20, 4, 3, 3)), ((9, 9, 9), (3, 4, 3, 3))):
        module, tucker, grad, geometry = given((6, 7, {"kernel_size": 1}), sizes, ranks)
        wanted = exact(module, tucker, grad)
        for way in (grad, grad.contiguous(memory_format=torch.channels_last), torch.stack([grad, grad], -1)[..., 0]):
            for found, name in zip(gradients.gradients(tucker, way, geometry), ("weight", "bias"), strict=True):
                assert_near(found, wanted[name])
        for found, name in zip(
            gradients.gradients(tucker.to(torch.float64), grad.double(), geometry), ("weight", "bias"), strict=True
        ):
            torch.testing.assert_close(found, wanted[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("layer", "shape", "kind"),
    [
        ((48, 96, {"kernel_size": 1}), (64, 48, 7, 7), "spread"),
        ((48, 96, {"kernel_size": 1}), (64, 48, 28, 28), "samples"),
        ((16, 32, {"kernel_size": 1}), (64, 16, 112, 112), "images"),
        ((48, 48, {"kernel_size": 3, "padding": 1, "groups": 48}), (64, 48, 28, 28), "rows"),
        ((3, 32, {"kernel_size": 3, "padding": 1, "stride": 2}), (64, 3, 224, 224), "windows"),
    ],
)
def test_convolutional_networks_have_theirs(layer, shape, kind):
    inputs, outputs, options = layer
    with torch.device("meta"):
        geometry = ConvGeometry.of(nn.Conv2d(inputs, outputs, **options))
    ranks = (8, min(8, inputs), 4, 4)
    factored = tuple(rank < size for rank, size in zip(ranks, shape, strict=True))
    assert plan_gradient(geometry, shape, ranks, factored, outputs).kind == kind


@pytest.mark.parametrize("sizes", [(32, 20, 20), (8, 40, 40), (4, 24, 24), (1, 40, 40)])
def test_a_layer_is_read_once(sizes, monkeypatch):
    """Both gradients from the one contraction and no further read of the output's gradient."""
    module, tucker, grad, geometry = given((8, 48, {"kernel_size": 1}), sizes, (min(sizes[0], 4), 4, 4, 4))
    asked, own = [], contractions.contract
    monkeypatch.setattr(
        contractions, "contract", lambda kind, grad, *rest: asked.append(grad) or own(kind, grad, *rest)
    )
    monkeypatch.setattr(ConvGeometry, "bias_gradient", mock.Mock(side_effect=AssertionError("another read")))
    weight, bias = ASI(ranks=4).gradients((tucker.core, *tucker.factors), grad, geometry, tucker.shape)
    wanted = exact(module, tucker, grad)
    assert [one.data_ptr() for one in asked] == [grad.data_ptr()]
    assert_near(weight, wanted["weight"])
    assert_near(bias, wanted["bias"])
