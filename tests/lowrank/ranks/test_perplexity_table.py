"""A perplexity table on disk: it comes back as it was, and a damaged one is refused with a word."""

import json

import pytest
import torch.nn.functional as F
from references import TwoConvolutions, cross_entropy, labelled_batch

import lowrank
from lowrank import LayerPerplexity, PerplexityTable, TableError, select_ranks

NAMES = ["first", "second", "head"]
ENERGIES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@pytest.fixture
def table():
    return lowrank.measure_perplexity(TwoConvolutions(), NAMES, cross_entropy, labelled_batch(), ENERGIES)


@pytest.fixture
def content(table, tmp_path):
    table.save(tmp_path / "table.json")
    return json.loads((tmp_path / "table.json").read_text())


def test_a_table_comes_back_from_disk_as_it_was(table, tmp_path):
    table.save(tmp_path / "table.json")
    assert PerplexityTable.load(tmp_path / "table.json") == table
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_the_file_has_the_documented_layout(content):
    assert list(content) == ["schema", "model", "batch_shape", "energies", "layers"]
    assert content["schema"] == 1
    assert list(content["layers"][0]) == ["name", "input_shape", "ranks", "nbytes", "perplexity", "gradient_norm"]


class Sample:
    """A batch of a type of the user's own, in which no tensor can be seen from outside."""

    def __init__(self, x, labels):
        self.x, self.labels = x, labels


def test_a_table_measured_on_a_batch_of_any_type_comes_back_from_disk(tmp_path):
    def loss(model, sample):
        return F.cross_entropy(model(sample.x), sample.labels)

    table = lowrank.measure_perplexity(TwoConvolutions(), NAMES, loss, Sample(*labelled_batch()))
    table.save(tmp_path / "table.json")
    assert PerplexityTable.load(tmp_path / "table.json") == table


def test_saving_over_a_table_replaces_it_whole(table, tmp_path):
    target = tmp_path / "table.json"
    target.write_text("x" * 10**5)
    table.save(target)
    assert PerplexityTable.load(target) == table


def set_in(*path):
    """A damage: put the last argument at the place that the others name."""
    *place, key, value = path

    def damage(content):
        for step in place:
            content = content[step]
        content[key] = value

    return damage


def drop(*path):
    *place, key = path

    def damage(content):
        for step in place:
            content = content[step]
        del content[key]

    return damage


DAMAGES = {
    "other schema": set_in("schema", 2),
    "no schema": drop("schema"),
    "no model": drop("model"),
    "no batch shape": drop("batch_shape"),
    "no energies": drop("energies"),
    "no layers": set_in("layers", []),
    "layers of another type": set_in("layers", {"first": {}}),
    "a layer of another type": set_in("layers", 0, "first"),
    "energies not ascending": set_in("energies", 0, 0.95),
    "energy above one": set_in("energies", 5, 1.5),
    "one energy too many": lambda content: content["energies"].append(0.95),
    "a name that is a number": set_in("layers", 0, "name", 3),
    "a name twice": set_in("layers", 0, "name", "second"),
    "NaN perplexity": set_in("layers", 0, "perplexity", 0, float("nan")),
    "infinite perplexity": set_in("layers", 0, "perplexity", 0, float("inf")),
    "negative perplexity": set_in("layers", 0, "perplexity", 0, -0.1),
    "a perplexity of text": set_in("layers", 0, "perplexity", 0, "0.1"),
    "a perplexity too large for a float": set_in("layers", 0, "perplexity", 0, 10**400),
    "one perplexity too few": drop("layers", 0, "perplexity", 0),
    "one size too few": drop("layers", 0, "nbytes", 0),
    "one rank entry too few": drop("layers", 0, "ranks", 0),
    "one rank too few": drop("layers", 0, "ranks", 0, 0),
    "rank above the dimension": set_in("layers", 0, "ranks", 0, 0, 99),
    "rank of zero": set_in("layers", 0, "ranks", 0, 0, 0),
    "rank of half": set_in("layers", 0, "ranks", 0, 0, 1.5),
    "ranks that are a number": set_in("layers", 0, "ranks", 5),
    "ranks entry that is a number": set_in("layers", 0, "ranks", 0, 5),
    "ranks that are missing": drop("layers", 0, "ranks"),
    "bytes that do not fit the ranks": set_in("layers", 0, "nbytes", 0, 7),
    "bytes that are negative": set_in("layers", 0, "nbytes", 0, -4),
    "input shape missing": drop("layers", 0, "input_shape"),
    "a list in place of the table": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_refused(content, tmp_path, damage):
    path = tmp_path / "damaged.json"
    if DAMAGES[damage] is None:
        content = [content]
    else:
        DAMAGES[damage](content)
    path.write_text(json.dumps(content))
    with pytest.raises(TableError, match=r"damaged\.json"):
        PerplexityTable.load(path)


def test_a_perplexity_that_is_a_large_whole_number_is_a_number(content, tmp_path):
    set_in("layers", 0, "perplexity", 0, 2**70)(content)
    (tmp_path / "table.json").write_text(json.dumps(content))
    table = PerplexityTable.load(tmp_path / "table.json")
    assert table.layers[0].perplexity[0] == float(2**70)
    assert select_ranks(table, 1e9).perplexity < 2**70


@pytest.mark.parametrize("kept", [0, 1, 100, -3])
def test_a_truncated_file_is_refused(content, tmp_path, kept):
    path = tmp_path / "cut.json"
    path.write_text(json.dumps(content)[:kept])
    with pytest.raises(TableError, match=r"cut\.json"):
        PerplexityTable.load(path)


@pytest.mark.parametrize("raw", [b"name,rank\nfirst,3\n", b"\x80\x02}q\x00.", b"\xff\xfe\x00"])
def test_a_file_of_another_kind_is_refused(tmp_path, raw):
    path = tmp_path / "other.pkl"
    path.write_bytes(raw)
    with pytest.raises(TableError, match=r"other\.pkl"):
        PerplexityTable.load(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(TableError, match="cannot be read"):
            PerplexityTable.load(path)


def test_rows_are_chosen_by_name(table):
    assert table.only(["head", "first"]).names == ["head", "first"]
    assert table.only(name for name in ["head", "first"]).names == ["head", "first"]
    with pytest.raises(TableError, match=r"'tail'.*first, second, head"):
        table.only(["head", "tail"])


def test_rows_can_be_built_by_hand(tmp_path):
    row = LayerPerplexity("a", (4, 6), ((1, 1), (2, 3)), (4 * (1 + 10), 4 * (6 + 8 + 18)), (2.0, 1.0))
    table = PerplexityTable("Net", (4, 6), (0.5, 0.9), (row,))
    table.save(tmp_path / "a.json")
    assert PerplexityTable.load(tmp_path / "a.json") == table


def test_a_table_that_cannot_be_written_says_so_and_leaves_nothing(table, tmp_path):
    with pytest.raises(TableError, match=r"cannot be written: .*directory"):
        table.save(tmp_path)
    with pytest.raises(TableError, match=r"cannot be written: .*No such file"):
        table.save(tmp_path / "nowhere" / "table.json")
    assert not [*tmp_path.iterdir(), *tmp_path.parent.glob("*.part")]


def test_ranks_are_chosen_from_a_table_and_not_from_its_path():
    with pytest.raises(TableError, match=r"'table\.json'; allowed is a PerplexityTable"):
        select_ranks("table.json", 1000)
