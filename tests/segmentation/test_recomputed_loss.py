"""The loss that is computed again in the backward pass: the same values and gradients, and less kept."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from segmentors import CLASSES, narrow_config

import lowrank
from lowrank import saved_bytes
from segmentation.batches import segmentation_loss, training_mode
from segmentation.loss import RecomputedLoss, keep_loss, recompute_loss


@pytest.fixture
def model(build):
    config = narrow_config("fcn")
    config.model.decode_head.loss_decode = [
        {"type": "CrossEntropyLoss", "class_weight": [0.5, 1.0, 1.0, 1.0, 2.0], "loss_name": "loss_ce"},
        {"type": "DiceLoss", "loss_name": "loss_dice", "loss_weight": 0.3},
    ]
    return training_mode(build(config))


def values_and_gradients(model, batch):
    model.zero_grad()
    images, labels = batch
    logits = model.decode_head(model.extract_feat(images))
    logits.retain_grad()
    losses = model.decode_head.loss_by_feat(logits, samples(labels))
    (losses["loss_ce"] + 2 * losses["loss_dice"]).backward()
    return {name: value.detach() for name, value in losses.items()}, logits.grad


def samples(labels):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    return [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]


def test_values_and_gradients_are_the_same_to_the_last_bit(model, batch):
    expected, gradient = values_and_gradients(model, batch)
    recompute_loss(model)
    found, again = values_and_gradients(model, batch)
    assert found.keys() == expected.keys() == {"loss_ce", "loss_dice", "acc_seg"}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert torch.equal(gradient, again)


def test_what_the_loss_keeps_is_the_small_logits_and_a_byte_per_label(model, batch):
    logits = torch.randn(2, CLASSES, 8, 8, requires_grad=True)

    def loss(model, labels):
        return model.decode_head.loss_by_feat(2 * logits, samples(labels))["loss_ce"]

    kept = saved_bytes(model, loss, batch[1])
    recompute_loss(model)
    assert saved_bytes(model, loss, batch[1]) == batch[1].numel() + logits.nbytes < kept / 10


def test_a_head_goes_back_and_is_copied_and_pickled(model, batch):
    stock = type(model.decode_head)
    recompute_loss(model)
    recompute_loss(model)
    for head in (model.decode_head, copy.deepcopy(model.decode_head), pickle.loads(pickle.dumps(model.decode_head))):
        assert isinstance(head, RecomputedLoss)
        assert type(head).__mro__.count(RecomputedLoss) == 1
        keep_loss(head)
        assert type(head) is stock
    recompute_loss(model)
    lowrank.revert(model)
    assert type(model.decode_head) is stock


def test_mixed_precision_is_the_same_the_second_time(build, batch):
    model = training_mode(build(narrow_config("pspnet"))).float()
    small = (batch[0].float(), batch[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = []
        for _ in range(2):
            model.zero_grad()
            loss = segmentation_loss(model, small)
            with torch.autocast("cpu", enabled=False):
                loss.backward()
            gradients.append(model.decode_head.conv_seg.weight.grad.clone())
            recompute_loss(model)
    assert isinstance(model.decode_head, RecomputedLoss)
    assert torch.equal(*gradients)


def test_heads_that_draw_pixels_or_have_their_own_loss_stay_as_they_are(build):
    config = narrow_config("pspnet")
    config.model.decode_head.sampler = {"type": "OHEMPixelSampler", "thresh": 0.7, "min_kept": 10}
    model = build(config)
    recompute_loss(model)
    assert not isinstance(model.decode_head, RecomputedLoss)

    class OwnLoss(type(model.decode_head)):
        def loss_by_feat(self, seg_logits, batch_data_samples):
            return {}

    model.decode_head.sampler = None
    model.decode_head.__class__ = OwnLoss
    recompute_loss(model)
    assert isinstance(model.decode_head, BaseDecodeHead)
    assert type(model.decode_head) is OwnLoss
