"""A data set and a config as someone has them who does not use the suite's own, small enough to train in a second."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("a", "b", "c", "d")


def write_data(folder: Path, names: tuple[str, ...] = NAMES, suffix: str = ".png") -> Path:
    """Images and label maps of a training and a validation part, with lists of their names."""
    drawn = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("img", "ann"):
            (folder / kind / part).mkdir(parents=True)
        listed = [f"{part} {name}" if " " in name else f"{part}_{name}" for name in names]
        for name in listed:
            image = drawn.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / "img" / part / f"{name}.png")
            Image.fromarray(image[..., 0] // 128).save(folder / "ann" / part / f"{name}{suffix}")
        (folder / f"{part}.txt").write_text("".join(f"{name}\n" for name in listed))
    return folder


def dataset(folder: Path, part: str, suffix: str = ".png", listed: bool = True, rooted: bool = True) -> dict[str, Any]:
    """The config of a part of that data set: by its list of names or without, by its `data_root` or by full paths."""
    data: dict[str, Any] = {
        "type": "BaseSegDataset",
        "metainfo": {"classes": ("ground", "thing"), "palette": [[0, 0, 0], [255, 255, 255]]},
        "data_prefix": {"img_path": f"img/{part}", "seg_map_path": f"ann/{part}"},
        **{"img_suffix": ".png", "seg_map_suffix": suffix},
        "pipeline": [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}, {"type": "PackSegInputs"}],
    }
    if listed:
        data["ann_file"] = f"{part}.txt"
    if rooted:
        return data | {"data_root": str(folder)}
    full = {kind: str(folder / prefix) for kind, prefix in data["data_prefix"].items()}
    return data | {"data_prefix": full} | ({"ann_file": str(folder / data["ann_file"])} if listed else {})


def settings(train: dict[str, Any], val: dict[str, Any], method: dict[str, Any] | None = None) -> dict[str, Any]:
    """A whole config for MMEngine: four steps of a network of a few channels."""
    norm = {"type": "BN", "requires_grad": True}
    head = {"type": "FCNHead", "in_channels": 64, "in_index": 3, "channels": 8, "num_convs": 1, "num_classes": 2}
    preprocessor = {"type": "SegDataPreProcessor", "mean": [128.0] * 3, "std": [64.0] * 3, "size": (16, 16)}
    backbone = {"type": "ResNetV1c", "depth": 18, "base_channels": 8, "stem_channels": 8, "norm_cfg": norm}
    hook = {
        "type": "LowRankHook",
        "method": method or {"type": "HOSVD", "energy": 0.8},
        "layers": ["decode_head.convs.0.conv"],
    }
    return copy.deepcopy(
        {
            "custom_imports": {"imports": ["segmentation"]},
            "default_scope": "mmseg",
            "crop_size": (16, 16),
            "model": {
                "type": "EncoderDecoder",
                "data_preprocessor": preprocessor | {"bgr_to_rgb": True, "pad_val": 0, "seg_pad_val": 255},
                "backbone": backbone,
                "decode_head": head | {"concat_input": True, "norm_cfg": norm, "align_corners": False},
                **{"train_cfg": {}, "test_cfg": {"mode": "whole"}},
            },
            "train_dataloader": {
                **{"batch_size": 2, "num_workers": 0, "dataset": train},
                "sampler": {"type": "InfiniteSampler", "shuffle": True},
            },
            "val_dataloader": {
                **{"batch_size": 1, "num_workers": 0, "dataset": val},
                "sampler": {"type": "DefaultSampler", "shuffle": False},
            },
            "val_evaluator": {"type": "IoUMetric", "iou_metrics": ["mIoU"]},
            "val_cfg": {"type": "ValLoop"},
            "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": 4, "val_interval": 2},
            "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.01}},
            "custom_hooks": [hook],
        }
    )


def write_config(path: Path, content: dict[str, Any]) -> str:
    """Write a config as a program, as MMEngine's mostly are; gives its path as a word of a command."""
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in content.items()))
    return str(path)


def set_at(content: dict[str, Any], *path: Any) -> None:
    """Set or, where it ends in None, delete what is at a place in a config."""
    *keys, last, value = path
    for key in keys:
        content = content[key]
    if value is None:
        del content[last]
    else:
        content[last] = value


def errors(capsys: Any) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
