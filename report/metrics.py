"""The two accuracies that each task's tables show."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True)
class Metrics:
    """Accuracies of one task.

    Attributes:
        main: key in `Record.accuracy` that ratios, differences and figures go by.
        other: key of the one beside it.
        main_title, other_title: their headings.
        label, words: the main one on an axis, and inside of a sentence.
        note: what the two are.
        published: key of the one that published accuracies are to be compared with.
        published_label: that one on an axis.
    """

    main: str
    other: str
    main_title: str
    other_title: str
    label: str
    words: str
    note: str
    published: str
    published_label: str

    @property
    def mean(self) -> str:
        """Column of the main accuracy's mean."""
        return f"{self.main}_mean_percent"

    @property
    def std(self) -> str:
        """Column of its standard deviation."""
        return f"{self.main}_std_percent"

    @property
    def difference(self) -> str:
        """Column of its difference to the baseline's."""
        return f"{self.main}_difference_points"


METRICS = {
    "classification": Metrics(
        main="test",
        other="val_best",
        main_title="Test",
        other_title="Validation",
        label="Test accuracy",
        words="test accuracy",
        note="Test: accuracy on the test split, of the epoch that is best on the validation split. "
        "Validation: accuracy of that epoch on the validation split.",
        published="val_best",
        published_label="Validation accuracy",
    ),
    "segmentation": Metrics(
        main="miou_best",
        other="macc_best",
        main_title="mIoU",
        other_title="mAcc",
        label="mIoU",
        words="mIoU",
        note="mIoU, mAcc: means over classes of intersection over union and of accuracy on the validation split, each "
        "the best of the run's validations, as in the papers.",
        published="miou_best",
        published_label="mIoU",
    ),
}


def metrics_in(columns: Container[str]) -> Metrics:
    """The metrics whose columns a summary has."""
    return next(metrics for metrics in METRICS.values() if metrics.mean in columns)
