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

from experiment import ExperimentError
from segmentation.freezing import freeze_statistics

Batch = tuple[Tensor, Tensor]


def first_batch(model: Any, dataset: Any, size: int, seed: int) -> Batch:
    """The first of `first_batches`."""
    return first_batches(model, dataset, size, seed, 1)[0]


def first_batches(model: Any, dataset: Any, size: int, seed: int, count: int) -> list[Batch]:
    """The first images of a data set as the model gets them in training: images (B, 3, H, W), labels (B, 1, H, W).

    The draws of the augmentation depend on `seed` alone; the global generators of numpy and Python are set by it. One
    batch of more images than there are has some twice, as in training.

    Raises:
        ExperimentError: the images do not fill so many batches.
    """
    if count < 1 or (count > 1 and count * size > len(dataset)):
        most = max(1, len(dataset) // size)
        raise ExperimentError(f"--batches is {count}; of {size} of {len(dataset)} images there are from 1 to {most}")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global one is what MMSegmentation's transforms draw from
    batches = []
    for first in range(0, count * size, size):
        samples = pseudo_collate([dataset[index % len(dataset)] for index in range(first, first + size)])
        data = model.data_preprocessor(samples, True)
        batches.append((data["inputs"], torch.stack([sample.gt_sem_seg.data for sample in data["data_samples"]])))
    return batches


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
