"""Where tensors are made, and threads that take turns.

With `--device cuda` every tensor and layer of a test is made on the GPU; what has no meaning there is skipped.
"""

import sys

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests of lowrank make tensors, such as cuda")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_only(reason): has no meaning on another device")
    if config.getoption("--device", "cpu") == "cpu":
        return
    torch.set_default_device(config.getoption("--device"))
    # To the precision and in the order of the CPU, as far as the GPU can.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device", "cpu") == "cpu":
        return
    for item in items:
        mark = item.get_closest_marker("cpu_only")
        if mark is not None:
            item.add_marker(pytest.mark.skip(reason=f"on the CPU alone: {mark.args[0]}"))


@pytest.fixture
def quick_switches():
    """Threads take turns after every few instructions, so that what they share shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)
