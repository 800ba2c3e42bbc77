"""A part of a data set, for a quick look: fewer samples to train and to validate on, each class in proportion."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from classification.data.registry import Splits
from experiment.limit import count_within


def limited(splits: Splits, limit: float, seed: int) -> Splits:
    """Fewer samples to train on, and as large a share of those to validate on; the test samples stay as they are.

    Args:
        splits: the data set, or the part of it that a run has.
        limit: above 1 the number of samples to train on, else the share of them.
        seed: of the draw. The samples of a smaller limit are among those of a larger one.

    Raises:
        ExperimentError: fewer samples than classes, more than there are, or no whole number.
    """
    labels = splits.train.labels
    count = count_within(limit, len(labels), "--data.limit", len(np.unique(labels)))
    kept = max(1, round(count / len(labels) * len(splits.val.labels)))
    return replace(
        splits,
        train=splits.train.pick(stratified(labels, count, seed)),
        val=splits.val.pick(stratified(splits.val.labels, kept, seed)),
    )


def stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Ascending places of `count` of the labels (N,), every class in proportion, and each once before any twice over.

    Of every class, in an order drawn by the seed, the first is taken before all others, and the i-th of n stands at
    (i + 1/2) / n.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    stands = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        stands[members] = (np.arange(len(members)) + 0.5) / len(members)
        stands[members[0]] = 0.0
    return np.sort(order[np.argsort(stands[order], kind="stable")][:count])
