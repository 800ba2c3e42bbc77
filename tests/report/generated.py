"""Many records with what runs leave beside them, for the page: made up, and the same for the same number."""

from __future__ import annotations

import json
import random
from itertools import islice, product
from pathlib import Path

from experiment import Record, Run
from experiment.record import MEMORY, RANKS

METHODS = (
    "vanilla",
    "gradient_filter_r2",
    "gradient_filter_r4",
    "svd_0.8",
    "hosvd_0.8",
    "asi_1of20",
    "asi_1of10",
    "wasi_0.9",
)
DATASETS = ("cifar10", "cifar100", "cub200", "flowers102", "food101", "pets", "digits", "fashion_mnist")
MODELS = ("mcunet", "mobilenet_v2", "resnet18", "resnet34", "swin_t", "vit_b_32", "efficientnet_lite0")
LAYERS = (1, 2, 4, 6, 8, 10, "all")
LEAST = {"vanilla": 1.0, "gradient_filter_r2": 0.26, "gradient_filter_r4": 0.09, "svd_0.8": 0.4, "hosvd_0.8": 0.05}


def write_runs(root: Path, count: int, seeds: int = 3, epochs: int = 30) -> None:
    """Write finished runs below a folder: every seed, method and depth of a data set before the next."""
    source = random.Random(count)
    every = product(("A", "B"), MODELS, DATASETS, LAYERS, METHODS, range(seeds))
    for setup, model, dataset, layers, method, seed in islice(every, count):
        depth = 12 if layers == "all" else layers
        size = LEAST.get(method, 0.04) * depth * 2**22
        accuracy = 0.6 + 0.02 * depth - (0.0 if method == "vanilla" else source.random() * 0.05)
        run = Run("classification", setup, model, dataset, method, layers, seed)
        folder = run.folder(root)
        folder.mkdir(parents=True)
        Record(
            run=run,
            accuracy={"val_best": accuracy + 0.01, "val_last": accuracy, "test": accuracy + source.gauss(0, 0.004)},
            memory_bytes={"activation_formula": int(size), "saved_measured": int(1.4 * size), "peak_measured": 2**25},
            flops={"paper": depth * 10**9, "corrected": int(1.3 * depth * 10**9)},
            time_s={"step_median": 0.01 * depth * (1 + source.random()), "total": 100.0},
            provenance={"code_version": "made up", "hardware": "made up", "packages": {"torch": "2.13.0"}},
            recipe={"epochs": epochs, "batch_size": 32, "learning_rate": 0.05},
        ).save(folder)
        rows = [
            f"{epoch},{0.05},{2 / (epoch + 1)},{2.2 / (epoch + 1)},{accuracy * epoch / epochs},{int(size)}"
            for epoch in range(epochs)
        ]
        names = "epoch,learning_rate,train_loss,val_loss,val_accuracy,activation_bytes"
        (folder / "metrics.csv").write_text("\n".join([names, *rows, ""]))
        layer = {"shape": [32, 96, 14, 14], "ranks": [8, 12, 4, 4], "energy": 0.8, "captured": 0.81, "storage": "input"}
        layer |= {"weight_rank": None, "activation_bytes": int(size / depth), "flops_paper": 10**9, "flops": 10**9}
        behind = {"name": "behind", **layer, "ranks": None, "derived": "blocks.0.conv", "activation_bytes": 0}
        layers = [*({"name": f"blocks.{place}.conv", **layer} for place in range(depth)), behind]
        content = {"schema": 1, "layers": layers}
        (folder / RANKS).write_text(json.dumps(content))
        rows = [[f"blocks.{place}.conv", "Conv2d", int(size / 40), "its input"] for place in range(40)]
        (folder / MEMORY).write_text(json.dumps({"schema": 1, "kept_bytes": 0, "module/kind/bytes/reason": rows}))
