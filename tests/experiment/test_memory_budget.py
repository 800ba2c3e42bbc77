"""A budget in MiB, or as a finished run used it."""

from __future__ import annotations

import pytest

from experiment import ExperimentError, Record, Run, budget_bytes


def test_a_budget_is_in_mib_or_what_a_run_used(tmp_path):
    run = Run("segmentation", "finetune", "fcn", "voc12aug", "hosvd_0.8", 5, 233)
    Record(run, {}, {"activation_formula": 1234}, {}, {}).save(tmp_path)
    assert budget_bytes(1.5, None, "budget") == 1.5 * 2**20
    assert budget_bytes(None, str(tmp_path), "budget") == 1234


@pytest.mark.parametrize(("mib", "run"), [(None, None), (1.0, "x")])
def test_exactly_one_of_the_two_is_given(mib, run):
    with pytest.raises(ExperimentError, match=r"needs either --b\.mib or --b\.run, not both"):
        budget_bytes(mib, run, "--b")
