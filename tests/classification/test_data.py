"""Splits, halves, order and transform of the images."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from classification.data import ImageDataModule, ImageSet, load_splits, names
from classification.data import registry as registry_of_data
from classification.data.partition import half
from classification.data.registry import Splits
from classification.data.sampler import EpochShuffle
from experiment import ExperimentError

PARTS = ("train", "val", "test")


@pytest.fixture(scope="module")
def splits():
    return load_splits("digits", Path("nowhere"))  # they come with scikit-learn


def images_with_labels(part):
    """Every image with its label, as bytes, in an order of its own."""
    return [bytes([label]) + image.tobytes() for image, label in zip(part.images, part.labels, strict=True)]


def test_the_parts_of_the_digits_are_disjoint_and_complete(splits):
    scans = load_digits()
    whole = ImageSet((scans.images * 255 / 16).round().astype(np.uint8), scans.target.astype(np.int64))
    dealt = [entry for part in PARTS for entry in images_with_labels(getattr(splits, part))]
    assert len(dealt) == 1797
    assert sorted(dealt) == sorted(images_with_labels(whole))


def test_the_parts_of_the_digits_have_the_pinned_sizes_and_content(splits):
    assert [len(getattr(splits, part).labels) for part in PARTS] == [898, 270, 629]
    digest = hashlib.sha256()
    for part in PARTS:
        digest.update(
            getattr(splits, part).labels.tobytes() + np.ascontiguousarray(getattr(splits, part).images).tobytes()
        )
    assert digest.hexdigest()[:16] == "5f2957b4793d4dd8"
    assert splits.fingerprint == "cbb72d9a625b315c"
    assert splits.classes == tuple("0123456789")


def test_the_parts_of_the_digits_have_each_class_in_proportion(splits):
    counts = np.bincount(load_digits().target)
    for part in PARTS:
        labels = getattr(splits, part).labels
        expected = counts * len(labels) / 1797
        assert np.abs(np.bincount(labels, minlength=10) - expected).max() < 1.5


def test_the_parts_are_the_same_in_every_call_whatever_the_random_state(splits):
    np.random.seed(7)  # noqa: NPY002 - the global one is meant
    again = load_splits("digits", Path("elsewhere"))
    for part in PARTS:
        assert images_with_labels(getattr(again, part)) == images_with_labels(getattr(splits, part))


def test_an_unknown_data_set_is_refused_with_the_names_that_there_are():
    with pytest.raises(ExperimentError, match=r"'mnist'; allowed: .*digits") as raised:
        ImageDataModule("mnist")
    assert all(name in str(raised.value) for name in names())


# The two halves of setup B.


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("seed", [0, 1, 233])
def test_the_halves_are_disjoint_complete_and_equal_in_size(splits, part, seed):
    labels = getattr(splits, part).labels
    first, second = half(labels, 0, seed), half(labels, 1, seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    assert abs(len(first) - len(second)) <= 2


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 233])
@pytest.mark.parametrize("user", [0, 1])
def test_a_half_has_the_same_classes_in_training_validation_and_test(splits, user, seed):
    classes = {
        part: set(labels[half(labels, user, seed)]) for part in PARTS for labels in [getattr(splits, part).labels]
    }
    assert classes["train"] == classes["val"] == classes["test"]


def test_a_half_is_two_of_four_shards_by_label():
    labels = np.array([3, 0, 1, 2] * 10)
    for user in (0, 1):
        chosen = half(labels, user, 233)
        assert sorted(np.bincount(labels[chosen], minlength=4)) == [0, 0, 10, 10]
        assert list(chosen) == sorted(chosen)


def test_the_seed_deals_the_halves_and_nothing_else_does(splits):
    labels = splits.train.labels
    np.random.seed(0)  # noqa: NPY002
    before = half(labels, 0, 233)
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(half(labels, 0, 233), before)
    assert len({half(labels, 0, seed).tobytes() for seed in range(20)}) == 6  # ways to choose two of four shards


def test_the_partitions_of_the_module_are_the_halves(splits):
    sets = {partition: ImageDataModule("digits", partition=partition) for partition in ("all", "pretrain", "finetune")}
    for part in PARTS:
        whole, first, second = (getattr(module, part).part for module in sets.values())
        assert images_with_labels(whole) == images_with_labels(getattr(splits, part))
        assert sorted(images_with_labels(first) + images_with_labels(second)) == sorted(images_with_labels(whole))
        assert set(first.labels) != set(second.labels)
    assert {module.num_classes for module in sets.values()} == {10}


def test_a_half_of_images_that_are_read_when_asked_for_is_that_of_an_array(monkeypatch, splits):
    class OnDisk:
        """Images that are no array, such as files."""

        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            assert type(index) is int
            return self.images[index]

    def lazy(root):
        parts = [ImageSet(OnDisk(getattr(splits, part).images), getattr(splits, part).labels) for part in PARTS]
        return Splits(*parts, splits.classes, "lazy")

    monkeypatch.setitem(registry_of_data.dataset.entries, "lazy", lazy)
    for partition in ("pretrain", "finetune"):
        array, files = (ImageDataModule(name, partition=partition, image_size=8) for name in ("digits", "lazy"))
        for part in PARTS:
            first, second = getattr(array, part), getattr(files, part)
            assert len(first) == len(second)
            for index in (0, len(first) // 2, len(first) - 1):
                assert torch.equal(first[index][0], second[index][0])
                assert first[index][1] == second[index][1]


# Order.


@pytest.mark.parametrize("length", [1, 2, 449])
def test_an_order_is_a_permutation_that_seed_and_epoch_alone_choose(length):
    orders = {}
    for seed in (0, 233):
        for epoch in (0, 1, 50):
            sampler = EpochShuffle(length, seed)
            sampler.set_epoch(epoch)
            torch.manual_seed(seed + epoch)
            state = torch.get_rng_state()
            orders[seed, epoch] = tuple(sampler)
            assert torch.equal(torch.get_rng_state(), state)
            torch.manual_seed(99)
            assert tuple(sampler) == orders[seed, epoch]
            assert sorted(orders[seed, epoch]) == list(range(length))
            assert len(sampler) == length
    if length > 2:
        assert len(set(orders.values())) == len(orders)


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**62, 2**63 - 1])
def test_the_order_can_come_from_every_seed_that_torch_has(seed):
    torch.manual_seed(seed)
    module = ImageDataModule("digits", image_size=8, batch_size=4)  # without a seed of its own
    _, labels = next(iter(module.train_dataloader()))
    assert len(labels) == 4


@pytest.mark.slow
def test_the_training_loader_gives_another_order_in_another_epoch():
    module = ImageDataModule("digits", image_size=8, batch_size=64, shuffle_seed=1)
    loader = module.train_dataloader()
    first = torch.cat([labels for _, labels in loader])
    loader.sampler.set_epoch(1)
    assert not torch.equal(torch.cat([labels for _, labels in loader]), first)
    loader.sampler.set_epoch(0)
    assert torch.equal(torch.cat([labels for _, labels in loader]), first)


@pytest.mark.parametrize(("drop_last", "count"), [(True, 896), (False, 898)])
def test_the_last_smaller_training_batch_is_left_out_if_asked(drop_last, count):
    module = ImageDataModule("digits", image_size=8, batch_size=64, drop_last=drop_last, shuffle_seed=1)
    assert sum(len(labels) for _, labels in module.train_dataloader()) == count


@pytest.mark.parametrize("size", [256, 64, 7])
def test_no_validation_or_test_image_is_dropped_or_moved(splits, size):
    module = ImageDataModule("digits", image_size=8, eval_batch_size=size, cache=True)
    for part, loader in (("val", module.val_dataloader()), ("test", module.test_dataloader())):
        assert torch.cat([labels for _, labels in loader]).tolist() == getattr(splits, part).labels.tolist()


def test_the_first_batch_depends_on_the_seed_alone():
    options = {"image_size": 8, "batch_size": 16}
    module = ImageDataModule("digits", shuffle_seed=5, **options)
    images, labels = module.first_batch(233)
    assert (images.shape, labels.shape) == ((16, 3, 8, 8), (16,))
    other = ImageDataModule("digits", shuffle_seed=6, cache=True, **options)
    torch.manual_seed(77)
    next(iter(module.train_dataloader()))
    for again in (module.first_batch(233), other.first_batch(233)):
        assert torch.equal(again[0], images)
        assert torch.equal(again[1], labels)
    assert not torch.equal(module.first_batch(234)[0], images)


# Transform.


def test_an_image_is_scaled_enlarged_and_normalised(splits):
    mean, std = (0.5, 0.25, 0.0), (0.5, 1.0, 2.0)
    image, label = ImageDataModule("digits", image_size=20, mean=mean, std=std).train[3]
    gray = torch.from_numpy(splits.train.images[3]).float() / 255
    larger = F.interpolate(gray[None, None], (20, 20), mode="bilinear", antialias=True)[0]
    expected = (larger - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, expected)
    assert label == splits.train.labels[3]
    assert type(label) is int


def test_cached_images_equal_those_computed_anew():
    plain, cached = (ImageDataModule("digits", image_size=12, cache=cache).val for cache in (False, True))
    for _ in range(2):
        for index in (0, 5, 269):
            assert torch.equal(plain[index][0], cached[index][0])
            assert plain[index][1] == cached[index][1]
    assert cached[5][0] is cached[5][0]


def test_a_batch_larger_than_the_training_set_is_refused_if_it_would_be_dropped():
    ImageDataModule("digits", batch_size=898)
    ImageDataModule("digits", batch_size=899, drop_last=False)
    with pytest.raises(ExperimentError, match=r"898 training samples .* 899; lower --data\.batch_size"):
        ImageDataModule("digits", batch_size=899)
    with pytest.raises(ExperimentError, match="449 training samples"):
        ImageDataModule("digits", batch_size=450, partition="finetune")
