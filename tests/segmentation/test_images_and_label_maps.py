"""Images that their label maps would not match, and labels too high, are told before anything is trained."""

import io
import time

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmseg.registry import DATASETS
from mmseg.utils import register_all_modules
from own_configs import dataset, errors, write_data
from PIL import Image, ImageOps

from experiment import ExperimentError
from experiment.contents import content_hashes
from segmentation.cli import main
from segmentation.compose import datasets, with_naming_readers
from segmentation.data.registry import data_of
from segmentation.data.seen import Seen, look, orientation_of
from segmentation.history import _share

ORIENTATION = 0x0112


def stored(image, kind, orientation=None):
    """An image as a file has it, without loss, and with an orientation by EXIF."""
    file, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(kind, {})
    image.save(file, kind, exif=exif, **lossless)
    return file.getvalue()


def noise(size=(12, 20, 3)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, size, np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 0, *range(1, 10)])
def test_an_orientation_is_one_where_opencv_turns_the_image(kind, orientation):
    content = stored(noise(), kind, orientation)
    pixels = np.frombuffer(content, np.uint8)
    read, raw = (cv2.imdecode(pixels, flag) for flag in (cv2.IMREAD_COLOR, cv2.IMREAD_COLOR | 128))
    assert (orientation_of(content) != 1) == (read.shape != raw.shape or bool((read != raw).any()))
    if orientation in range(1, 9):
        assert orientation_of(content) == orientation


@pytest.mark.parametrize(
    "content", [b"", b"Exif", b"II*\0", b"\xff\xd8\xff\xe1\0\x08Exif\0\0", b"MM\0*\0\0\0\x08\xff\xff"]
)
def test_a_damaged_head_says_nothing(content):
    assert Seen.of(look(content)) == (1, None)


@pytest.mark.parametrize("top", [0, 1, 7, 254])
@pytest.mark.parametrize("mode", ["L", "P"])
def test_the_highest_label_is_that_of_the_pixels_but_255(mode, top):
    labels = np.minimum(np.arange(256, dtype=np.uint8), top).reshape(16, 16)
    labels[0, 0] = 255
    file = io.BytesIO()
    image = Image.fromarray(labels)
    if mode == "P":
        image.putpalette([0] * 768)
    image.save(file, "PNG")
    assert Seen.of(look(file.getvalue())) == (1, top)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Data of one's own that were written long ago, so that what is known of them is kept."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 60)
    return write_data(tmp_path / "own")


def config_of(root, classes=2, **changes):
    parts = [dataset(root, part) | changes for part in ("train", "val")]
    model = {"decode_head": {"num_classes": classes}}
    loaders = {f"{name}_dataloader": {"dataset": part} for name, part in zip(("train", "val"), parts, strict=True)}
    return Config({"model": model, **loaders})


def turn(path, orientation):
    path.write_bytes(stored(Image.open(path), "PNG", orientation))


def as_stored(config):
    for part in datasets(config):
        part["pipeline"][0]["color_type"] = "color_ignore_orientation"
    return config


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("kind", ["img", "ann"])
@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_what_is_stored_turned_is_refused_unless_images_are_read_as_stored(root, part, kind, orientation):
    data_of(config_of(root))
    path = root / kind / part / f"{part}_b.png"
    turn(path, 1)
    data_of(config_of(root))
    turn(path, orientation)
    assert data_of(as_stored(config_of(root))).fingerprint
    for _ in range(2):  # also once it is known
        with pytest.raises(
            ExperimentError, match=rf"^{path} is stored turned \(EXIF orientation {orientation}\)"
        ) as told:
            data_of(config_of(root))
    assert "\n" not in str(told.value)


def test_what_an_earlier_version_knew_of_files_hides_none_that_is_turned(root):
    turn(root / "img" / "train" / "train_b.png", 6)
    paths = sorted(root.rglob("*.png"))
    content_hashes(paths, root.parent / ".own.contents.npz")
    with pytest.raises(ExperimentError, match="stored turned"):
        data_of(config_of(root))


