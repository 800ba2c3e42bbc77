"""How many samples a limit stands for, against what is written out here."""

import pytest

from experiment import ExperimentError
from experiment.limit import check_limit, count_within


@pytest.mark.parametrize(("limit", "count"), [(1, 12), (1.0, 12), (0.25, 3), (0.5, 6), (2, 2), (12, 12), (7.0, 7)])
def test_a_number_is_a_number_and_up_to_one_a_share(limit, count):
    check_limit(limit, "limit")
    assert count_within(limit, 12, "limit") == count


@pytest.mark.parametrize("limit", [0, -1, 2.5, float("nan"), float("inf"), "3", True])
def test_what_no_data_set_could_be_cut_to_is_refused(limit):
    with pytest.raises(ExperimentError, match=f"^limit is {limit!r}; allowed are whole numbers from 1, or a share"):
        check_limit(limit, "limit")


def test_more_than_there_are_and_fewer_than_classes_are_refused():
    check_limit(None, "limit")
    for limit in (13, 3, 0.1):
        with pytest.raises(ExperimentError, match="allowed are whole numbers from the 4 classes to 12, or such"):
            count_within(limit, 12, "limit", classes=4)
