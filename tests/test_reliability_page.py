"""The page on reliability names tests that there are, and each of its faults has one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def test_every_fault_of_the_table_has_a_test() -> None:
    table = PAGE.partition("| fault | times | lost | test |\n|---|---|---|---|\n")[2].partition("\n\n")[0].splitlines()
    assert len(table) > 35
    for row in table:
        assert re.search(r"\| `tests/[\w/]+\.py::\w+` \|$", row), row
    assert len(NAMED) == len(table)
    assert len(set(NAMED)) == len(NAMED)


@pytest.mark.parametrize(("path", "name"), NAMED, ids=[name for _, name in NAMED])
def test_the_test_is_there(path: str, name: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_what_the_page_says_of_limits_is_so() -> None:
    from experiment.jobs import PAUSE
    from experiment.strict_yaml import DEEPEST, MOST_BYTES, MOST_VALUES

    assert f"looks every {PAUSE:.0f} s" in PAGE
    assert f"beyond {DEEPEST} deep" in PAGE
    assert f"more than\n{MOST_VALUES:,} values" in PAGE
    assert f"above {MOST_BYTES // 2**20} MiB" in PAGE
