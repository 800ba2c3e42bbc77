"""Perplexity tables that were edited or damaged in any way: a right table and plan, or an error of the package."""

import json
import math

import pytest
from fuzzing import NUMBERS, SECONDS, assert_told, damaged, edited
from hypothesis import given

from lowrank import LowRankError, PerplexityTable, TableError, select_ranks

ROW = {
    "name": "blocks.1",
    "input_shape": [2, 3, 4, 4],
    "ranks": [[1, 1, 1, 1], [2, 3, 4, 4]],
    "nbytes": [4 * (1 + 2 + 3 + 4 + 4), 4 * (2 * 3 * 4 * 4 + 4 + 9 + 16 + 16)],
    "perplexity": [0.5, 0.0],
}
GOOD = {
    "schema": 1,
    "model": "mcunet",
    "batch_shape": [2, 3, 8, 8],
    "energies": [0.5, 1.0],
    "layers": [ROW, {**ROW, "name": "blocks.2"}],
}


def read(tmp_path, content):
    path = tmp_path / "perplexity.json"
    path.write_bytes(content)
    try:
        return PerplexityTable.load(path)
    except TableError as error:
        assert_told(error, path)
        return None


def assert_plans(table, budget):
    try:
        plan = select_ranks(table, budget)
    except LowRankError:
        return
    assert plan.nbytes <= budget
    assert math.isfinite(plan.perplexity)
    for layer in table.layers:
        ranks = plan.ranks[layer.name]
        assert all(1 <= rank <= size for rank, size in zip(ranks, layer.input_shape, strict=True))


@pytest.mark.slow
@SECONDS
@given(content=edited(GOOD))
def test_an_edited_table_gives_ranks_within_the_budget_or_is_refused(tmp_path, content):
    table = read(tmp_path, json.dumps(content).encode(errors="surrogatepass"))
    if table is not None:
        assert table.names == [row["name"] for row in content["layers"]]
        for budget in (56, 10_000, 0.5):
            assert_plans(table, budget)


@SECONDS
@given(content=damaged(json.dumps(GOOD).encode()))
def test_a_damaged_table_is_a_table_or_refused(tmp_path, content):
    table = read(tmp_path, content)
    if table is not None:
        assert_plans(table, 10_000)


@SECONDS
@given(budget=NUMBERS)
def test_any_number_as_a_budget_is_kept_or_refused(tmp_path, budget):
    table = read(tmp_path, json.dumps(GOOD).encode())
    if isinstance(budget, int | float) and not isinstance(budget, bool):
        assert_plans(table, budget)
    else:
        with pytest.raises(LowRankError):
            select_ranks(table, budget)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"schema": ' + b"9" * 5000 + b"}", b'{"schema": 1, "energies": [1e400]}', b"\xff\xfe", b"null"],
)
def test_what_breaks_a_parser_is_refused(tmp_path, content):
    assert read(tmp_path, content) is None
