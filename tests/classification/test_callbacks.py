"""The epoch that is kept as the best."""

from types import SimpleNamespace

import pytest
import torch

from classification.callbacks import BestCheckpoint


@pytest.mark.parametrize(
    ("accuracies", "first", "kept"),
    [
        ([0.9, 0.8, 0.7], 0, 0),
        ([0.7, 0.9, 0.8], 0, 1),
        ([0.9, 0.9, 0.8], 0, 1),
        ([0.5, 0.9, 0.9, 0.9], 0, 3),
        ([0.9, 0.8, 0.7], 1, 1),
        ([0.9, 0.9, 0.7, 0.8], 2, 3),
    ],
)
def test_of_equally_good_epochs_the_last_is_kept_and_early_ones_do_not_count(tmp_path, accuracies, first, kept):
    checkpoint = BestCheckpoint(tmp_path, first)
    chosen = None
    for epoch, accuracy in enumerate(accuracies):
        if checkpoint.check_monitor_top_k(SimpleNamespace(current_epoch=epoch), torch.tensor(accuracy)):
            chosen, checkpoint.best_model_score = epoch, torch.tensor(accuracy)
    assert chosen == kept
    assert not checkpoint.check_monitor_top_k(SimpleNamespace(current_epoch=9), None)
