"""Every data set in small, on the disk as it is published: names, folders, lists, formats and archives.

`write` writes the unpacked data set, `write_prepared` also notes that it is ready, `write_archives` writes the files
that it is published as. `official` is the entry of `prepare` for a miniature: its numbers, its checksums.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from classification.data.prepared import Mark, read
from classification.data.registry import Source, source

CLASSES, TRAIN, TEST = 4, 10, 4  # classes, and images of each
WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361")
FLOWERS_VAL = TRAIN // 2  # of the images to train on, those to validate on


def picture(number: int, label: int) -> Image.Image:
    """An image that has its class in its brightness; every seventh is a grey one, as some of the real ones are."""
    random = np.random.default_rng((number, label))
    pixels = random.integers(0, 40, (18 + number % 5, 24, 3), np.uint8) + np.uint8(50 * label)
    image = Image.fromarray(pixels)
    return image.convert("L") if number % 7 == 0 else image


def save(path: Path, number: int, label: int) -> None:
    """Write an image as JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number, label).save(path, "JPEG")


def numbered(count: int, start: int = 1) -> Iterator[tuple[int, int]]:
    """Number and class of so many images of each class, the classes in turn."""
    return ((start + number, number % CLASSES) for number in range(count * CLASSES))


def write_cifar(root: Path, folder: str, batches: dict[str, int], key: str, meta: tuple[str, str]) -> None:
    """Pickled batches of images of 32 x 32 pixels, channels first."""
    target = root / folder
    target.mkdir(parents=True)
    for seed, (name, count) in enumerate(batches.items()):
        pairs = list(numbered(count))
        random = np.random.default_rng(seed)
        content = {
            "data": np.stack([random.integers(0, 40, 3072, np.uint8) + np.uint8(50 * label) for _, label in pairs]),
            key: [label for _, label in pairs],
            "batch_label": name,
            "filenames": [f"{number}.png" for number, _ in pairs],
        }
        (target / name).write_bytes(pickle.dumps(content, protocol=2))
    (target / meta[0]).write_bytes(pickle.dumps({meta[1]: [f"class{label}" for label in range(CLASSES)]}, protocol=2))


def write_cifar10(root: Path) -> None:
    batches = {f"data_batch_{number}": TRAIN // 5 for number in range(1, 6)} | {"test_batch": TEST}
    write_cifar(root, "cifar-10-batches-py", batches, "labels", ("batches.meta", "label_names"))


def write_cifar100(root: Path) -> None:
    write_cifar(root, "cifar-100-python", {"train": TRAIN, "test": TEST}, "fine_labels", ("meta", "fine_label_names"))


def write_pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations" / "trimaps").mkdir(parents=True)
    breeds = ("Abyssinian", "american_bulldog", "Birman", "yorkshire_terrier")
    for name, count, start in (("trainval", TRAIN, 1), ("test", TEST, 100)):
        rows = []
        for number, label in sorted(numbered(count, start), key=lambda pair: pair[1]):
            stem = f"{breeds[label]}_{number}"
            save(folder / "images" / f"{stem}.jpg", number, label)
            rows.append(f"{stem} {label + 1} {1 + label % 2} {label // 2 + 1}\n")
        (folder / "annotations" / f"{name}.txt").write_text("".join(rows))
    (folder / "annotations" / "list.txt").write_text("#Image CLASS-ID SPECIES BREED ID\n")


def save_mat(path: Path, content: dict[str, np.ndarray]) -> None:
    """A MATLAB file without the date that is written to its head: equal content, equal bytes."""
    file = io.BytesIO()
    savemat(file, content)
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(116) + file.getvalue()[116:])


def write_flowers102(root: Path) -> None:
    folder = root / "flowers-102"
    pairs = list(numbered(TRAIN + TEST))
    for number, label in pairs:
        save(folder / "jpg" / f"image_{number:05d}.jpg", number, label)
    save_mat(folder / "imagelabels.mat", {"labels": np.array([[label + 1 for _, label in pairs]], np.uint8)})
    numbers = np.random.default_rng(0).permutation(TRAIN)  # the official lists are in no order either
    of_round = np.array([number for number, _ in pairs]).reshape(-1, CLASSES)
    train, val = of_round[numbers[FLOWERS_VAL:]], of_round[numbers[:FLOWERS_VAL]]
    sets = {"trnid": train, "valid": val, "tstid": of_round[TRAIN:]}
    save_mat(folder / "setid.mat", {key: value.reshape(1, -1).astype(np.uint16) for key, value in sets.items()})


def write_cub200(root: Path) -> None:
    folder = root / "CUB_200_2011"
    birds = [f"{label + 1:03d}.Bird_{label}" for label in range(CLASSES)]
    lists: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": []}
    for number, label in numbered(TRAIN + TEST):
        name = f"{birds[label]}/Bird_{label}_{number:04d}.jpg"
        save(folder / "images" / name, number, label)
        lists["images"].append(f"{number} {name}\n")
        lists["image_class_labels"].append(f"{number} {label + 1}\n")
        lists["train_test_split"].append(f"{number} {int(number <= TRAIN * CLASSES)}\n")
    lists["classes"] = [f"{label + 1} {bird}\n" for label, bird in enumerate(birds)]
    for name, rows in lists.items():
        (folder / f"{name}.txt").write_text("".join(rows))
    (root / "attributes.txt").write_text("1 has_bill_shape::curved\n")  # the archive has it beside the folder


