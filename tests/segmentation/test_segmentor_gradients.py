"""All six networks: at full rank, a training step with each method gives the stock network's gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.config import Config
from segmentors import NETWORKS, narrow_config

import lowrank
from lowrank.layers.swap import Changed
from segmentation.batches import segmentation_loss, training_mode
from segmentation.compose import hook_settings
from segmentation.freezing import apply_freeze_list
from segmentation.hook import LowRankHook

FULL_RANK = {
    "vanilla_fused": {"method": {"type": "Vanilla"}, "fuse": True},
    "svd": {"method": {"type": "SVD", "energy": 1.0}},
    "hosvd": {"method": {"type": "HOSVD", "energy": 1.0}},
    "asi": {"method": {"type": "ASI", "ranks": 10**6}},
    "hosvd, channels last": {"method": {"type": "HOSVD", "energy": 1.0}, "channels_last": True},
    "vanilla_fused, channels last": {"method": {"type": "Vanilla"}, "fuse": True, "channels_last": True},
}


def gradients(model, batch):
    model.zero_grad()
    loss = segmentation_loss(model, batch)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), found


def prepared(config: Config, model, **settings):
    hook = LowRankHook(**{**hook_settings(config), **settings})
    names = hook.prepare(model)
    return training_mode(model), names


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_every_method_at_full_rank_has_the_stock_gradients(network, build, batch):
    config = narrow_config(network)
    stock = build(config)
    apply_freeze_list(stock, hook_settings(config)["freeze"])
    expected_loss, expected = gradients(training_mode(stock), batch)
    assert all(gradient is not None for gradient in expected.values())
    for method, settings in FULL_RANK.items():
        model, names = prepared(config, build(config), **settings)
        loss, found = gradients(model, batch)
        torch.testing.assert_close(loss, expected_loss)
        assert found.keys() == expected.keys(), method
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9, msg=f"{method}: {name}")
        assert len(list(lowrank.converted_layers(model))) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_the_gradient_filter_has_the_networks_patches_and_every_normalisation_is_fused(network, build, batch):
    config = narrow_config(network, "gradient_filter")
    model, names = prepared(config, build(config))
    patches = {layer._lowrank.name: layer._lowrank.method.patch for layer in lowrank.converted_layers(model)}
    assert patches == hook_settings(config)["method"]["patch"]
    assert set(patches) == set(names)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(norm, Changed) for norm in norms)
    assert any(norm.weight.requires_grad for norm in norms)
    assert not [row for row in lowrank.explain(model, segmentation_loss, batch) if row.kind == "BatchNorm2d"]
    _, found = gradients(model, batch)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())


def test_the_four_branches_of_aspp_keep_their_input_once(build, batch):
    config = narrow_config("deeplabv3", "vanilla")
    model, _ = prepared(config, build(config), method={"type": "ASI", "ranks": [2, 4, 3, 3]})
    gradients(model, batch)
    branches = [layer for layer in lowrank.converted_layers(model) if "aspp_modules" in layer._lowrank.name]
    assert len(branches) == 4
    assert sum(layer._lowrank.kept_bytes > 0 for layer in branches) == 1
    formula = {layer._lowrank.formula_bytes for layer in branches}
    assert len(formula) == 1  # each is charged, as in the papers


@pytest.mark.parametrize("network", ["deeplabv3", "upernet"])
def test_kept_bytes_fall(network, build, batch):
    config = narrow_config(network)
    vanilla, _ = prepared(config, build(config))
    converted, _ = prepared(config, build(config), method={"type": "ASI", "ranks": [2, 2, 2, 2]})
    kept = [lowrank.saved_bytes(model, segmentation_loss, batch) for model in (vanilla, converted)]
    assert kept[0] > 10 * kept[1]


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_with_channels_last_all_that_is_computed_is_so_and_as_much_is_kept(network, build, batch):
    config, orders, kept = narrow_config(network), {}, []
    method = {"type": "ASI", "ranks": [2, 2, 2, 2]}

    def note(layer, given, output):
        orders[layer] = output.is_contiguous(memory_format=torch.channels_last)

    for channels_last in (False, True):
        model, _ = prepared(config, build(config), method=method, channels_last=channels_last)
        kept.append(lowrank.saved_bytes(model, segmentation_loss, batch))
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(note)
    segmentation_loss(model, batch).backward()
    assert kept[0] == kept[1]
    assert orders
    assert all(orders.values())


@pytest.mark.slow
def test_a_converted_segmentor_is_copied_and_predicts_as_before(build, batch):
    config = narrow_config("pspnet_mbv2", "hosvd_0.8")
    stock = build(config).eval()
    model, _ = prepared(config, build(config))
    with torch.no_grad():
        expected = stock(batch[0], mode="tensor")
        torch.testing.assert_close(copy.deepcopy(model).eval()(batch[0], mode="tensor"), expected)
