"""One hypothesis profile for the folder: the same examples in every run, and no judgement of speed."""

import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "lowrank",
    deadline=None,
    derandomize=True,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("lowrank")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Layers built inside a test start from the same weights in every run and in every order."""
    torch.manual_seed(0)


@pytest.fixture
def quick_switches():
    """Threads take turns after every few instructions, so that what they share shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)
