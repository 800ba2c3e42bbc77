"""A convolution's output that nobody has read: whatever reads it, in whatever way, gets the stock output."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from lazy_cases import SHAPE, assert_the_same, pair, strides
from references import DEVICE, random_tensor
from strategies import convolutions
from torch import nn

import lowrank
from lowrank import Vanilla
from lowrank.layers.lazy import Lazy


def through_a_file(y):
    file = io.BytesIO()
    torch.save(y.detach(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Named(torch.Tensor):
    """Of somebody's own, as those of torchvision, MONAI and fastai, which wrap what they are given."""


OF_A_CPU = {"numpy", "numpy.asarray"}
READERS = {
    "numpy": lambda y: torch.from_numpy(y.detach().numpy()),
    "a subclass": lambda y: torch.relu(y.as_subclass(Named)).as_subclass(torch.Tensor),
    "numpy of the output itself": lambda y: torch.from_numpy(y.numpy(force=True)),
    "numpy.asarray": lambda y: torch.from_numpy(np.asarray(y.detach())),
    "tolist": lambda y: torch.tensor(y.tolist(), dtype=y.dtype),
    "item": lambda y: torch.tensor([y[1, 2, 3, 2].item(), y.sum().item()]),
    "float": lambda y: torch.tensor(float(y[0, 0, 0, 0])),
    "bool": lambda y: torch.tensor(bool((y > 0).any())),
    "in": lambda y: torch.tensor(y[0, 0, 0, 0].item() in y),
    "format": lambda y: torch.tensor(float(f"{y.detach().mean():.5f}")),
    "repr": lambda y: torch.tensor(list(repr(y.detach()).encode())),
    "repr of the output itself": lambda y: torch.tensor(list(repr(y).partition("grad_fn")[0].encode())),
    "pickle": lambda y: pickle.loads(pickle.dumps(y.detach())),
    "torch.save": through_a_file,
    "deepcopy": lambda y: copy.deepcopy(y.detach()),
    "copy": lambda y: copy.copy(y.detach()),
    "dlpack": lambda y: torch.from_dlpack(y.detach()),
    "data_ptr": lambda y: torch.tensor(y.data_ptr() == y.data_ptr() != 0),
    "untyped_storage": lambda y: torch.tensor([y.untyped_storage().nbytes(), y.nbytes]),
    "storage": lambda y: torch.tensor(list(y.storage())[:20]),
    "metadata": lambda y: torch.tensor(
        [*y.shape, *y.stride(), y.storage_offset(), y.element_size(), y.numel(), len(y)]
    ),
    "flags": lambda y: torch.tensor(
        [y.requires_grad, y.is_leaf, y.is_contiguous(), y._is_view(), y.is_floating_point()]
    ),
    "iteration": lambda y: torch.stack([image * 2 for image in y]),
    "data": lambda y: y.data * 2,
    "detach": lambda y: y.detach() * 2,
    "clone": lambda y: y.clone(),
    "alone": lambda y: y,
    "a view": lambda y: y.permute(1, 0, 2, 3).flatten(1),
    "another dtype": lambda y: y.float(),
    "a copy": lambda y: y.to(torch.float64, copy=True),
    "another layout": lambda y: y.contiguous(memory_format=torch.channels_last),
    "a list of tensors": lambda y: torch.cat([y, y], 1),
    "einsum": lambda y: torch.einsum("bchw,bdhw->cd", y, y),
    "a mask": lambda y: y[y > 0],
    "where": lambda y: torch.where(y > 0, y, 0),
    "like it": lambda y: torch.zeros_like(y) + y.new_ones(1),
    "an operator": lambda y: torch.ops.aten.sin(y),
    "as_subclass": lambda y: y.as_subclass(torch.Tensor) * 2,
    "a parameter": lambda y: nn.Parameter(y.detach()) * 2,
    "a loss": lambda y: nn.functional.mse_loss(y, torch.ones_like(y)),
    "inference mode": lambda y: torch.tensor(float(torch.inference_mode()(torch.sum)(y))),
    "a transform": lambda y: torch.func.grad(lambda scale: (y.detach() * scale).pow(2).sum())(y.new_ones(())),
    "a batch": lambda y: torch.func.vmap(lambda scale: (y.detach() * scale).sum())(torch.arange(3.0)),
}


@pytest.mark.parametrize("then", ["alone", "then the norm", "after the norm"])
@pytest.mark.parametrize("reader", [name for name in READERS if DEVICE == "cpu" or name not in OF_A_CPU])
def test_every_reader(reader, then):
    read = READERS[reader]

    def use(model, x):
        y = model[0](x)
        if then == "alone":
            return read(y)
        return [read(y), model[1](y)] if then == "then the norm" else [model[1](y), read(y)]

    assert_the_same(use)


def test_code_that_goes_by_no_operator_gets_an_error_and_no_empty_memory():
    y = pair()[1][0](random_tensor(*SHAPE))
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="data pointer"):
        torch._C.TensorBase.data_ptr(y)  # as an extension in C++ does


