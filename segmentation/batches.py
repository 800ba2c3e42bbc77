"""The batch that measurements are made on, and the loss that trains on it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from segmentation.freezing import freeze_statistics

Batch = tuple[Tensor, Tensor]


def first_batch(model: Any, dataset: Any, size: int, seed: int) -> Batch:
    """The first images of a data set as the model gets them in training: images (B, 3, H, W), labels (B, 1, H, W).

    The draws of the augmentation depend on `seed` alone; the global generators of numpy and Python are set by it.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global one is what MMSegmentation's transforms draw from
    data = model.data_preprocessor(pseudo_collate([dataset[index] for index in range(size)]), True)
    return data["inputs"], torch.stack([sample.gt_sem_seg.data for sample in data["data_samples"]])


def segmentation_loss(model: Any, batch: Batch) -> Tensor:
    """The sum of all losses of a segmentor, as it is trained."""
    images, labels = batch
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]
    loss, _ = model.parse_losses(model(images, samples, mode="loss"))
    return loss


def logits(model: Any, batch: Batch) -> Tensor:
    """Logits at the images' size, as in inference: (B, classes, H, W)."""
    images, _ = batch
    result: Tensor = model.encode_decode(images, [{"img_shape": tuple(images.shape[-2:])}] * len(images))
    return result


def training_mode(model: nn.Module) -> nn.Module:
    """The model in training mode, its normalisation with stored statistics."""
    freeze_statistics(model.train())
    return model