def test_a_reader_refuses_it_too_or_reads_the_pixels_as_they_are_stored(root):
    register_all_modules(init_default_scope=True)
    path = root / "img" / "train" / "train_a.png"
    pixels = np.asarray(Image.open(path))
    turn(path, 6)
    assert not np.array_equal(np.asarray(ImageOps.exif_transpose(Image.open(path))), pixels)
    loader = with_naming_readers(config_of(root)).train_dataloader
    with pytest.raises(ExperimentError, match=rf"^{path} is stored turned"):
        DATASETS.build(loader.dataset)[0]
    loader = with_naming_readers(as_stored(config_of(root))).train_dataloader
    read = DATASETS.build(loader.dataset)[0]["inputs"].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(read[..., ::-1], pixels)


def label(root, value, name="val_c", part="val"):
    path = root / "ann" / part / f"{name}.png"
    Image.fromarray(np.full((16, 16), value, np.uint8)).save(path)
    return path


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_label_beyond_the_classes_is_told_before_training(root, part):
    label(root, 1, f"{part}_c", part)
    data_of(config_of(root))
    label(root, 255, f"{part}_c", part)
    data_of(config_of(root))
    path = label(root, 2, f"{part}_c", part)
    data_of(config_of(root, classes=3))
    cascade = config_of(root)
    cascade.model.decode_head = [{"num_classes": 9}, {"num_classes": 2}]  # the last one predicts
    with pytest.raises(ExperimentError, match="it has the label 2; of 2 classes"):
        data_of(cascade)
    for _ in range(2):
        with pytest.raises(ExperimentError, match=rf"{path} cannot be read \(it has the label 2; of 2 classes they"):
            data_of(config_of(root))


def test_labels_are_those_that_are_trained_on(root):
    """Without the label that is ignored, and by other numbers where the config chooses some of the classes."""
    reduced = {"reduce_zero_label": True}
    for part in ("train", "val"):
        label(root, 2, f"{part}_d", part)
    label(root, 2)
    data_of(config_of(root, **reduced))
    label(root, 0)
    data_of(config_of(root, **reduced))
    label(root, 3)
    with pytest.raises(ExperimentError, match="it has the label 2; of 2 classes they end at 1"):
        data_of(config_of(root, **reduced))
    read = with_naming_readers(config_of(root, **reduced)).val_dataloader.dataset
    register_all_modules(init_default_scope=True)
    with pytest.raises(ExperimentError, match="it has the label 2; of 2 classes they end at 1"):
        DATASETS.build(read)[2]
    label(root, 2)
    data_of(config_of(root, type="CityscapesDataset", metainfo={"classes": ("road", "building")}))


def test_readers_of_ones_own_are_not_judged(root):
    turn(root / "img" / "train" / "train_b.png", 6)
    label(root, 9)
    config = config_of(root)
    for part in datasets(config):
        part["pipeline"] = [{"type": "LoadMine"}]
    assert data_of(config).fingerprint


def test_the_command_says_it_in_one_line_and_writes_nothing(own, tmp_path, capsys):
    _, words = own
    label(tmp_path / "own", 5)
    for more in (["--dry-run"], []):
        assert main(words("train", *more)) == 2
        (line,) = errors(capsys)
        assert "val_c.png cannot be read (it has the label 5" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("part", ["train", "val"])
def test_masks_of_black_and_white_are_no_label_maps_of_two_classes(own, tmp_path, capsys, part):
    content, words = own
    for path in (tmp_path / "own" / "ann" / part).iterdir():
        Image.fromarray(np.asarray(Image.open(path)) * 255).save(path)
    for more in ([], ["--dry-run"]):
        assert main(words("train", *more)) == 2
        (line,) = errors(capsys)
        assert "has another label than 0, such as " in line
        assert "but for 255, which stands for no class; of 2 classes the labels are 0 to 1, so where masks have" in line
    content["model"]["decode_head"]["num_classes"] = 1
    del content["train_dataloader"]["dataset"]["metainfo"], content["val_dataloader"]["dataset"]["metainfo"]
    other = {"train": "val", "val": "train"}[part]
    for path in (tmp_path / "own" / "ann" / other).iterdir():
        Image.fromarray(np.asarray(Image.open(path)) * 255).save(path)
    assert main(words("train", "--dry-run")) == 0


def test_a_measure_that_is_none_is_refused():
    with pytest.raises(
        ExperimentError, match=r"mIoU of the validation images is -50 %, and not from 0 to 100; look at"
    ):
        _share({"mIoU": -50.0}, "mIoU")
