"""The benchmark of compiled training: what it says of bytes is so, and it goes on where it stopped."""

import pandas as pd
import pytest

from benchmarks import compiled


@pytest.mark.slow
def test_rows_of_compiled_training(tmp_path, capsys):
    table = tmp_path / "compiled.csv"
    arguments = ["--networks", "resnet18", "--layers", "2", "--statistics", "frozen", "--budget", "1"]
    arguments += ["--batch", "4", "--size", "64", "--rounds", "1"]
    arguments += ["--backend", "aot_eager_decomp_partition", "--out", str(table)]
    compiled.main(arguments)
    frame = pd.read_csv(table).set_index("way")
    assert set(frame.index) == set(compiled.WAYS)
    assert frame.kept_bytes["vanilla"] == frame.kept_bytes["vanilla again"]
    assert frame.kept_bytes["asi"] < frame.kept_bytes["vanilla_fused"] < frame.kept_bytes["vanilla"]
    assert frame.eager_kept_bytes["asi"] < frame.eager_kept_bytes["vanilla"]
    assert frame.step_over_vanilla["vanilla"] == 1
    assert (frame.first_step_s > 0).all()
    assert "| resnet18 |" in table.with_suffix(".md").read_text()
    capsys.readouterr()
    compiled.main(arguments)
    assert not capsys.readouterr().out  # nothing is measured again
