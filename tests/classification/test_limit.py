"""A part of a data set: each class in proportion, always the same, and no part of another run."""

import numpy as np
import pytest
from commands import arguments, execute, only_file
from hypothesis import given
from hypothesis import strategies as st

from classification.cli import main
from classification.data import ImageDataModule
from classification.data.limit import stratified
from experiment import ExperimentError, Record


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_classes_are_kept_in_proportion(labels, data):
    labels = np.array(labels)
    kinds, there = np.unique(labels, return_counts=True)
    count = data.draw(st.integers(len(kinds), len(labels)))
    chosen = stratified(labels, count, 3)
    assert len(set(chosen)) == count
    assert list(chosen) == sorted(chosen)
    kept = np.array([(labels[chosen] == kind).sum() for kind in kinds])
    assert kept.min() >= 1
    assert (kept <= there).all()
    # Beside what is due to a class, the classes that would have got none take no more than one sample each.
    assert (np.abs(kept - count * there / len(labels)) <= len(kinds)).all()
    larger = stratified(labels, min(count + 1, len(labels)), 3)
    assert set(chosen) <= set(larger)


def digits(**options):
    return ImageDataModule("digits", image_size=8, batch_size=8, **options)


def test_samples_are_the_same_for_a_seed_and_in_proportion():
    whole = digits()
    share = 100 / len(whole.train)
    parts = [digits(limit=100), digits(limit=100), digits(limit=100, limit_seed=1), digits(limit=share)]
    chosen = [{image.tobytes() for image in data.train.part.images} for data in parts]
    assert chosen[0] == chosen[1] == chosen[3] != chosen[2]
    for data in parts:
        assert len(data.train) == 100
        assert len(data.val) == round(100 / len(whole.train) * len(whole.val))
        assert len(data.test) == len(whole.test)
        assert set(np.bincount(data.train.part.labels)) <= {9, 10, 11}
    assert len(digits(limit=1.0).train) == len(whole.train)


@pytest.mark.parametrize("limit", [9, 0, -1, 0.001, 20.5, 10**6, float("nan")])
def test_what_is_no_part_is_refused(limit):
    with pytest.raises(ExperimentError, match=r"--data\.limit is .* allowed are whole numbers from (the 10 classes|1)"):
        digits(limit=limit)


@pytest.mark.slow
def test_a_run_on_a_part_says_so_and_is_another_run(tmp_path, capsys):
    words = arguments("fit", tmp_path, "--model.layers", 1, "--data.limit", 16)
    execute(words, capsys)
    record = Record.load(only_file(tmp_path, "result.json"))
    assert record.recipe["limit"] == 16
    assert "done already" in execute(words, capsys)
    for other in (words[:-2], [*words[:-1], "24"], [*words, "--data.limit_seed", "1"]):
        assert main(other) == 2
        assert "limit" in capsys.readouterr().err
    assert main([*words[:-1], "-1"]) == 2
    assert "--data.limit is -1.0; allowed" in capsys.readouterr().err, "not that the run there has another one"
