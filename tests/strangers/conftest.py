"""The whole table of strangers runs when it is asked for: `pytest -m strangers`."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "strangers: one of all the models of others; chosen by -m strangers alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "strangers" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("strangers")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
