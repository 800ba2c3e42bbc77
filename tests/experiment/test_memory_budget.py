"""A budget in MiB, or as a finished run used it, or a part of that."""

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest

from experiment import ExperimentError, Record, Run
from experiment.budget import Source, budget_bytes, budget_source, budget_tag, budget_word, check_divisor


@pytest.fixture
def run_of(tmp_path):
    """Writes the record of a run of a method and gives its folder."""

    def write(method: str) -> str:
        run = Run("segmentation", "finetune", "fcn", "voc12aug", method, 5, 233)
        Record(run, {}, {"activation_formula": 1234}, {}, {}).save(tmp_path)
        return str(tmp_path)

    return write


def test_a_budget_is_in_mib_or_what_a_run_used(run_of):
    assert budget_bytes(1.5, None) == 1.5 * 2**20
    assert budget_bytes(None, run_of("hosvd_0.8")) == 1234
    assert budget_bytes(None, run_of("hosvd_0.8"), 20) == 61.7


@pytest.mark.parametrize("of", [budget_bytes, budget_tag])
@pytest.mark.parametrize(("mib", "run"), [(None, None), (1.0, "x")])
def test_exactly_one_of_the_two_is_given(of, mib, run):
    with pytest.raises(ExperimentError, match=r"either its MiB or a run, not both: budget\.mib or budget\.run"):
        of(mib, run)


@pytest.mark.parametrize("of", [budget_bytes, budget_tag])
def test_the_run_that_gives_the_budget_has_to_be_done(of, tmp_path):
    with pytest.raises(
        ExperimentError, match=rf"is not done: there is no {tmp_path / 'x' / 'result.json'}; do it first$"
    ):
        of(None, str(tmp_path / "x"))


@pytest.mark.parametrize(("mib", "divisor"), [(1.0, 2), (None, 0)])
def test_only_a_runs_memory_is_divided(mib, divisor):
    with pytest.raises(ExperimentError, match=rf"budget\.divisor is {divisor}; allowed are whole numbers from 1"):
        check_divisor(divisor, None if mib else "x")


@pytest.mark.parametrize(
    ("method", "divisor", "tag"),
    [
        *(("hosvd_0.8", 1, "hosvd_0.8"), ("hosvd_0.8", 3, "hosvd_0.8_1of3")),
        *(("vanilla", 20, "1of20"), ("vanilla", 1, "vanilla"), ("vanilla_fused", 2, "vanilla_fused_1of2")),
    ],
)
def test_a_tag_names_the_run_and_the_part_of_it(run_of, method, divisor, tag):
    assert budget_tag(None, run_of(method), divisor) == Source(method, divisor).tag == tag


def test_a_tag_says_how_many_mib_unless_the_budget_has_a_name():
    assert budget_tag(0.5, None) == Source(mib=0.5).tag == "0.5mib"
    assert budget_tag(0.5, None, name="mine") == Source(mib=0.5, name="mine").tag == "mine"


@pytest.mark.parametrize(
    ("word", "published", "source"),
    [
        *(("published", 3.5, Source(mib=3.5, name="papers")), ("hosvd", 3.5, Source("hosvd_0.8"))),
        *(("1/22", 3.5, Source("vanilla", 22)), ("0.25mib", 3.5, Source(mib=0.25)), ("2mib", None, Source(mib=2.0))),
        *((None, 3.5, Source(mib=3.5, name="papers")), (None, None, Source("hosvd_0.8"))),
    ],
)
def test_a_word_says_whose_memory_the_budget_is(word, published, source):
    assert budget_source(word and budget_word(word), published, "here") == source


def test_a_budget_that_is_not_published_is_said():
    with pytest.raises(ExperimentError, match="no budget is published for fcn on pets; take it from HOSVD's run"):
        budget_source("published", None, "fcn on pets")


@pytest.mark.parametrize(
    "word", ["22", "1/0", "1/x", "2/3", "hosvd_0.8", "", "mib", "0mib", "0.0mib", "-1mib", "1e3mib"]
)
def test_other_words_are_refused(word):
    with pytest.raises(ArgumentTypeError, match=r"neither published nor hosvd nor such as 1/22 or 0\.5mib"):
        budget_word(word)
