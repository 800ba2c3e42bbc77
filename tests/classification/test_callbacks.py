"""The epoch that is kept as the best."""

import pytest
import torch

from classification.callbacks import BestCheckpoint


@pytest.mark.parametrize(
    ("accuracies", "kept"),
    [([0.9, 0.8, 0.7], 0), ([0.7, 0.9, 0.8], 1), ([0.9, 0.9, 0.8], 1), ([0.5, 0.9, 0.9, 0.9], 3)],
)
def test_of_equally_good_epochs_the_last_is_kept(tmp_path, accuracies, kept):
    checkpoint = BestCheckpoint(tmp_path)
    chosen = None
    for epoch, accuracy in enumerate(accuracies):
        if checkpoint.check_monitor_top_k(None, torch.tensor(accuracy)):
            chosen, checkpoint.best_model_score = epoch, torch.tensor(accuracy)
    assert chosen == kept
    assert not checkpoint.check_monitor_top_k(None, None)
