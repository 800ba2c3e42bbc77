"""Oxford-IIIT Pets: 37 breeds of cats and dogs (Parkhi et al., CVPR 2012)."""

from __future__ import annotations

from pathlib import Path

from classification.data.files import files_fingerprint, hold_out, image_set
from classification.data.registry import Archive, ImageSet, Source, Splits, dataset, source

FOLDER = "oxford-iiit-pet"
URL = "https://www.robots.ox.ac.uk/~vgg/data/pets/data"
LISTS = tuple(f"annotations/{name}.txt" for name in ("trainval", "test"))

source("pets")(
    Source(
        folder=FOLDER,
        archives=(
            Archive("images.tar.gz", "md5:5c4f3ee8e5d25df40f4fd59a7f44e54c", f"{URL}/images.tar.gz", FOLDER),
            Archive("annotations.tar.gz", "md5:95a8c909bbe2e81eed6a22bccdf3f68f", f"{URL}/annotations.tar.gz", FOLDER),
        ),
        classes=37,
        train=3_680,
        test=3_669,
        most_bytes=4 * 2**30,
    )
)


@dataset("pets")
def pets(root: Path) -> Splits:
    """Validates on 20 % of the official trainval list."""
    folder = root / FOLDER
    breeds: dict[int, str] = {}
    parts: list[ImageSet] = []
    for name in LISTS:
        rows = [line.split() for line in (folder / name).read_text().splitlines() if line.strip()]
        labels = [int(row[1]) - 1 for row in rows]  # counted from 1 in the file
        breeds |= {label: row[0].rpartition("_")[0] for label, row in zip(labels, rows, strict=True)}
        parts.append(image_set((folder / "images" / f"{row[0]}.jpg" for row in rows), labels))
    classes = tuple(breeds[label] for label in sorted(breeds))
    return Splits(*hold_out(parts[0]), parts[1], classes, files_fingerprint(folder, parts, LISTS))
