"""Published accuracies: what is read, and every way in which a file can be wrong."""

from __future__ import annotations

import math

import pytest

from experiment import ExperimentError
from report.published import Point, load_curves, load_published
from report.summary import Group, Reported

PETS = Group("classification", "A", "mcunet", "pets")
ENTRY = "- {setup: A, model: mcunet, dataset: pets, method: hosvd_0.8, layers: 2, accuracy: 39.2}\n"


def test_entries_go_to_their_tables(tmp_path):
    text = ENTRY + ENTRY.replace("layers: 2", "layers: all").replace("39.2}", "75, source: 'ASI, fig. 4'}")
    (tmp_path / "classification.yaml").write_text(text + ENTRY.replace("pets", "cub"))
    found = load_published(tmp_path, "classification")
    assert {group: {key: row.accuracy for key, row in rows.items()} for group, rows in found.items()} == {
        Group("classification", "A", "mcunet", "pets"): {(2, "hosvd_0.8"): 39.2, ("all", "hosvd_0.8"): 75.0},
        Group("classification", "A", "mcunet", "cub"): {(2, "hosvd_0.8"): 39.2},
    }


def test_memory_is_in_bytes_and_what_is_not_stated_is_nan(tmp_path):
    (tmp_path / "classification.yaml").write_text(ENTRY.replace("39.2", "39.2, memory_mib: 0.5, flops: 7, note: x"))
    (reported,) = load_published(tmp_path, "classification")[PETS].values()
    assert reported == Reported(39.2, 2**19, 7)
    (tmp_path / "classification.yaml").write_text(ENTRY)
    (reported,) = load_published(tmp_path, "classification")[PETS].values()
    assert math.isnan(reported.memory_bytes)
    assert math.isnan(reported.flops)


def test_curves_have_points_of_unknown_depth(tmp_path):
    text = ENTRY.replace("39.2", "39.2, memory_mib: 1, flops: 7")
    (tmp_path / "classification_curves.yaml").write_text(2 * text.replace("layers: 2", "layers: unknown"))
    point = Point("unknown", "hosvd_0.8", Reported(39.2, 2**20, 7))
    assert load_curves(tmp_path, "classification") == {PETS: [point, point]}
    assert load_curves(tmp_path, "segmentation") == {}


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
        (ENTRY.replace("39.2", "39.2, memory_mib: -1"), "memory_mib is -1"),
        (ENTRY.replace("39.2", "39.2, flops: many"), "flops is 'many'"),
        (ENTRY.replace("layers: 2", "layers: unknown"), "layers is 'unknown'"),
        (ENTRY + ENTRY, "entry 2: .* is there twice"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "classification.yaml").write_text(text)
    with pytest.raises(ExperimentError, match=message) as error:
        load_published(tmp_path, "classification")
    assert "classification.yaml" in str(error.value)
    assert "\n" not in str(error.value)
