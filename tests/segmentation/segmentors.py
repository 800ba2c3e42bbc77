"""The shipped configs with few channels and few pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config

from segmentation.compose import CONFIGS, choose_depth, load_config

NETWORKS = ("pspnet", "pspnet_mbv2", "deeplabv3", "deeplabv3_mbv2", "fcn", "upernet")
CLASSES = 5


def files(network: str, data: str, stage: str, method: str) -> list[Path]:
    """The shipped configs of one run."""
    folders = {"networks": network, "data": data, "stages": stage, "methods": method}
    return [CONFIGS / folder / f"{name}.py" for folder, name in folders.items()]


def narrow(network: str) -> dict[str, Any]:
    """What makes a network a few channels wide."""
    head = {"channels": 8, "num_classes": CLASSES}
    if network.endswith("mbv2"):
        return {"model": {"backbone": {"widen_factor": 0.1}, "decode_head": {**head, "in_channels": 32}}}
    widths = [8, 16, 32, 64]
    in_channels = widths if network == "upernet" else widths[-1]
    return {
        "model": {
            "backbone": {"stem_channels": 8, "base_channels": 8},
            "decode_head": {**head, "in_channels": in_channels},
        }
    }


def narrow_config(network: str, method: str = "vanilla", layers: int | str = 10) -> Config:
    """A shipped network for VOC12Aug with few channels, and the hook of a method and depth."""
    config = load_config(files(network, "voc12aug", "finetune", method))
    config.merge_from_dict(narrow(network))
    choose_depth(config, layers)
    return config


# What makes a run on digit scenes last a second.
TINY = (
    *("--cfg-options", "model.backbone.stem_channels=8", "model.backbone.base_channels=8"),
    *("model.decode_head.in_channels=64", "model.decode_head.channels=8", "crop_size=(32,32)"),
    *("model.data_preprocessor.size=(32,32)", "train_dataloader.batch_size=2", "default_hooks.logger.interval=1"),
    *(
        "train_dataloader.dataset.dataset.pipeline.2.scale=(32,32)",
        "train_dataloader.dataset.dataset.pipeline.3.crop_size=(32,32)",
    ),
)
