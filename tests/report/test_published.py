"""Published accuracies: what is read, and every way in which a file can be wrong."""

from __future__ import annotations

import pytest

from experiment import ExperimentError
from report.published import load_published
from report.summary import Group

ENTRY = "- {setup: A, model: mcunet, dataset: pets, method: hosvd_0.8, layers: 2, accuracy: 39.2}\n"


def test_entries_go_to_their_tables(tmp_path):
    text = ENTRY + ENTRY.replace("layers: 2", "layers: all").replace("39.2}", "75, source: 'ASI, fig. 4'}")
    (tmp_path / "classification.yaml").write_text(text + ENTRY.replace("pets", "cub"))
    assert load_published(tmp_path, "classification") == {
        Group("classification", "A", "mcunet", "pets"): {(2, "hosvd_0.8"): 39.2, ("all", "hosvd_0.8"): 75.0},
        Group("classification", "A", "mcunet", "cub"): {(2, "hosvd_0.8"): 39.2},
    }


def test_no_file_and_an_empty_file(tmp_path):
    assert load_published(tmp_path, "classification") == {}
    (tmp_path / "classification.yaml").write_text("# nothing yet\n")
    assert load_published(tmp_path, "classification") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n", "must be a list"),
        ("- [1, 2\n", "cannot be read"),
        (ENTRY + "- 3\n", "entry 2: 3 is not a mapping"),
        (ENTRY.replace(", accuracy: 39.2", ""), "entry 1: lacks accuracy"),
        (ENTRY.replace("accuracy: 39.2", "accuracy: 39.2, acc: 1"), "unknown key acc"),
        (ENTRY.replace("pets", "37"), "dataset is 37, not text"),
        (ENTRY.replace("layers: 2", "layers: two"), "layers is 'two'"),
        (ENTRY.replace("39.2", "120"), "accuracy is 120"),
        (ENTRY.replace("39.2", "high"), "accuracy is 'high'"),
        (ENTRY + ENTRY, "entry 2: .* is there twice"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "classification.yaml").write_text(text)
    with pytest.raises(ExperimentError, match=message) as error:
        load_published(tmp_path, "classification")
    assert "classification.yaml" in str(error.value)
    assert "\n" not in str(error.value)
