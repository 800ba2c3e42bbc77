"""A budget in MiB, or as a finished run used it, or a part of that."""

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest

from experiment import ExperimentError, Record, Run, budget_bytes
from experiment.budget import budget_source, budget_word, check_divisor


def test_a_budget_is_in_mib_or_what_a_run_used(tmp_path):
    run = Run("segmentation", "finetune", "fcn", "voc12aug", "hosvd_0.8", 5, 233)
    Record(run, {}, {"activation_formula": 1234}, {}, {}).save(tmp_path)
    assert budget_bytes(1.5, None, "budget") == 1.5 * 2**20
    assert budget_bytes(None, str(tmp_path), "budget") == 1234
    assert budget_bytes(None, str(tmp_path), "budget", 20) == 61.7


@pytest.mark.parametrize(("mib", "run"), [(None, None), (1.0, "x")])
def test_exactly_one_of_the_two_is_given(mib, run):
    with pytest.raises(ExperimentError, match=r"needs either --b\.mib or --b\.run, not both"):
        budget_bytes(mib, run, "--b")


@pytest.mark.parametrize(("mib", "divisor"), [(1.0, 2), (None, 0)])
def test_only_a_runs_memory_is_divided(mib, divisor):
    with pytest.raises(ExperimentError, match=rf"--b\.divisor is {divisor}; allowed are whole numbers from 1"):
        check_divisor(divisor, None if mib else "x", "--b")


@pytest.mark.parametrize(
    ("word", "published", "source"),
    [
        *(("published", True, (None, 1)), ("hosvd", True, ("hosvd_0.8", 1)), ("1/22", True, ("vanilla", 22))),
        *((None, True, (None, 1)), (None, False, ("hosvd_0.8", 1))),
    ],
)
def test_a_word_says_whose_memory_the_budget_is(word, published, source):
    assert budget_source(word and budget_word(word), published) == source


@pytest.mark.parametrize("word", ["22", "1/0", "1/x", "2/3", "hosvd_0.8", ""])
def test_other_words_are_refused(word):
    with pytest.raises(ArgumentTypeError, match="neither published nor hosvd nor such as 1/22"):
        budget_word(word)
