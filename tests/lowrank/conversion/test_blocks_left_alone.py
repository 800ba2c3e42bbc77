"""What is not proven equal is left alone and reported; frozen layers, and inputs of several layers."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from block_cases import assert_equal, convolutions, kept, network, results
from networks import frozen_statistics, with_statistics
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, ConversionError
from lowrank.conversion.fusion import find_blocks


class ReadTwice(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return self[1](y) + y


class Twice(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](self[1](self[0](x))))


class ByValue(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x)) if x.sum() > 0 else self[0](x)


class OnlyInTraining(nn.Sequential):
    def forward(self, x):
        y = self[0](x)
        return self[1](y) if self.training else y


class NormFirst(nn.Sequential):
    def forward(self, x):
        return self[0](self[1](x))


class Functional(nn.Sequential):
    def forward(self, x):
        return self[1](F.relu(self[0](x)))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ReadTwice, "read by something else"),
        (Twice, "called more than once|not the output of a layer"),
        (ByValue, "cannot be traced"),
        (OnlyInTraining, "another path in training"),
        (NormFirst, "not the output of a layer"),
        (Functional, "not the output of a layer"),
    ],
)
def test_what_is_not_proven_is_left_alone_and_reported(kind, reason):
    model = with_statistics(kind(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)))
    model = frozen_statistics(model).double()
    x = random_tensor(2, 3, 8, 8).abs()
    expected = results(model, x)
    lowrank.convert(model, ["0"], ASI(999))
    assert not model[1].included
    assert_equal(results(model, x), expected)
    assert re.search(reason, find_blocks(model).left["1"])
    assert re.search(reason, str(lowrank.explain(model, lambda m, b: m(b).sum(), x)))


@pytest.mark.parametrize("place", [0, 1])
def test_layers_with_hooks_are_left_alone(place):
    model = network("sequence")
    seen = []
    model[place].register_forward_hook(lambda layer, inputs, output: seen.append(output.detach()))
    x = random_tensor(2, 3, 8, 8)
    model(x)
    lowrank.convert(model, ["0"], ASI(2))
    model(x)
    torch.testing.assert_close(*seen)
    assert "hooks" in find_blocks(model).left["1"]


def test_layers_with_two_places_are_left_alone():
    model = network("sequence")
    model.alias = nn.Sequential(model[0])
    lowrank.convert(model[:3], ["0"], ASI(2))
    assert "two places" in find_blocks(model).left["1"]


def test_a_replaced_normalisation_is_noticed():
    model, x = network("sequence"), random_tensor(2, 3, 8, 8)
    lowrank.convert(model, ["0"], ASI(2))
    model[1] = nn.Identity()
    model(x)
    with pytest.raises(ConversionError, match=r"'0'.*was not called.*revert"):
        model(x)


def test_a_normalisation_without_its_convolution_is_noticed():
    model, x = network("sequence"), random_tensor(2, 3, 8, 8)
    lowrank.convert(model, ["0"], ASI(2))
    model[0] = nn.Conv2d(3, 4, 3).double()
    with pytest.raises(ConversionError, match="without the convolution"):
        model(x)


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


@pytest.mark.parametrize("affine", [False, True])
def test_a_lone_normalisation_with_a_frozen_scale_keeps_that_alone(affine):
    """As in networks that normalise ahead of each convolution."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish(), nn.BatchNorm2d(4, affine=affine), nn.Conv2d(4, 2, 3))
    model = frozen_statistics(with_statistics(model)).double()
    if affine:
        model[2].weight.requires_grad_(False)
    x = random_tensor(2, 3, 9, 8)
    expected = results(model, x)
    lowrank.convert(model, ["0", "3"], ASI(999))
    assert_equal(results(model, x), expected)
    kept_of = {row.module: row.nbytes for row in lowrank.explain(model, lambda m, b: m(b).sum(), x)}
    assert kept_of["2"] == 4 * 8, "one number per channel"
    model.train()
    stock = lowrank.revert(copy.deepcopy(model))
    assert_equal(results(model, x), results(stock, x))


def test_an_input_of_two_layers_is_kept_once():
    model = network("bottleneck")
    x = random_tensor(2, 3, 13, 12)
    names = ["reduce", "shortcut"]
    for method in (ASI((2, 2, 3, 3)), HOSVD(0.8), SVD(0.8)):
        lowrank.convert(model, names, method)
        found = results(model, x)
        layers = [model.get_submodule(name) for name in names]
        assert [layer.kept_bytes > 0 for layer in layers] == [True, False]
        assert layers[0].formula_bytes == layers[1].formula_bytes > 0, "by the papers' formula each counts"
        for name in names:
            assert found[f"{name}.weight"].abs().sum() > 0


def test_a_layer_uses_what_is_kept_at_larger_ranks_but_not_at_smaller_ones():
    model, x = network("bottleneck"), random_tensor(2, 3, 13, 12)
    for first, second, shared in (((2, 3, 4, 4), (1, 2, 4, 4), True), ((1, 2, 4, 4), (2, 3, 4, 4), False)):
        lowrank.convert(model, ["reduce", "shortcut"], ASI({"reduce": first, "shortcut": second}))
        model(x)
        assert (model.shortcut.kept_bytes == 0) == shared


def test_an_input_that_changed_in_between_is_not_shared():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            x = x * 1
            y = self.first(x)
            return y + self.second(x.mul_(2))

    model, x = Changing().double(), random_tensor(2, 3, 5, 4)
    x[:, 1] = x[:, 0]  # so that the exact core is a tensor of its own
    lowrank.convert(model, ["first", "second"], HOSVD(1.0))
    y = model(x)
    grad = random_tensor(*y.shape, seed=2)
    y.backward(grad)
    for layer, scale in ((model.first, 1), (model.second, 2)):
        expected = torch.einsum("bohw,bihw->oi", grad, scale * x)
        torch.testing.assert_close(layer.weight.grad[:, :, 0, 0], expected)


def test_sharing_holds_nothing_alive():
    from lowrank.layers.shared_inputs import SHARED_INPUTS

    model, x = network("bottleneck"), random_tensor(2, 3, 13, 12)
    lowrank.convert(model, convolutions(model), ASI(2))
    SHARED_INPUTS._entries.clear()
    y = model(x)
    cores = [references[0] for *_, references in SHARED_INPUTS._entries.values()]  # factors live on as the bases of ASI
    assert any(core() is not None for core in cores)
    y.sum().backward()
    del y
    assert all(core() is None for core in cores)


def test_perplexity_of_a_fused_network_is_the_stock_networks():
    model, batch = network("own"), random_tensor(2, 3, 13, 12)
    names = convolutions(model)[-3:]
    model.eval()
    loss = lambda m, b: m(b).square().sum()  # noqa: E731
    expected = lowrank.measure_perplexity(model, names, loss, batch)
    found = lowrank.measure_perplexity(lowrank.convert(model, names, ASI(2)), names, loss, batch)
    for row, reference in zip(found.layers, expected.layers, strict=True):
        assert row.ranks == reference.ranks
        assert row.perplexity == pytest.approx(reference.perplexity, rel=1e-8, abs=1e-9)
    assert type(model.bottleneck.norm1) is not nn.BatchNorm2d
