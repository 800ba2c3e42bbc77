"""A config as MMEngine's runner is given it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from experiment.processes import place, say
from segmentation.compose import with_naming_readers
from segmentation.data.draws import place_draws
from segmentation.saving import WholeCheckpoints
from segmentation.start import share_out


def runner_config(config: Config, path: Path, identity: str, checkpoint: Path | None = None) -> Config:
    """A copy of a composed config with what the suite sets for each of its runs.

    Args:
        config: see `segmentation.compose`.
        path: the run's folder.
        identity: hash of the run's identity.
        checkpoint: to go on from, if there is one.
    """
    config = with_naming_readers(config)
    config.work_dir = str(path)
    # MMEngine's logger and message hub are found by this name; two runs in one process must not share them.
    config.experiment_name = f"{identity}_{time.time_ns()}"
    config.setdefault("default_hooks", {})
    saving = dict(config.default_hooks.get("checkpoint") or _usual_saving(config.train_cfg))
    if saving.get("type") == "CheckpointHook":
        config.default_hooks["checkpoint"] = {
            **saving,
            "type": WholeCheckpoints.__name__,
            "identity": identity,
        }
    for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if config.get(key):
            config[key].setdefault("worker_init_fn", {"type": "worker_of_run", "seed": config.randomness.seed})
    unplaced = place_draws(config)
    if checkpoint is not None and unplaced is not None:
        say(
            f"warning: train_dataloader has a sampler of type {unplaced}, so the augmentation of this resumed run is "
            f"not that of a run without a break; with InfiniteSampler or DefaultSampler it is"
        )
    if checkpoint is not None:
        config.load_from, config.resume = str(checkpoint), True
    if place().count > 1:
        share_out(config, place().count)
    return config


def _usual_saving(lengths: Mapping[str, Any]) -> dict[str, Any]:
    """The hook that saves checkpoints, where a config has none: at each validation of a run that counts iterations, as
    MMEngine's own usual one counts epochs, of which such a run has one."""
    if lengths.get("max_iters") is None:
        return {"type": "CheckpointHook", "interval": 1}
    interval = lengths.get("val_interval", 1000)
    return {"type": "CheckpointHook", "by_epoch": False, "interval": interval, "max_keep_ckpts": 2}
