"""Converted backbones as a whole: the stock network's outputs and gradients, from far fewer kept bytes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowrank
from classification.backbones import build_model
from lowrank.layers.swap import Changed

CONVOLUTIONS = {"mcunet": 42, "mobilenet_v2": 52, "resnet18": 20, "resnet34": 36}


def network(backbone):
    """In double precision, with statistics, scales and shifts as training leaves them; one scale in each layer is 0."""
    model = build_model(backbone, num_classes=7).double().train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            nn.init.normal_(layer.weight, 1, 0.3)
            nn.init.normal_(layer.bias)
            layer.weight.data[0] = 0
    return model


def results(model, images):
    model.zero_grad()
    images = images.clone().requires_grad_(True)
    torch.manual_seed(5)  # dropout
    logits = model(images)
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"logits": logits.detach(), "images": images.grad, **gradients}


@pytest.mark.slow
@pytest.mark.parametrize("backbone", CONVOLUTIONS)
def test_every_gradient_at_full_rank_is_the_stock_networks(backbone):
    model, images = network(backbone), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    names, keys = lowrank.trailing_layers(model, "all"), list(model.state_dict())
    expected = results(model, images)
    for method in (lowrank.Vanilla(), lowrank.HOSVD(1.0), lowrank.ASI(ranks=9999)):
        lowrank.convert(model, names, method)
        for key, value in results(model, images).items():
            scale = float(expected[key].abs().max())
            torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-10 * scale, msg=key)
    stock = lowrank.revert(copy.deepcopy(model))
    assert keys == list(model.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(model.state_dict())
    model.load_state_dict(stock.state_dict())
    assert all(torch.equal(value, expected[key]) for key, value in results(stock, images).items())


@pytest.mark.parametrize("backbone", CONVOLUTIONS)
def test_every_convolution_does_the_work_of_its_normalisation(backbone):
    model, batch = network(backbone), torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def kept_by_normalisations():
        rows = lowrank.explain(model, lambda model, batch: model(batch).square().mean(), batch)
        return [row.module for row in rows if row.kind == "BatchNorm2d"]

    assert len(kept_by_normalisations()) == CONVOLUTIONS[backbone]
    lowrank.convert(model, lowrank.trailing_layers(model, 2), lowrank.ASI(ranks=4))
    changed = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d) and isinstance(layer, Changed)]
    assert len(changed) == CONVOLUTIONS[backbone]
    assert kept_by_normalisations() == []


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "least"), [(2, 10), (4, 12), ("all", 20)])
@pytest.mark.parametrize("backbone", CONVOLUTIONS)
def test_far_less_is_kept(backbone, layers, least):
    """At 8 images of 96 x 96; with more pixels the ratios grow."""
    model = network(backbone).float()
    batch = (torch.randn(8, 3, 96, 96), torch.zeros(8, dtype=torch.long))
    names = lowrank.trailing_layers(model, layers)
    lowrank.freeze_before(model, names)

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    vanilla = lowrank.saved_bytes(model, loss, batch)
    lowrank.convert(model, names, lowrank.ASI(ranks=[2, 4, 2, 2]))
    assert vanilla / lowrank.saved_bytes(model, loss, batch) > least
    assert lowrank.explain(model, loss, batch).nbytes == lowrank.saved_bytes(model, loss, batch)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("backbone", CONVOLUTIONS)
def test_the_peak_of_a_training_step_is_that_of_inference(backbone, layers):
    model = network(backbone).float()
    batch = (torch.randn(8, 3, 96, 96), torch.zeros(8, dtype=torch.long))
    names = lowrank.trailing_layers(model, layers)
    lowrank.freeze_before(model, names)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)  # their gradients, whatever the batch

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    lowrank.convert(model, names, lowrank.ASI(ranks=[2, 4, 2, 2]))
    peak = lowrank.peak_bytes(model, loss, batch)
    inference = lowrank.peak_bytes(model.eval(), loss, batch, backward=False)
    assert peak <= max(1.05 * inference, inference + trained)
