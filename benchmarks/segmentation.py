"""Bytes that a training step of each segmentation network keeps: ordinary training, leaner layers alone, and ASI.

    python -m benchmarks.segmentation [--help]

The images are the two photographs that come with scikit-learn, the weights random, the normalisation with stored
statistics. ASI has the ranks that HOSVD at energy 0.8 has on the same batch. Rows that the table has already are not
measured again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from sklearn.datasets import load_sample_images

from experiment.files import write_whole
from lowrank import converted_layers, measure_perplexity, saved_bytes
from segmentation.batches import Batch, segmentation_loss, training_mode
from segmentation.compose import CONFIGS, choose_depth, hook_settings, load_config
from segmentation.freezing import apply_freeze_list
from segmentation.hook import LowRankHook

NETWORKS = ("pspnet", "pspnet_mbv2", "deeplabv3", "deeplabv3_mbv2", "fcn", "upernet")
CLASSES = 21
KEY = ["network", "layers", "size", "batch"]
Row = dict[str, Any]


def photographs(size: int, batch: int) -> Batch:
    """Images (B, 3, size, size) with mean 0 and deviation 1, and random labels (B, 1, size, size)."""
    generator = torch.Generator().manual_seed(0)
    photos = [torch.from_numpy(photo).permute(2, 0, 1).float() for photo in load_sample_images().images]
    images = torch.stack([photos[index % len(photos)] for index in range(batch)])
    images = F.interpolate(images, size=(size, size), mode="bilinear")
    labels = torch.randint(0, CLASSES, (batch, 1, size, size), generator=generator)
    return (images - images.mean()) / images.std(), labels


def measure(network: str, layers: int, size: int, batch: int) -> Row:
    """One row: bytes kept by each way to train the network's last layers, and ASI's bytes by formula."""
    config = load_config([CONFIGS / "networks" / f"{network}.py", CONFIGS / "data" / "voc12aug.py"])
    choose_depth(config, layers)
    settings = hook_settings(config) or {}
    images = photographs(size, batch)

    def model_with(**changed: Any) -> Any:
        torch.manual_seed(0)
        model = MODELS.build(config.model)
        LowRankHook(**{**settings, **changed}).prepare(model)
        return training_mode(model)

    torch.manual_seed(0)
    stock = MODELS.build(config.model)
    apply_freeze_list(stock, settings["freeze"])
    table = measure_perplexity(training_mode(stock), settings["layers"], segmentation_loss, images, energies=(0.8,))
    ranks = {layer.name: layer.ranks[0] for layer in table.layers}
    asi = model_with(method={"type": "ASI", "ranks": ranks})
    kept = {
        "vanilla": saved_bytes(model_with(), segmentation_loss, images),
        "vanilla_fused": saved_bytes(model_with(fuse=True), segmentation_loss, images),
        "asi": saved_bytes(asi, segmentation_loss, images),
    }
    formula = sum(layer._lowrank.formula_bytes for layer in converted_layers(asi))
    row = {"network": network, "layers": layers, "size": size, "batch": batch}
    return {**row, **{f"{name}_bytes": value for name, value in kept.items()}, "asi_formula_bytes": formula}


def to_markdown(table: pd.DataFrame) -> str:
    """The table in MiB, with how many times less than ordinary training is kept."""
    shown = table[KEY].copy()
    for name in ("vanilla", "vanilla_fused", "asi", "asi_formula"):
        shown[f"{name} (MiB)"] = [f"{value / 2**20:.2f}" for value in table[f"{name}_bytes"]]
    for name in ("vanilla_fused", "asi"):
        shown[f"{name}, times less"] = [f"{value:.1f}" for value in table["vanilla_bytes"] / table[f"{name}_bytes"]]
    text: str = shown.to_markdown(index=False, disable_numparse=True)
    return text + "\n"


def main(arguments: Sequence[str]) -> int:
    """Measure every row that is not in the table yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.segmentation", description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--layers", nargs="+", type=int, choices=(5, 10), default=(5, 10), metavar="N")
    parser.add_argument("--size", type=int, default=512, help="side of an image in pixels")
    parser.add_argument("--batch", type=int, default=2, help="images in a batch")
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="DIR")
    options = parser.parse_args(arguments)
    register_all_modules(init_default_scope=True)
    path = options.output / "segmentation_memory.csv"
    rows: list[Row] = pd.read_csv(path).to_dict("records") if path.exists() else []  # type: ignore[assignment]
    done = {tuple(row[key] for key in KEY) for row in rows}
    options.output.mkdir(parents=True, exist_ok=True)
    for network in options.networks:
        for layers in options.layers:
            if (network, layers, options.size, options.batch) in done:
                continue
            rows.append(measure(network, layers, options.size, options.batch))
            table = pd.DataFrame(rows).sort_values(KEY, ignore_index=True)
            write_whole(path, table.to_csv(index=False, lineterminator="\n"))
            write_whole(path.with_suffix(".md"), to_markdown(table))
            print(to_markdown(pd.DataFrame(rows[-1:])), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
