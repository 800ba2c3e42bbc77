"""The classifier's input, kept exactly as its nonzero values: the same gradients, and about half the bytes."""

from __future__ import annotations

import pytest
import torch
from segmentors import narrow_config
from torch import nn

import lowrank
from lowrank.layers.layer import LowRankLayer
from segmentation.batches import segmentation_loss, training_mode
from segmentation.classifier import Nonzero
from segmentation.compose import hook_settings
from segmentation.hook import LowRankHook


def gradients(layer, x, grad):
    x = x.detach().requires_grad_()
    layer.zero_grad()
    layer(x).backward(grad)
    return [x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize(
    ("shape", "share", "channels_last"),
    [
        *[((3, 5, 7, 9), share, False) for share in (0.0, 0.5, 0.9, 0.99, 1.0)],
        *[((3, 5, 7, 9), 0.5, True), ((1, 4, 3, 3), 0.5, False), ((3, 4, 300, 301), 0.5, False)],  # more than a piece
    ],
)
def test_gradients_and_bytes(shape, share, channels_last):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = values * (torch.rand(shape, generator=generator) < share)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    layer = nn.Conv2d(shape[1], 2, 1).double()
    grad = torch.randn(shape[0], 2, *shape[2:], generator=generator, dtype=torch.float64)
    expected = gradients(layer, x, grad)
    lowrank.convert(layer, [""], Nonzero())
    for found, exact in zip(gradients(layer, x, grad), expected, strict=True):
        torch.testing.assert_close(found, exact)
    least = -(-x.numel() // 8) + 8 * int((x != 0).sum())
    assert layer._lowrank.kept_bytes == min(least, x.nbytes)


def test_what_is_not_a_number_stays_so():
    layer = lowrank.convert(nn.Conv2d(1, 1, 1, bias=False), [""], Nonzero())
    x = torch.zeros(2, 1, 8, 8)
    x[1, 0, 3, 4] = torch.nan
    assert gradients(layer, x, torch.ones(2, 1, 8, 8))[1].isnan().all()


@pytest.mark.slow
def test_the_classifier_keeps_half_unless_a_method_was_chosen_for_it(build, batch):
    config = narrow_config("upernet")
    settings = {**hook_settings(config), "method": {"type": "ASI", "ranks": 2}}
    model = build(config)
    LowRankHook(**settings).prepare(model)
    segmentation_loss(training_mode(model), batch)
    layer = model.decode_head.conv_seg
    features = batch[0][:, 0].numel() // 16 * layer.in_channels * 8
    assert isinstance(layer._lowrank.method, Nonzero)
    assert not layer._lowrank.chosen
    assert 0.2 * features < layer._lowrank.kept_bytes < 0.7 * features
    chosen = build(config)
    LowRankHook(**{**settings, "layers": [*settings["layers"], "decode_head.conv_seg"]}).prepare(chosen)
    assert chosen.decode_head.conv_seg._lowrank.method.tag.startswith("asi")
    ordinary = build(config)
    LowRankHook(**hook_settings(config)).prepare(ordinary)
    assert not isinstance(ordinary.decode_head.conv_seg, LowRankLayer)
    lowrank.revert(model)
    assert type(model.decode_head.conv_seg) is nn.Conv2d
