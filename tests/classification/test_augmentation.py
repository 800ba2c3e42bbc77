"""Random crops: drawn by seed, epoch and image alone, the same in every process, the same when resumed."""

import re

import numpy as np
import pytest
import torch
from commands import Interruption, arguments, only_file

from classification.cli import main, run
from classification.data import ImageDataModule
from classification.data.sampler import AugmentingShuffle, EpochShuffle, drawing_from
from experiment import ExperimentError


def module(**options):
    return ImageDataModule("digits", image_size=12, batch_size=16, augment=True, **({"shuffle_seed": 3} | options))


def epoch(data, number, batches=3):
    """Images and labels of the first batches of an epoch."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    found = [batch for batch, _ in zip(loader, range(batches), strict=False)]
    return torch.cat([images for images, _ in found]), torch.cat([labels for _, labels in found])


def test_each_epoch_draws_anew_and_always_the_same():
    data = module()
    first, labels = epoch(data, 0)
    second, _ = epoch(data, 1)
    torch.manual_seed(77)
    again, same_labels = epoch(module(), 0)
    assert torch.equal(first, again)
    assert torch.equal(labels, same_labels)
    order = [list(EpochShuffle(len(data.train), 3))]
    assert not torch.equal(first, second)
    assert not torch.equal(first, epoch(module(shuffle_seed=4), 0)[0])
    plain = torch.stack([data.train[index][0] for index in order[0][:48]])
    assert not torch.equal(first, plain)


@pytest.mark.slow
def test_workers_draw_what_one_process_draws():
    data, with_workers = module(), module(workers=2)
    loader = with_workers.train_dataloader()  # its processes live from epoch to epoch
    for number in (0, 1):
        loader.sampler.set_epoch(number)
        batches = list(loader)
        images, labels = epoch(data, number)
        assert torch.equal(torch.cat([images for images, _ in batches])[:48], images)
        assert torch.equal(torch.cat([labels for _, labels in batches])[:48], labels)


def test_an_image_gets_its_crop_whatever_is_loaded_beside_it():
    data = module()
    keys = dict(AugmentingShuffle(len(data.train), 3))
    images, _ = epoch(data, 0, batches=1)
    for place, index in list(enumerate(EpochShuffle(len(data.train), 3)))[:16]:
        assert torch.equal(data.train[index, keys[index]][0], images[place])
    assert len(set(keys.values())) == len(keys)


def test_crops_are_parts_of_the_image_and_half_are_mirrored():
    data = module(mean=(0.0,) * 3, std=(1.0,) * 3)
    ramp = np.tile(np.arange(0, 256, 8, np.uint8), (32, 1))  # brighter to the right
    mirrored = []
    for seed in range(200):
        with drawing_from(seed):
            image = data.train.augmentation(ramp)
        assert image.shape == (3, 12, 12)
        assert 0 <= image.min() <= image.max() <= 1
        mirrored.append(bool(image[0, 0, 0] > image[0, 0, -1]))
    assert 70 < sum(mirrored) < 130


def test_validation_and_measurements_see_the_whole_image():
    data = module()
    plain = ImageDataModule("digits", image_size=12, batch_size=16, shuffle_seed=3)
    for loaders in ("val_dataloader", "test_dataloader"):
        ours, theirs = (next(iter(getattr(part, loaders)())) for part in (data, plain))
        assert torch.equal(ours[0], theirs[0])
    assert torch.equal(data.first_batch(5)[0], plain.first_batch(5)[0])


def test_the_global_random_state_is_not_touched():
    data = module()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    epoch(data, 0)
    torch.manual_seed(5)
    list(AugmentingShuffle(10, 1))
    with drawing_from(3):
        torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_off_unless_asked_for():
    assert not ImageDataModule("digits").augment
    assert next(iter(ImageDataModule("digits", shuffle_seed=1).train_dataloader().sampler)) in range(898)


@pytest.mark.slow
def test_it_cannot_go_with_images_that_are_kept(tmp_path, capsys):
    with pytest.raises(ExperimentError, match=r"--model\.cache_front"):
        module().precompute(lambda images: (images,))
    for options, message in (
        (["--data.cache", "true"], r"--data\.cache"),
        (["--data.cache", "false", "--model.cache_front", "true"], r"--model\.cache_front"),
    ):
        command = arguments("fit", tmp_path, "--model.layers", 2, "--data.augment", "true", *options)
        assert main(command) == 2
        printed = capsys.readouterr().err
        assert re.fullmatch(r"error: [^\n]*--data\.augment[^\n]*\n", printed)
        assert re.search(message, printed)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("augment", ["true", "false"])
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, whole, augment, workers):
    words = command(tmp_path, augment, "--data.workers", workers)
    with pytest.raises(Interruption):
        run([*words, "--trainer.callbacks+", "commands.CrashInEpoch", "--trainer.callbacks.epoch", "1"])
    assert not list(tmp_path.rglob("result.json"))
    assert main(words) == 0
    again = torch.load(only_file(tmp_path, "last.ckpt"), weights_only=True)["state_dict"]
    assert all(torch.equal(value, again[key]) for key, value in whole[augment].items())


def command(runs, augment, *options):
    settings = ("--data.augment", augment, "--data.cache", "false", "--trainer.max_epochs", 2)
    return arguments("fit", runs, *settings, "--model.layers", 2, *options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights of a run that was not interrupted, with and without crops."""
    found = {}
    for augment in ("true", "false"):
        runs = tmp_path_factory.mktemp("whole")
        assert main(command(runs, augment)) == 0
        found[augment] = torch.load(only_file(runs, "last.ckpt"), weights_only=True)["state_dict"]
    assert any(not torch.equal(value, found["false"][key]) for key, value in found["true"].items())
    return found
