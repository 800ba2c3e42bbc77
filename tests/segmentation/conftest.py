"""Models, a batch and data sets that the tests share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

with warnings.catch_warnings():  # of parts of the packages that are not used here
    warnings.simplefilter("ignore")
    import mmseg.models  # noqa: F401

from mmengine.config import Config
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from own_configs import dataset, settings, write_config, write_data
from segmentors import CLASSES

from segmentation.batches import Batch
from segmentation.data.scenes import SETS, Scenes, write_scenes


@pytest.fixture(scope="session", autouse=True)
def _registered() -> None:
    register_all_modules(init_default_scope=True)


@pytest.fixture
def build() -> Callable[[Config], Any]:
    """Build a config's model with random weights and random statistics, the same every time, in double precision."""

    def build(config: Config) -> Any:
        torch.manual_seed(0)
        model = MODELS.build(config.model).double()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        return model

    return build


@pytest.fixture(scope="session")
def batch() -> Batch:
    """Two images (2, 3, 48, 48) and labels (2, 1, 48, 48), some of them ignored."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (2, 1, 48, 48), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return torch.randn(2, 3, 48, 48, generator=generator, dtype=torch.float64), labels


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with few and small digit scenes, both sets."""
    root = tmp_path_factory.mktemp("data")
    for name, scenes in SETS.items():
        write_scenes(root / name, Scenes(scenes.digits, train=12, val=4, size=32))
    return root


@pytest.fixture
def own(tmp_path: Path) -> tuple[dict[str, Any], Callable[..., list[str]]]:
    """A config for a data set of one's own; and a function that writes it, and gives a command for it."""
    root = write_data(tmp_path / "own")
    content = settings(dataset(root, "train"), dataset(root, "val"))

    def words(command: str = "train", *more: str) -> list[str]:
        return [command, write_config(tmp_path / "net.py", content), "--runs-dir", str(tmp_path / "runs"), *more]

    return content, words