def in_place(change):
    def use(model, x):
        y = model[0](x)
        change(y)
        return model[1](y)

    return use


IN_PLACE = {
    "+=": lambda y: y.__iadd__(1),
    "mul_": lambda y: y.mul_(torch.arange(4.0).view(4, 1, 1)),
    "an entry": lambda y: y.__setitem__((0, 1), 2.0),
    "a masked fill": lambda y: y.masked_fill_(y.detach() > 0, 0.5),
    "a view": lambda y: y[:, 1:3].mul_(3),
    "a flat view": lambda y: y.flatten(1).mul_(3),
    "a view of a view": lambda y: y.transpose(0, 1)[2:].unsqueeze(0).sub_(1),
    "views of two kinds": lambda y: (y[:, 0].mul_(2), y[..., 0].add_(1)),
    "relu_": torch.relu_,
    "a module": nn.LeakyReLU(0.1, inplace=True),
    "a function": lambda y: nn.functional.dropout(y, 0.5, True, True),
    "without a gradient": lambda y: torch.no_grad()(lambda: y.mul_(2))(),
    "of the detached": lambda y: y.detach().mul_(2),
    "of the data": lambda y: y.data.mul_(2),
    "other data": lambda y: setattr(y, "data", 2 * y.data),
    "data without a look at it": lambda y: setattr(y, "data", torch.full(y.shape, 3.0, dtype=y.dtype)),
    "many at once": lambda y: torch._foreach_mul_([y], 2),
    "zero_": lambda y: y.zero_(),
    "detach_": lambda y: y.detach_(),
    "copy_": lambda y: y.copy_(torch.ones_like(y)),
}


@pytest.mark.parametrize("change", IN_PLACE)
def test_changed_in_place_ahead_of_the_norm(change):
    assert_the_same(in_place(IN_PLACE[change]))


@pytest.mark.parametrize("change", ["mul_", "a view", "relu_", "without a gradient", "of the data", "other data"])
def test_changed_in_place_behind_the_norm(change):
    """The norm has read what was there before."""

    def use(model, x):
        y = model[0](x.detach())
        z = model[1](y)
        IN_PLACE[change](y)
        return [z, y * 2]

    # PyTorch keeps the norm's input for the gradient of whatever is trained.
    assert_the_same(use, freeze=["0.weight", "0.bias", "1.weight", "1.bias"])


IN_PLACE_FUNCTIONS = {
    "relu": lambda y: nn.functional.relu(y, inplace=True),
    "relu_": lambda y: nn.functional.relu_(y),
    "torch.relu_": torch.relu_,
    "a module": lambda y: nn.ReLU6(inplace=True)(y),
    "hardtanh": lambda y: nn.functional.hardtanh(y, -0.5, 0.7, True),
    "leaky_relu": lambda y: nn.functional.leaky_relu(y, 0.1, True),
    "silu": lambda y: nn.functional.silu(y, inplace=True),
    "hardswish": lambda y: nn.functional.hardswish(y, inplace=True),
    "dropout": lambda y: nn.functional.dropout(y, 1e-12, True, True),
    "add_": lambda y: y.add_(y),
    "mul_": lambda y: y.mul_(2),
    "+=": lambda y: y.__iadd__(y),
}


@pytest.mark.parametrize("function", IN_PLACE_FUNCTIONS)
def test_a_function_in_place_gives_the_tensor_that_it_was_given(function):
    """So that a hook on the one sees what reaches the other."""

    def use(model, x):
        y = model[0](x)
        z = IN_PLACE_FUNCTIONS[function](y)
        assert z is y
        z.register_hook(lambda grad: grad * 0.5)
        return model[1](y)

    assert_the_same(use)


@pytest.mark.parametrize("activation", [nn.ReLU(True), nn.Hardtanh(-0.5, 0.7, True), nn.LeakyReLU(0.1, True)], ids=str)
@pytest.mark.parametrize("method", [Vanilla(), lowrank.ASI([3, 4, 3, 3])], ids=["vanilla", "compressed"])
def test_behind_an_activation_in_place_no_more_is_kept_than_of_an_output_that_was_never_unread(activation, method):
    parts = nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 8, 3), activation, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    x, kept = random_tensor(8, 3, 20, 20).float(), []
    for stock in (nn.Sequential(*parts), nn.Sequential(*parts[:5])):
        model = lowrank.convert(copy.deepcopy(stock), ["0", "2", "4"], method)
        assert (type(model[0](x)) is Lazy) == (len(stock) == 6)
        kept.append(lowrank.saved_bytes(model[:5], lambda model, x: model(x).sum(), x))
    assert kept[0] == kept[1]


class Doubling(torch.autograd.Function):
    """A user's own node; as `inplace` says it changes its input, or hands it on."""

    @staticmethod
    def forward(ctx, y, inplace):
        if inplace:
            ctx.mark_dirty(y)
            return y.mul_(2)
        ctx.save_for_backward(y)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0] if ctx.saved_tensors else 2), None


