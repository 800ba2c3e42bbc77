"""Split files of setup B: saved and read again, published ones, and those of another data set."""

import io
import re
import shutil

import numpy as np
import pytest
from commands import arguments, execute, finish, only_file
from miniatures import write_prepared

from classification.cli import main
from classification.data import load_splits
from classification.data.partition import deal, half, halved, read_users, save_users, split_fingerprint
from experiment import ExperimentError

PARTS = ("train", "val", "test")


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """CIFAR-10 in small: 32 images to train on and 8 to validate, 4 classes."""
    root = tmp_path_factory.mktemp("data")
    write_prepared("cifar10", root)
    return load_splits("cifar10", root)


def official_labels(splits):
    """Labels in the order of the official training set."""
    labels = np.zeros(len(splits.train.labels) + len(splits.val.labels), np.int64)
    labels[splits.train.positions], labels[splits.val.positions] = splits.train.labels, splits.val.labels
    return labels


def published(labels, left_out=0):
    """A split file as it is published: shards by label, in an order of their own, a row a user."""
    usable = np.argsort(labels, kind="stable")[: len(labels) - left_out]
    shards = np.array_split(usable, 4)
    rows = [np.concatenate([shards[first], shards[second]]) for first, second in ((2, 0), (1, 3))]
    random = np.random.default_rng(0)
    return np.array([[user, *random.permutation(row)] for user, row in enumerate(rows)], np.float64)


def test_what_is_saved_is_read_again(tmp_path, splits):
    users = deal(splits, 5)
    save_users(tmp_path / "split.npz", users)
    again = read_users(tmp_path / "split.npz", splits)
    for part in PARTS:
        assert np.array_equal(users[part], again[part])
        labels = getattr(splits, part).labels
        for user in (0, 1):
            chosen = half(labels, user, 5)
            assert np.array_equal(np.flatnonzero(again[part] == user), chosen)
            images = getattr(splits, part).images
            picked = getattr(halved(splits, users, user), part)
            assert np.array_equal(np.stack(list(picked.images)), np.stack([images[index] for index in chosen]))


def test_a_published_file_deals_the_official_training_images(tmp_path, splits):
    rows = published(official_labels(splits))
    np.save(tmp_path / "usr_group_1.23.npy", rows)
    users = read_users(tmp_path / "usr_group_1.23.npy", splits)
    for user in (0, 1):
        mine = halved(splits, users, user)
        positions = np.concatenate([mine.train.positions, mine.val.positions])
        assert sorted(positions) == sorted(rows[user, 1:].astype(int))
        assert np.isin(mine.val.positions, splits.val.positions).all()
    # With shards of whole classes, a user's classes agree in all parts.
    for user, classes in ((0, {0, 2}), (1, {1, 3})):
        assert [set(getattr(halved(splits, users, user), part).labels) for part in PARTS] == [classes] * 3


def test_test_images_of_a_divided_class_go_to_who_has_most_of_it(tmp_path, splits):
    labels = official_labels(splits)
    order = np.argsort(labels, kind="stable")
    swapped = order.copy()
    swapped[[0, -1]] = swapped[[-1, 0]]  # one image of class 3 for one of class 0
    np.save(tmp_path / "split.npy", np.array([[0, *swapped[:20]], [1, *swapped[20:]]], np.float64))
    users = read_users(tmp_path / "split.npy", splits)
    assert set(splits.test.labels[users["test"] == 0]) == {0, 1}
    assert set(splits.test.labels[users["test"] == 1]) == {2, 3}


def test_a_published_file_may_leave_out_what_four_equal_shards_cannot_hold(tmp_path, splits):
    labels = official_labels(splits)
    np.save(tmp_path / "split.npy", published(labels, left_out=4))
    with pytest.raises(ExperimentError, match="of another data set"):
        read_users(tmp_path / "split.npy", splits)
    np.save(tmp_path / "split.npy", published(labels, left_out=2))
    users = read_users(tmp_path / "split.npy", splits)
    assert sum((users[part] == -1).sum() for part in ("train", "val")) == 2
    assert sum(len(getattr(halved(splits, users, user), part).labels) for user in (0, 1) for part in PARTS[:2]) == 38


def test_where_validation_is_official_it_is_counted_behind_training(tmp_path):
    write_prepared("flowers102", tmp_path)
    flowers = load_splits("flowers102", tmp_path)
    labels = np.concatenate([flowers.train.labels, flowers.val.labels])
    rows = published(labels)
    np.save(tmp_path / "split.npy", rows)
    users = read_users(tmp_path / "split.npy", flowers)
    both = np.concatenate([users["train"], users["val"]])
    assert set(np.flatnonzero(both == 1)) == set(rows[1, 1:].astype(int))


