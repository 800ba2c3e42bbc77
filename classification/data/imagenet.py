"""ImageNet (ILSVRC 2012): 1,000 classes; its official validation images are the test images here."""

from __future__ import annotations

from pathlib import Path

from scipy.io import loadmat

from classification.data.folders import image_folder
from classification.data.registry import Archive, Source, Splits, dataset, source
from experiment.archives import unpack

FOLDER = "imagenet"
MOST_BYTES = 320 * 2**30
DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def arrange(folder: Path) -> None:
    """From the unpacked archives to `train/WNID/*.JPEG` and `val/WNID/*.JPEG`."""
    for archive in sorted((folder / "train").glob("*.tar")):
        unpack(archive, archive.with_suffix(""), MOST_BYTES)
        archive.unlink()
    data = folder / DEVKIT / "data"
    synsets = loadmat(data / "meta.mat", squeeze_me=True)["synsets"]
    wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if row["num_children"] == 0}
    truth = [int(line) for line in (data / TRUTH).read_text().split()]
    for image, number in zip(sorted((folder / "val").glob("*.JPEG")), truth, strict=True):
        target = folder / "val" / wnid_of[number]
        target.mkdir(exist_ok=True)
        image.rename(target / image.name)


source("imagenet")(
    Source(
        folder=FOLDER,
        archives=(
            Archive("ILSVRC2012_img_train.tar", "md5:1d675b47d978889d74fa0da5fadfb00e", None, f"{FOLDER}/train"),
            Archive("ILSVRC2012_img_val.tar", "md5:29b22e2961454d5413ddabcf34fc5622", None, f"{FOLDER}/val"),
            Archive("ILSVRC2012_devkit_t12.tar.gz", "md5:fa75699e90414af021442c21a62c3abf", None, FOLDER),
        ),
        classes=1_000,
        train=1_281_167,
        test=50_000,
        most_bytes=MOST_BYTES,
        arrange=arrange,
        terms="download it with an account of image-net.org, or give a folder that holds train/WNID/*.JPEG and "
        "val/WNID/*.JPEG already",
    )
)


@dataset("imagenet")
def imagenet(root: Path) -> Splits:
    """Validates on 20 % of the official training images."""
    return image_folder(root / FOLDER, stratified=False, prepared=True)
