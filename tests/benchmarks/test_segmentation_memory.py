"""The benchmark of segmentation: rows add up, are not measured twice, and ASI keeps less."""

from __future__ import annotations

import pandas as pd
import pytest

from benchmarks import segmentation


@pytest.mark.slow
def test_a_row_is_measured_once_and_written_in_both_forms(tmp_path, capsys):
    arguments = ["--networks", "deeplabv3_mbv2", "--layers", "5", "--size", "64", "--output", str(tmp_path)]
    assert segmentation.main(arguments) == 0
    (row,) = pd.read_csv(tmp_path / "segmentation_memory.csv").to_dict("records")
    assert row["vanilla_bytes"] > row["vanilla_fused_bytes"] > row["asi_bytes"] > 0
    times = f"{row['vanilla_bytes'] / row['asi_bytes']:.1f}"
    assert times in (tmp_path / "segmentation_memory.md").read_text()
    capsys.readouterr()
    assert segmentation.main(arguments) == 0
    assert capsys.readouterr().out == ""