def wrong(rows):
    """Published files that do not fit, by what is wrong."""
    yield "out of range", np.where(rows == rows.max(), 40, rows)
    yield "negative", np.where(rows == rows.max(), -1, rows)
    yield "twice", np.where(rows == rows.max(), rows[0, 1], rows)
    yield "a fraction", np.where(rows == rows.max(), 3.5, rows)
    yield "nan", np.where(rows == rows.max(), np.nan, rows)
    yield "three users", np.concatenate([rows, rows[:1]])
    yield "one user", rows[:1]
    yield "user 2", np.concatenate([rows[:1], np.concatenate([[[2]], rows[1:, 1:]], axis=1)])
    yield "no rows", rows[0]
    yield "shorter", rows[:, :-4]
    yield "words", rows.astype(str)


def test_a_file_of_another_data_set_is_refused(tmp_path, splits):
    path = tmp_path / "split.npy"
    rows = published(official_labels(splits))
    for kind, content in wrong(rows):
        np.save(path, content)
        with pytest.raises(ExperimentError, match=r"split file .*split\.npy is of another data set") as raised:
            read_users(path, splits)
        assert "\n" not in str(raised.value), kind
    users = deal(splits, 1)
    for part, content in (
        ("val", users["val"][:-1]),
        ("test", users["test"] + 2),
        ("train", np.zeros((2, 16), np.int8)),
    ):
        save_users(tmp_path / "split.npz", users | {part: content})
        with pytest.raises(ExperimentError, match=rf"of another data set: its part '{part}'"):
            read_users(tmp_path / "split.npz", splits)


def test_a_file_that_cannot_be_read_is_refused(tmp_path, splits):
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], object), allow_pickle=True)
    for content in (b"", b"text", b"PK\x03\x04 no archive", pickled.getvalue()):
        (tmp_path / "split").write_bytes(content)
        with pytest.raises(ExperimentError, match="cannot be read") as raised:
            read_users(tmp_path / "split", splits)
        assert "\n" not in str(raised.value)
    with pytest.raises(ExperimentError, match="cannot be read"):
        read_users(tmp_path / "nowhere.npy", splits)


def test_the_fingerprint_of_a_split_file_is_that_of_its_content(tmp_path, splits):
    users = deal(splits, 1)
    for name in ("a.npz", "b.npz"):
        save_users(tmp_path / name, users)
    save_users(tmp_path / "c.npz", deal(splits, 2))
    first, again, other = (split_fingerprint(tmp_path / name) for name in ("a.npz", "b.npz", "c.npz"))
    assert first == again != other


@pytest.mark.slow
def test_a_run_saves_its_split_and_another_run_takes_it(tmp_path, capsys):
    small = ["--model.layers", 2, "--data.partition_seed", 7]
    first = finish(arguments("fit", tmp_path / "first", *small), tmp_path / "first", capsys)
    saved = shutil.copy(first.folder / "split.npz", tmp_path / "mine.npz")
    again = arguments("fit", tmp_path / "again", "--model.layers", 2, "--data.split_file", saved)
    second = finish(again, tmp_path / "again", capsys)
    assert second.record["accuracy"] == first.record["accuracy"]
    weights, taken = (run.checkpoint("last")["state_dict"] for run in (first, second))
    assert weights.keys() == taken.keys()
    for key, value in weights.items():
        assert value.equal(taken[key]), key
    other = finish(arguments("fit", tmp_path / "other", "--model.layers", 2), tmp_path / "other", capsys)
    assert first.rows[0]["train_loss"] != other.rows[0]["train_loss"]
    # The content of the file is part of what a run is.
    assert "done already" in execute(again, capsys)
    save_users(tmp_path / "mine.npz", deal(load_splits("digits", tmp_path), 8))
    assert main(again) == 2
    assert re.search(r"other settings \(data\.split_file is", capsys.readouterr().err)


@pytest.mark.slow
def test_a_run_on_all_data_saves_no_split(tmp_path, capsys):
    options = ["--model.layers", 2, "--data.partition", "all"]
    execute(arguments("fit", tmp_path, *options), capsys)
    assert not list(tmp_path.rglob("split.npz"))
    assert only_file(tmp_path, "result.json")
