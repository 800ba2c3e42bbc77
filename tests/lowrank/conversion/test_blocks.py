"""A converted network as a whole: equal to the stock one, leaner, taken back exactly, and never silently wrong."""

import copy
import pickle

import pytest
import torch
from block_cases import FULL_RANK, NETWORKS, assert_equal, convolutions, network, results
from networks import Inverted, Own, frozen_statistics, with_statistics
from references import DEVICE, random_tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import ASI, HOSVD, SVD, GradientFilter, Vanilla


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


@pytest.mark.parametrize("name", NETWORKS)
def test_no_normalisation_keeps_anything(name):
    model = network(name)
    lowrank.convert(model, convolutions(model), ASI(2), everywhere=True)
    rows = lowrank.explain(model, lambda m, x: m(x * 1).sum(), random_tensor(2, 3, 13, 12).requires_grad_())
    assert [row.module for row in rows if row.kind == "BatchNorm2d"] == []
    own = {name for name in convolutions(model) if not name.endswith("shortcut")}  # which uses what another keeps
    assert {row.module for row in rows if row.kind == "Conv2d"} == own


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


def test_state_dicts_are_exchanged_with_the_stock_network_in_both_directions():
    stock, model = network("own"), network("own")
    keys = list(stock.state_dict())
    lowrank.convert(model, convolutions(model), ASI(2))
    assert list(model.state_dict()) == keys
    x = random_tensor(2, 3, 13, 12)
    model(x).sum().backward()
    model.load_state_dict(stock.state_dict())
    torch.testing.assert_close(model.eval()(x), stock.eval()(x))
    assert list(model.state_dict()) == keys
    stock.load_state_dict(model.state_dict())


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
        with torch.autocast(DEVICE, dtype):
            y = network_(x)
        y.float().square().mean().backward()
        assert all(p.grad.dtype == torch.float32 for p in network_.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in network_.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99
