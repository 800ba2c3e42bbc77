"""The handwritten digits that come with scikit-learn: 1,797 real scans of 8 x 8 pixels, 10 classes, no download."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from classification.data.registry import ImageSet, Splits, dataset
from experiment import fingerprint

VAL_SHARE, TEST_SHARE, SPLIT_SEED = 0.15, 0.35, 233


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8), uint8, and labels (1797,), int64; every run looks at them twice."""
    scans = load_digits()
    return np.rint(scans.images * (255 / 16)).astype(np.uint8), scans.target.astype(np.int64)  # levels 0 to 16 there


@dataset("digits")
def digits(root: Path) -> Splits:
    """Half of the scans to train on, 15 % to validate, 35 % to test, each class in proportion; always the same."""
    images, labels = _scans()
    fit, test = train_test_split(np.arange(len(labels)), test_size=TEST_SHARE, stratify=labels, random_state=SPLIT_SEED)
    train, val = train_test_split(
        fit, test_size=VAL_SHARE / (1 - TEST_SHARE), stratify=labels[fit], random_state=SPLIT_SEED
    )
    parts = [ImageSet(images[np.sort(part)], labels[np.sort(part)]) for part in (train, val, test)]
    return Splits(*parts, classes=tuple(map(str, range(10))), fingerprint=fingerprint([images, labels]))
