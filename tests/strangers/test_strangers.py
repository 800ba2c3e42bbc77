"""Models that nobody of this project wrote: exact at full rank, ordinary models, and never keeping more than stock."""

import warnings

import pytest
import torch

from benchmarks.strangers.exactness import difference, error_at_full_ranks, largest_error, problems_as_a_model
from benchmarks.strangers.saving import savings
from benchmarks.strangers.table import FAST, all_strangers

warnings.filterwarnings("ignore", module="timm|torchvision|transformers")
STRANGERS = all_strangers()
ROWS = [
    *(pytest.param(name, id=name) for name in FAST),
    *(
        pytest.param(name, id=name, marks=[pytest.mark.slow, pytest.mark.strangers])
        for name in STRANGERS
        if name not in FAST
    ),
]


@pytest.mark.parametrize("name", ROWS)
def test_exact_at_full_rank_over_two_steps_both_kinds_of_statistics_and_a_frozen_middle(name: str) -> None:
    assert largest_error(STRANGERS[name]) < 1e-8
    assert error_at_full_ranks(STRANGERS[name]) < 1e-8


@pytest.mark.parametrize("name", ROWS)
def test_state_dict_both_ways_deepcopy_pickle_and_revert(name: str) -> None:
    assert problems_as_a_model(STRANGERS[name]) == []


@pytest.mark.parametrize("name", ROWS)
def test_keeps_no_more_than_stock(name: str) -> None:
    for saving in savings(STRANGERS[name]):
        assert saving.exact <= saving.stock
        assert saving.asi <= saving.stock


def test_a_gradient_that_is_wrong_missing_or_not_a_number_is_seen() -> None:
    right = [{"output": torch.ones(2), "weight": torch.tensor([1.0, 2.0])}]
    assert difference(right, right) == 0
    assert difference(right, [{**right[0], "weight": torch.tensor([1.0, 2.1])}]) == pytest.approx(0.05)
    assert difference(right, [{"output": torch.ones(2)}]) == 1
    assert difference(right, [{**right[0], "weight": torch.tensor([1.0, float("nan")])}]) == float("inf")
