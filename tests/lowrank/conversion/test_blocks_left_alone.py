"""Whatever a model does with a convolution's output, it gets what the stock model gives: output and every gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F
from block_cases import FULL_RANK, assert_equal, kept, network, results
from networks import frozen_statistics, with_statistics
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD


class ReadTwice(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return self[1](y) + y


class ReadFirst(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return y.mean((2, 3), keepdim=True) + self[1](y)


class Twice(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](self[1](self[0](x))))


class TwoNorms(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return self[1](y) + self[1](y).square()


class ByValue(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return self[1](y) if y.sum().item() > 0 else self[1](-y)


class ByMode(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        z = self[1](y)
        return z + y if self.training else z - y


class ByGradMode(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        z = self[1](y)
        return z if torch.is_grad_enabled() else z + y


class ByArgument(nn.Sequential):
    """A flag that is off by default asks for inner tensors."""

    def forward(self, x):
        return torch.stack(self.features(x, inner=True))

    def features(self, x, inner=False):
        y = self[0](x)
        z = self[1](y)
        return (z.relu(), z, y) if inner else (z.relu(),)


class NormFirst(nn.Sequential):
    def forward(self, x):
        return self[0](self[1](x))


class ActivationBetween(nn.Sequential):
    def forward(self, x):
        return self[1](F.relu(self[0](x)))


class InPlaceBetween(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        y *= 2
        y[:, 0] += 1
        return self[1](y)


class Stitched(nn.Sequential):
    """Half of what is normalised is another tensor."""

    def forward(self, x):
        return self[1](torch.cat([self[0](x)[:, :1], x[:, :2]], 1))


class Unused(nn.Sequential):
    def forward(self, x):
        self[0](x)
        return self[1](x)


class Returned(nn.Sequential):
    """The output is asked for as it is, beside what is made of it."""

    def forward(self, x):
        y = self[0](x)
        return torch.stack([self[1](y), y])


class Elsewhere(nn.Sequential):
    """The convolution is called once more, by itself."""

    def forward(self, x):
        return self[1](self[0](x)).relu() + self[0](x)


KINDS = [
    *(ReadTwice, ReadFirst, Twice, TwoNorms, ByValue, ByMode, ByGradMode, ByArgument, NormFirst, ActivationBetween),
    *(InPlaceBetween, Stitched, Unused, Returned, Elsewhere),
]


def block(kind):
    return frozen_statistics(with_statistics(kind(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)))).double()


@pytest.mark.parametrize("method", FULL_RANK, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_use_an_output(kind, method):
    model = block(kind)
    stock, x = copy.deepcopy(model), random_tensor(2, 3, 8, 8).abs()
    lowrank.convert(model, ["0"], method)
    for mode in (nn.Module.eval, frozen_statistics, nn.Module.train):
        mode(stock), mode(model)
        assert_equal(results(model, x), results(stock, x))
        with torch.no_grad():
            torch.testing.assert_close(model(x), stock(x))


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_weight_frozen(kind):
    model = block(kind)
    model[0].weight.requires_grad_(False)
    stock, x = copy.deepcopy(model), random_tensor(2, 3, 8, 8).abs()
    lowrank.convert(model, ["0"], HOSVD(1.0))
    assert_equal(results(model, x), results(stock, x))


REPLACEMENTS = {
    "nothing": lambda norm: nn.Identity(),
    "another norm": lambda norm: with_statistics(nn.BatchNorm2d(4)).double().eval(),
    "group norm": lambda norm: nn.GroupNorm(2, 4).double(),
    "a synchronised one": nn.SyncBatchNorm.convert_sync_batchnorm,
    "one without statistics": lambda norm: nn.BatchNorm2d(4, track_running_stats=False).double().eval(),
    "one under another norm": lambda norm: nn.Sequential(with_statistics(nn.BatchNorm2d(4)).double().eval(), norm),
}


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_a_normalisation_that_is_replaced_later(kind):
    """The first pass afterwards is right already, and the passes before have left nothing behind."""
    model, x = network("sequence"), random_tensor(2, 3, 8, 8)
    stock = copy.deepcopy(model)
    lowrank.convert(model, ["0"], HOSVD(1.0))
    model(x)
    for network_ in (stock, model):
        torch.manual_seed(0)
        network_[1] = REPLACEMENTS[kind](network_[1])
    for _ in range(2):
        if kind == "a synchronised one":  # the stock one cannot compute on a CPU; its values are the plain one's
            assert isinstance(model[1], nn.SyncBatchNorm)
            assert not stock[1].training
        assert_equal(results(model, x), results(stock, x))


def test_a_convolution_that_is_replaced_later():
    model, x = network("sequence"), random_tensor(2, 3, 8, 8)
    stock = copy.deepcopy(model)
    lowrank.convert(model, ["0"], HOSVD(1.0))
    model(x)
    stock[0] = nn.Conv2d(3, 4, 3).double()
    model[0] = copy.deepcopy(stock[0])
    assert_equal(results(model, x), results(stock, x))


def test_layers_with_two_places():
    model, x = network("sequence"), random_tensor(2, 3, 8, 8)
    model.alias = nn.Sequential(model[0])
    body = nn.Sequential(*model[:3])
    lowrank.convert(model, ["0"], HOSVD(1.0))
    stock = lowrank.revert(copy.deepcopy(model))
    assert_equal(results(body, x), results(nn.Sequential(*stock[:3]), x))
    torch.testing.assert_close(model.alias(x), stock.alias(x))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("grad", [True, False])
def test_hooks_see_and_change_what_they_do_in_the_stock_model(place, when, grad):
    model, seen = network("sequence"), []
    stock, x = copy.deepcopy(model), random_tensor(2, 3, 8, 8)

    def hook(layer, inputs, output):
        seen.append((inputs[0].detach().clone(), output.detach().clone()))
        return output * 2

    if when == "after":
        lowrank.convert(model, ["0"], HOSVD(1.0))
    for network_ in (model, stock):
        network_[place].register_forward_hook(hook)
    if when == "before":
        lowrank.convert(model, ["0"], HOSVD(1.0))
    if grad:
        assert_equal(results(model, x), results(stock, x))
    else:
        with torch.no_grad():
            torch.testing.assert_close(model(x), stock(x))
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-10, atol=1e-10)


def test_a_forward_pass_that_is_called_by_name_is_as_lean():
    model = lowrank.convert(network("bottleneck"), ["conv"], ASI(2))
    x = random_tensor(2, 3, 13, 12).requires_grad_()
    loss = lambda way: lowrank.saved_bytes(model, lambda m, b: way(m, b * 1).sum(), x)  # noqa: E731
    assert loss(lambda m, b: m.forward(b)) == loss(lambda m, b: m(b)) > 0


def test_a_block_that_is_called_from_elsewhere():
    """Another module reads a block's convolution, past the block's own code."""

    class Peeking(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.other = network("sequence"), nn.Conv2d(4, 2, 1).double()

        def forward(self, x):
            return self.block(x) + self.block[0](x), self.other(self.block[:2](x))

    stock = Peeking()
    model, x = lowrank.convert(copy.deepcopy(stock), ["block.0", "other"], HOSVD(1.0)), random_tensor(2, 3, 8, 8)
    for network_ in (stock, model):
        sum(part.square().sum() for part in network_(x)).backward()
    for (_, found), (_, expected) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_a_hook_that_stops_the_pass_leaves_nothing_behind():
    model, x = network("sequence"), random_tensor(2, 3, 8, 8)
    expected = results(model, x)
    lowrank.convert(model, ["0"], HOSVD(1.0))
    for place in range(3):
        handle = model[place].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(x)
        handle.remove()
        assert_equal(results(model, x), expected)


def test_a_frozen_layer_keeps_nothing_and_passes_the_gradient_on():
    model = network("own")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("stem", "head")))
    x = random_tensor(2, 3, 13, 12)
    expected = results(model, x)
    stock = kept(model, x)
    lowrank.convert(model, ["stem.0"], ASI(999))
    assert_equal(results(model, x), expected)
    rows = lowrank.explain(model, lambda m, b: m(b).sum(), x)
    frozen = [
        row for row in rows if row.kind in ("Conv2d", "Linear", "BatchNorm2d") and row.module not in ("stem.0", "head")
    ]
    assert frozen == []
    assert kept(model, x) < stock / 4
    model.bottleneck.conv.weight.requires_grad_(True)
    assert "bottleneck.conv.weight" in results(model, x), "a layer that is unfrozen later trains"
