"""A picture of input, truth and the prediction of every run, side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mmengine.dataset import pseudo_collate
from mmseg.registry import DATASETS, MODELS
from numpy.typing import NDArray

from experiment import ExperimentError, Record
from experiment.checkpoints import FINAL
from experiment.files import write_whole
from experiment.folder import CONFIG
from experiment.record import RESULT
from segmentation.checkpoints import load_weights, read_safely_everywhere
from segmentation.compose import read_run_config
from segmentation.data.registry import require_data
from segmentation.quiet import register_modules

Classes = NDArray[np.int64]
Column = tuple[str, list[Any]]  # what is written above it, and its images
IGNORED, IGNORED_COLOUR = 255, (224, 224, 192)
_NAMES = ("setup", "model", "layers", "seed")  # of a run, beside its method


def picture(runs: Sequence[Path], output: Path, count: int = 4) -> None:
    """Write a PNG with a row per validation image, the first `count` of them, and a column per run.

    Raises:
        ExperimentError: no images are asked for, a folder without a finished run, runs of different data sets, a data
            set that is not there, or an output that cannot be written.
    """
    if count < 1:
        raise ExperimentError(f"--count is {count}; allowed are whole numbers from 1")
    records = {run: Record.load(run / RESULT) for run in runs}
    if len({record.run.dataset for record in records.values()}) != 1:
        raise ExperimentError("the runs are of different data sets; give runs of one")
    register_modules()
    read_safely_everywhere()
    config = read_run_config(runs[0] / CONFIG)
    require_data(config)
    dataset = DATASETS.build(config.val_dataloader.dataset)
    samples = [dataset[index] for index in range(min(count, len(dataset)))]
    columns: list[Column] = [
        ("input", [sample["inputs"].permute(1, 2, 0).numpy()[..., ::-1] for sample in samples]),
        ("truth", [_coloured(sample["data_samples"].gt_sem_seg.data[0].numpy(), dataset) for sample in samples]),
    ]
    for run, title in zip(runs, titles([records[run] for run in runs]), strict=True):
        columns.append((title, [_coloured(classes, dataset) for classes in _predictions(run, samples)]))
    try:
        write_whole(output, _drawn(columns))
    except OSError as error:
        raise ExperimentError(f"{output} cannot be written: {error.strerror}; give another --output") from None


@torch.no_grad()
def _predictions(run: Path, samples: Sequence[Any]) -> list[Classes]:
    """Classes (H, W) of every sample, by a stock segmentor with the run's last weights; sizes may differ."""
    config = read_run_config(run / CONFIG)
    model = MODELS.build(config.model).eval()
    load_weights(model, str(run / FINAL), whole=True)
    results = (model.test_step(pseudo_collate([sample])) for sample in samples)
    return [result.pred_sem_seg.data[0].numpy() for (result,) in results]


def _coloured(classes: Classes, dataset: Any) -> NDArray[np.uint8]:
    colours = np.zeros((256, 3), np.uint8)
    palette = dataset.metainfo["palette"]
    colours[: len(palette)] = palette
    colours[IGNORED] = IGNORED_COLOUR
    return colours[classes]


def titles(records: Sequence[Record]) -> list[str]:
    """What is written over each run's column: its method and mIoU, and what else of its name tells it from others."""
    odd = [name for name in _NAMES if len({getattr(record.run, name) for record in records}) > 1]
    return [
        "\n".join(
            [
                record.run.method,
                *(f"{name} {getattr(record.run, name)}" for name in odd),
                f"last mIoU {100 * record.accuracy['miou_last']:.1f} %",
            ]
        )
        for record in records
    ]


def _drawn(columns: Sequence[Column]) -> bytes:
    rows = len(columns[0][1])
    figure = Figure(figsize=(1.6 * len(columns), 1.6 * rows + 0.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns):
        grid[0, column].set_title(title, fontsize=8)
        for row, image in enumerate(images):
            grid[row, column].imshow(image, interpolation="nearest")
            grid[row, column].set_axis_off()
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
