"""Tables of segmentation: mIoU and mAcc in place of test and validation, with both as published."""

from __future__ import annotations

from pathlib import Path

import pytest

from report.__main__ import main
from report.published import load_published
from report.summary import Group, summarise
from report.tables import to_csv, to_latex, to_markdown, to_terminal

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "configs" / "published"
GROUP = Group("segmentation", "finetune", "deeplabv3_mbv2", "voc12aug")


@pytest.fixture
def records(write):
    where = {"task": "segmentation", "setup": "finetune", "model": GROUP.model, "dataset": GROUP.dataset}
    accuracies = {"vanilla": (0.48, 0.62), "asi": (0.47, 0.6)}
    return [
        write(
            method,
            10,
            seed=seed,
            memory=2**20 if method == "asi" else 2**25,
            accuracy={"miou_best": miou + 0.01 * seed, "miou_last": 0.1, "macc_best": macc, "macc_last": 0.1},
            **where,
        )
        for method, (miou, macc) in accuracies.items()
        for seed in (0, 1)
    ]


def test_the_summary_goes_by_miou(records):
    reported = load_published(PUBLISHED, "segmentation")[GROUP]
    table = summarise(records, reported=reported).set_index("method")
    assert table.loc["vanilla", "miou_best_mean_percent"] == pytest.approx(48.5)
    assert table.loc["asi", "miou_best_difference_points"] == pytest.approx(-1)
    assert table.loc["asi", "equal_accuracy_times_less"] == 32
    assert (table.loc["vanilla", "reported_accuracy_percent"], table.loc["vanilla", "reported_other_percent"]) == (
        *(47.95, 61.49),
    )
    assert table.loc["asi", ["reported_accuracy_percent", "reported_other_percent"]].isna().all()


def test_every_kind_of_table_names_miou_and_macc(records):
    table = summarise(records)
    for text in (to_markdown(table, GROUP), to_csv(table), to_latex(table, GROUP), to_terminal(table, GROUP)):
        assert "miou" in text.lower()
        assert "macc" in text.lower()
        assert "validation (%)" not in text.lower()
    assert "- mIoU, mAcc: means over classes" in to_markdown(table, GROUP)


@pytest.mark.slow
def test_the_command_shows_published_numbers_beside_measured_ones(records, runs, capsys):
    assert main([str(runs)]) == 0
    folder = runs / "report" / GROUP.folder
    text = (folder / "table.md").read_text()
    row = next(line for line in text.splitlines() if "vanilla" in line)
    assert "48.0" in row  # 47.95 as published
    assert "61.5" in row
    assert (folder / "pareto.png").stat().st_size > 0


def test_all_published_segmentation_numbers_are_read():
    published = load_published(PUBLISHED, "segmentation")
    assert len(published) == 6
    assert all(len(rows) == 5 for rows in published.values())
    rows = [row for table in published.values() for row in table.values()]
    assert (min(row.accuracy for row in rows), min(row.other for row in rows)) == (27.41, 37.88)
