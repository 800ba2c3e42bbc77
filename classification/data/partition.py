"""The two non-iid halves of setup B: shards by label, dealt to two users (gradient filter, CVPR 2023, sec. 4.1)."""

from __future__ import annotations

import numpy as np

USERS, SHARDS_PER_USER = 2, 2


def half(labels: np.ndarray, user: int, seed: int) -> np.ndarray:
    """Indices of one user's half.

    The samples, sorted by label, are cut into four shards of equal size, and each user is dealt two. The same seed
    deals the same shards for every part of a data set, so a user's train, validation and test labels agree.

    Args:
        labels: class numbers, shape (N,).
        user: 0 for the half that is pretrained on, 1 for the half that is fine-tuned on.
        seed: deals the shards.
    """
    shards = np.array_split(np.argsort(labels, kind="stable"), USERS * SHARDS_PER_USER)
    dealt = np.random.default_rng(seed).permutation(len(shards))[user * SHARDS_PER_USER :][:SHARDS_PER_USER]
    return np.sort(np.concatenate([shards[shard] for shard in dealt]))