def write_food101(root: Path) -> None:
    folder = root / "food-101"
    dishes = ("apple_pie", "baby_back_ribs", "ramen", "waffles")
    (folder / "meta").mkdir(parents=True)
    for name, count, start in (("train", TRAIN, 1), ("test", TEST, 100)):
        listed: dict[str, list[str]] = {dish: [] for dish in reversed(dishes)}
        for number, label in numbered(count, start):
            save(folder / "images" / dishes[label] / f"{number}.jpg", number, label)
            listed[dishes[label]].append(f"{dishes[label]}/{number}")
        (folder / "meta" / f"{name}.json").write_text(json.dumps(listed))
        (folder / "meta" / f"{name}.txt").write_text(
            "".join(f"{path}\n" for paths in listed.values() for path in paths)
        )
    (folder / "meta" / "classes.txt").write_text("".join(f"{dish}\n" for dish in dishes))


def write_imagenet(root: Path) -> None:
    folder = root / "imagenet"
    for number, label in numbered(TRAIN):
        save(folder / "train" / WNIDS[label] / f"{WNIDS[label]}_{number}.JPEG", number, label)
    for number, label in numbered(TEST):
        save(folder / "val" / WNIDS[label] / f"ILSVRC2012_val_{number:08d}.JPEG", 1000 + number, label)


def write_image_folder(folder: Path, parts: tuple[str, ...] = ("train", "test"), count: int = TRAIN) -> None:
    """A user's own folder of images: one folder a class, in each of the parts, or without parts."""
    for place, part in enumerate(parts or ("",)):
        for number, label in numbered(count, 1000 * place):
            save(folder / part / f"kind{label}" / f"{number}.jpg", number, label)


WRITERS = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "pets": write_pets,
    "flowers102": write_flowers102,
    "cub200": write_cub200,
    "food101": write_food101,
    "imagenet": write_imagenet,
}


def write(name: str, root: Path) -> Path:
    """Write a data set as it is when unpacked. Returns its folder."""
    WRITERS[name](root)
    return root / published(name).folder


def write_prepared(name: str, root: Path) -> Path:
    """Write a data set that `fit` takes. Returns its folder."""
    folder = write(name, root)
    Mark.of(name, root).write(read(name, root))
    return folder


def published(name: str) -> Source:
    """The entry of `prepare` for the real data set."""
    return source.find(name)


def checksum(path: Path) -> str:
    """As `prepare` compares them."""
    return f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}"


def pack(path: Path, folder: Path, names: list[str]) -> None:
    """A tar archive of files and folders, as its name says compressed or not."""
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as tar:
        for name in names:
            tar.add(folder / name, name)


def write_archives(name: str, folder: Path) -> None:
    """Write what a data set is published as."""
    root = folder / "unpacked"
    whole = write(name, root)
    packed = {
        "cifar-10-python.tar.gz": (root, ["cifar-10-batches-py"]),
        "cifar-100-python.tar.gz": (root, ["cifar-100-python"]),
        "images.tar.gz": (whole, ["images"]),
        "annotations.tar.gz": (whole, ["annotations"]),
        "102flowers.tgz": (whole, ["jpg"]),
        "CUB_200_2011.tgz": (root, ["attributes.txt", "CUB_200_2011"]),
        "food-101.tar.gz": (root, ["food-101"]),
    }
    if name == "imagenet":
        _write_imagenet_archives(folder, whole)
        return
    for archive in published(name).archives:
        if archive.unpack:
            pack(folder / archive.name, *packed[archive.name])
        else:
            (folder / archive.name).write_bytes((whole / archive.name).read_bytes())


def _write_imagenet_archives(folder: Path, whole: Path) -> None:
    """One archive a class inside an archive; images to validate on without folders; a kit that says what they are."""
    for wnid in WNIDS:
        pack(
            folder / f"{wnid}.tar",
            whole / "train" / wnid,
            sorted(path.name for path in (whole / "train" / wnid).iterdir()),
        )
    pack(folder / "ILSVRC2012_img_train.tar", folder, [f"{wnid}.tar" for wnid in WNIDS])
    for wnid in WNIDS:
        (folder / f"{wnid}.tar").unlink()
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for path in sorted((whole / "val").rglob("*.JPEG"), key=lambda path: path.name, reverse=True):
            tar.add(path, path.name)
    names = (
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    )
    synsets = np.zeros((CLASSES + 1, 1), [(name, object) for name in names])
    order = (2, 0, 3, 1)  # numbers in the kit are in another order than the names of the classes
    for place, label in enumerate(order):
        synsets[place, 0] = (place + 1, WNIDS[label], f"fish {label}", "a fish", 0, [], 0, TRAIN)
    synsets[CLASSES, 0] = (CLASSES + 1, "n00001740", "entity", "anything", CLASSES, [1, 2, 3, 4], 1, 0)
    matrix = io.BytesIO()
    savemat(matrix, {"synsets": synsets})
    truth = "".join(f"{order.index(label) + 1}\n" for _, label in numbered(TEST))
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        inside = {"meta.mat": matrix.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth.encode()}
        for name, content in inside.items():
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def official(name: str, folder: Path, address: str | None = None) -> Source:
    """What `prepare` has to know of a miniature whose archives lie in `folder` and are served at `address`."""
    real = published(name)
    archives = tuple(
        replace(
            archive,
            checksum=checksum(folder / archive.name),
            url=archive.url and address and f"{address}/{archive.name}",
        )
        for archive in real.archives
    )
    checksums = tuple((file, checksum(folder / "unpacked" / real.folder / file)) for file, _ in real.checksums)
    return replace(
        real, archives=archives, checksums=checksums, classes=CLASSES, train=CLASSES * TRAIN, test=CLASSES * TEST
    )