@pytest.mark.parametrize("inplace", [True, False])
def test_a_node_of_the_users_own_in_between(inplace):
    assert_the_same(lambda model, x: model[1](Doubling.apply(model[0](x), inplace)))


# Layout


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2),
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    "with gaps": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout, padding_mode, channels_last):
    def use(model, x):
        x = LAYOUTS[layout](x)
        y = model[0](x)
        z = model[1](y)
        return [z, y, model[1](model[0](x) * 1), y.flatten(1), y.as_strided((3,), (1,))]

    assert_the_same(use, channels_last=channels_last, padding=2, padding_mode=padding_mode)


AUTOCAST = {
    "an operation": lambda y: y.sin(),
    "tolist": lambda y: torch.tensor(y.tolist(), dtype=torch.float64).float(),
    "numpy": lambda y: torch.from_numpy(y.numpy(force=True)),
    "data_ptr": lambda y: (y.data_ptr(), y + 0)[1],
}


@pytest.mark.parametrize("reader", AUTOCAST)
def test_read_within_autocast_it_is_what_was_computed_ahead_of_it(reader):
    def use(model, x):
        y = model.float()[0](x.detach())
        with torch.autocast(DEVICE, torch.bfloat16):
            return AUTOCAST[reader](y)

    assert_the_same(use, random_tensor(*SHAPE).float(), tolerance=1e-5)


@pytest.mark.slow
@given(setting=convolutions())
def test_shape_strides_and_values_of_any_convolution(setting):
    stock = nn.Sequential(setting.layer(), nn.BatchNorm2d(dict(setting.options)["out_channels"])).double().eval()
    model = lowrank.convert(copy.deepcopy(stock), ["0"], Vanilla())
    for layout in (torch.contiguous_format, torch.channels_last):
        x = setting.x().contiguous(memory_format=layout)
        expected, y = stock[0](x), model[0](x)
        assert type(y) is Lazy or stock[0].padding_mode != "zeros"
        assert (y.shape, strides(y), y.dtype) == (expected.shape, strides(expected), expected.dtype)
        torch.testing.assert_close(y + 0, expected + 0)


def test_only_what_a_normalisation_may_take_is_lazy():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)).eval()
    lowrank.convert(model, ["0", "2"], Vanilla())
    x = random_tensor(*SHAPE, dtype=torch.float32)
    assert type(model[0](x)) is Lazy
    assert type(model(x)) is torch.Tensor
    lowrank.convert(model, ["0"], Vanilla(), fuse=False)
    assert type(lowrank.revert(model)[0](x)) is torch.Tensor


ERRORS = {
    "another number of channels": (random_tensor(2, 4, 8, 7), "channels"),
    "too small": (random_tensor(2, 3, 2, 7), "[Kk]ernel size"),
    "another dtype": (random_tensor(*SHAPE).float(), "dtype|type"),
    "two dimensions": (random_tensor(8, 7), "3D .* or 4D"),
    "five dimensions": (random_tensor(1, 2, 3, 8, 7), "3D .* or 4D"),
    "whole numbers": (torch.ones(SHAPE, dtype=torch.long), "Long|type"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_the_convolution_cannot_compute_is_pytorchs_error_at_the_call(case):
    x, message = ERRORS[case]
    errors = []
    for network in pair():
        with pytest.raises(RuntimeError, match=message) as error:
            network[0](x)
        errors.append(str(error.value).splitlines()[0])
    assert errors[1] == errors[0]


def test_an_output_that_was_read_is_that_tensor_from_then_on():
    _, model = pair()
    y = model[0](random_tensor(*SHAPE))
    assert y.data_ptr() == y.data_ptr()
    y.detach().zero_()
    assert not y.detach().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_image_with_its_channels_last_has_stocks_gradients(dtype):
    """PyTorch takes a contiguous gradient for one with channels last, where the normalisation's input has the strides
    that `view_as` gives one image."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)).to(DEVICE, dtype)
    own = lowrank.convert(copy.deepcopy(stock), ["0", "2"], Vanilla())
    x = torch.randn(1, 4, 7, 7, dtype=dtype, device=DEVICE).to(memory_format=torch.channels_last)
    grad = torch.randn(1, 5, 7, 7, dtype=dtype, device=DEVICE)
    wanted, found = (torch.autograd.grad(net(x), list(net.parameters()), grad) for net in (stock, own))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_tokens_of_one_image_put_in_order_for_a_normalisation_have_stocks_gradients():
    torch.manual_seed(0)
    stock = nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)).to(DEVICE, torch.float64)
    own = lowrank.convert(copy.deepcopy(stock), ["1"], Vanilla())
    tokens = torch.randn(1, 49, 6, dtype=torch.float64, device=DEVICE)
    grad = torch.randn(1, 5, 7, 7, dtype=torch.float64, device=DEVICE)

    def gradients(net):
        leaf = tokens.clone().requires_grad_()
        y = net(leaf.transpose(1, 2).reshape(1, 6, 7, 7))
        return torch.autograd.grad(y, [leaf, *net.parameters()], grad)

    torch.testing.assert_close(gradients(own), gradients(stock))
