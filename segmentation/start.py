"""In how many processes a command runs, as its options and its launcher have it, and which of them this one is."""

from __future__ import annotations

import argparse
import os
import subprocess

import torch
from mmengine.config import Config
from mmengine.dist import get_rank, get_world_size, init_dist

from experiment import ExperimentError
from experiment.process_group import is_started
from experiment.processes import Place, join

_OF_SLURM = {"RANK": "PROCID", "LOCAL_RANK": "LOCALID", "NODE_RANK": "NODEID", "WORLD_SIZE": "NTASKS"}


def join_others(options: argparse.Namespace) -> None:
    """Meet the other processes of the command, if they are there; from then on it has a launcher.

    Args:
        options: of the command, whose `launcher` is set where this process was started by another of the suite.

    Raises:
        ExperimentError: the launcher is not there, or needs an accelerator; or the others did not come.
    """
    if options.processes is not None and options.processes < 1:
        raise ExperimentError(f"--processes is {options.processes}; allowed are whole numbers from 1")
    if options.processes is not None and options.launcher != "none":
        raise ExperimentError(f"--processes starts processes as --launcher {options.launcher} does; give one of them")
    if is_started():
        options.launcher = "pytorch"
    if options.launcher == "none":
        return
    os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    if options.launcher == "slurm":
        _take_from_slurm()
        options.launcher = "pytorch"
    if options.launcher == "pytorch":
        _join_by_environment()
        return
    if not torch.cuda.is_available():
        raise ExperimentError(f"--launcher {options.launcher} needs an accelerator, and there is none; leave it out")
    init_dist(options.launcher)
    join(Place(get_rank(), get_world_size()))


def _take_from_slurm() -> None:
    """Set what PyTorch's launcher sets, by what `srun` does; MMEngine's own way needs accelerators.

    Raises:
        ExperimentError: srun has not started this.
    """
    try:
        told = {name: os.environ[f"SLURM_{of}"] for name, of in _OF_SLURM.items()}
        port = str(15000 + int(os.environ["SLURM_JOB_ID"]) % 10000)  # jobs that share a machine have their own
        named = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        first = subprocess.run(named, check=True, capture_output=True, text=True).stdout.split()[0]
    except (KeyError, ValueError, IndexError, OSError, subprocess.CalledProcessError):
        raise ExperimentError("--launcher slurm is for srun, which has not started this; give --processes") from None
    os.environ.update(told)
    os.environ.setdefault("MASTER_ADDR", first)
    os.environ.setdefault("MASTER_PORT", port)


def _join_by_environment() -> None:
    try:
        own = Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    except (KeyError, ValueError):
        raise ExperimentError(
            "--launcher pytorch is for python -m torch.distributed.run, which has not started this; give --processes"
        ) from None
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    join(own, device)


def share_out(config: Config, count: int) -> None:
    """Set what MMEngine needs to train in several processes, in place.

    Raises:
        ExperimentError: checkpoints are saved by a hook that knows nothing of the state of each process.
    """
    saving = config.default_hooks["checkpoint"].get("type")
    if saving != "WholeCheckpoints":
        raise ExperimentError(
            f"default_hooks.checkpoint is a {saving}; {count} processes need MMEngine's CheckpointHook"
        )
    if config.get("model_wrapper_cfg") is None:
        wrapper = {"type": "MMDistributedDataParallel", "broadcast_buffers": False}
        unused = config.get("find_unused_parameters", False)
        config.model_wrapper_cfg = {**wrapper, "find_unused_parameters": unused}
    if not torch.cuda.is_available():
        config.model_wrapper_cfg["device_ids"] = None
    for key in ("val_evaluator", "test_evaluator"):
        evaluators = config.get(key) or []
        for evaluator in [evaluators] if isinstance(evaluators, dict) else evaluators:
            evaluator["collect_device"] = "gpu"  # by their group, on any device; the other way is by files, as pickles
