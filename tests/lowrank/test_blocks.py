"""A converted network as a whole: equal to the stock one, leaner, taken back exactly, and never silently wrong."""

import copy
import pickle
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from networks import Bottleneck, Inverted, Own, frozen_statistics, with_statistics
from references import random_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import ASI, HOSVD, SVD, ConversionError, GradientFilter, Vanilla
from lowrank.blocks import find_blocks

FULL_RANK = [Vanilla(), SVD(1.0), HOSVD(1.0), ASI(999), ASI(999, algorithm="published")]
NETWORKS = {
    "own": Own,
    "inverted": partial(Inverted, 3, 8),
    "bottleneck": partial(Bottleneck, 3, 4, 6),
    "sequence": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
    "loop": lambda: Loop(),
}


class Loop(nn.Module):
    """Code that reads its list of layers in a loop."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def network(name, **options):
    return frozen_statistics(with_statistics(NETWORKS[name](), **options)).double()


def results(model, x, seed=5):
    """Output and every gradient, the input's included, for a random upstream gradient."""
    model.zero_grad()
    leaf = x.clone().requires_grad_(True)
    torch.manual_seed(seed)
    y = model(leaf * 1)
    y.backward(random_tensor(*y.shape, seed=2))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": leaf.grad, **gradients}


def assert_equal(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def kept(model, x):
    return lowrank.saved_bytes(model, lambda m, b: (m(b) * torch.ones_like(m(b)[:1])).sum(), x)


def convolutions(model):
    return lowrank.trailing_layers(model, "all")


@pytest.mark.parametrize("method", FULL_RANK, ids=repr)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_gradient_of_the_whole_network_is_the_stock_ones(name, method):
    model, x = network(name), random_tensor(2, 3, 13, 12)
    expected = results(model, x)
    lowrank.convert(model, convolutions(model), method)
    assert_equal(results(model, x), expected)
    torch.testing.assert_close(model.eval()(x), lowrank.revert(copy.deepcopy(model))(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_with_batch_statistics_it_is_the_stock_network_too(name):
    model, x = network(name).train(), random_tensor(4, 3, 13, 12)
    stock = copy.deepcopy(model)
    expected = results(stock, x)
    lowrank.convert(model, convolutions(model), ASI(999))
    assert_equal(results(model, x), expected)
    assert_equal(dict(model.named_buffers()), {**dict(model.named_buffers()), **dict(stock.named_buffers())})


def test_the_mode_may_change_between_steps():
    model, x = network("own"), random_tensor(4, 3, 13, 12)
    stock = copy.deepcopy(model)
    lowrank.convert(model, convolutions(model), ASI(999))
    for mode in (nn.Module.train, frozen_statistics, nn.Module.eval, nn.Module.train):
        mode(stock), mode(model)
        assert_equal(results(model, x), results(stock, x))


def test_of_every_convolution_that_can_include_its_norm():
    assert find_blocks(Inverted(3, 8)).runs == {"body.0": "body.1", "body.3": "body.4", "body.6": "body.7"}
    found = find_blocks(Own())
    assert len(found.runs) == 8
    assert found.left == {}
    assert found.functional
    assert not find_blocks(nn.Sequential(Inverted(3, 8), nn.ReLU())).functional


@pytest.mark.parametrize("method", [Vanilla(), SVD(0.8), HOSVD(0.8), ASI(2), GradientFilter(2)], ids=repr)
def test_a_truncated_gradient_is_the_one_of_separate_layers_but_for_the_scales(method):
    model, x = network("own", zero_scale=False), random_tensor(3, 3, 13, 12)
    apart = lowrank.convert(copy.deepcopy(model), convolutions(model), method, fuse=False)
    found, expected = results(lowrank.convert(model, convolutions(model), method), x), results(apart, x)
    scales = {f"{n}.weight" for n, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    assert_equal(*({k: v for k, v in values.items() if k not in scales} for values in (found, expected)))


def test_the_gradient_of_a_scale_follows_from_the_truncated_weight_gradient():
    """Independently: scale and weight enter as gamma W, so gamma dgamma is <W, dW>, less the part of the mean."""
    model = frozen_statistics(with_statistics(NETWORKS["sequence"](), zero_scale=False)).double()
    conv, norm, _ = lowrank.convert(model, ["0"], ASI(2))
    found = results(model, random_tensor(3, 3, 9, 8))
    product = (conv.weight * found["0.weight"]).flatten(1).sum(1)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    expected = (product - norm.running_mean * scale * found["1.bias"]) / norm.weight
    torch.testing.assert_close(found["1.weight"], expected)


def test_what_is_kept_is_the_compressed_input_and_bits():
    model = frozen_statistics(NETWORKS["sequence"]())
    lowrank.convert(model, ["0"], ASI((1, 2, 2, 2)))
    loss = lowrank.explain(model, lambda m, b: m(b).sum(), torch.randn(2, 3, 9, 8))
    compressed = 4 * (1 * 2 * 2 * 2 + 2 * 1 + 3 * 2 + 9 * 2 + 8 * 2)
    assert {row.module: row.nbytes for row in loss} == {"0": compressed, "2": 2 * 4 * 7 * 6 // 8}


def test_fuse_false_changes_the_named_layers_alone():
    model = network("own")
    classes = {name: type(layer) for name, layer in model.named_modules()}
    lowrank.convert(model, ["bottleneck.conv"], ASI(2), fuse=False)
    assert {name for name, layer in model.named_modules() if type(layer) is not classes[name]} == {"bottleneck.conv"}


@pytest.mark.parametrize("name", NETWORKS)
def test_revert_gives_the_very_same_network_back(name):
    model, x = network(name), random_tensor(2, 3, 13, 12)
    layers = [(layer, type(layer), set(vars(layer))) for layer in model.modules()]
    expected = results(model, x)
    lowrank.convert(model, convolutions(model), ASI(3))
    model(x)
    lowrank.revert(model)
    assert [(layer, type(layer), set(vars(layer))) for layer in model.modules()] == layers
    found = results(model, x)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_state_dicts_are_exchanged_with_the_stock_network_in_both_directions():
    stock, model = network("own"), network("own")
    keys = list(stock.state_dict())
    lowrank.convert(model, convolutions(model), ASI(2))
    assert list(model.state_dict()) == keys
    x = random_tensor(2, 3, 13, 12)
    model(x).sum().backward()
    model.load_state_dict(stock.state_dict())
    torch.testing.assert_close(model.eval()(x), stock.eval()(x))
    stock.load_state_dict(lowrank.stock_state_dict(model.state_dict()))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: copy.deepcopy(copy.deepcopy(m))]
)
def test_a_copy_is_a_network_of_its_own(copied):
    model, x = network("own"), random_tensor(2, 3, 13, 12)
    lowrank.convert(model, convolutions(model), ASI(999))
    model(x)
    twin = copied(model)
    expected = results(model, x)
    assert_equal(results(twin, x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert_equal(results(model, x), expected)
    lowrank.revert(twin)
    assert type(twin) is Own
    assert_equal(results(model, x), expected)


def test_an_interrupted_step_does_not_spoil_the_next():
    model, x = network("own"), random_tensor(2, 3, 13, 12)
    expected = results(model, x)
    lowrank.convert(model, convolutions(model), HOSVD(1.0))
    with pytest.raises(lowrank.NonFiniteError):
        model(x * float("nan"))
    with pytest.raises(RuntimeError):
        model(random_tensor(2, 4, 13, 12))
    assert_equal(results(model, x), expected)


def test_checkpointing_gives_the_same_gradients():
    model, x = network("own"), random_tensor(2, 3, 13, 12)
    expected = results(model, x)
    lowrank.convert(model, convolutions(model), ASI(999))
    for reentrant in (True, False):
        model.zero_grad()
        leaf = x.clone().requires_grad_(True)
        torch.manual_seed(5)
        y = checkpoint(model, leaf * 1, use_reentrant=reentrant)
        y.backward(random_tensor(*y.shape, seed=2))
        found = {n: p.grad for n, p in model.named_parameters()}
        assert_equal(found, {n: g for n, g in expected.items() if n in found})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    model = frozen_statistics(with_statistics(Inverted(3, 8)))
    x = random_tensor(2, 3, 9, 8).float()
    stock = copy.deepcopy(model)
    lowrank.convert(model, convolutions(model), ASI(999))
    gradients = []
    for network_ in (stock, model):
        with torch.autocast("cpu", dtype):
            y = network_(x)
        y.float().square().mean().backward()
        assert all(p.grad.dtype == torch.float32 for p in network_.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in network_.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


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
    from lowrank.sharing import SHARED_INPUTS

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
