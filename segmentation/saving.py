"""MMEngine's hook that saves checkpoints, saving them so that a crash or a full disk takes none away."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

from experiment.checkpoints import IDENTITY
from experiment.files import write_whole
from experiment.processes import asked_to_stop, own_part, place, with_others
from experiment.random_state import random_state, set_random_state
from experiment.signals import Stopped, hold
from segmentation.checkpoints import LAST

LEAST = 2  # checkpoints that are kept, so that there is one before a damaged one
BACKEND = "whole"
RANDOM = "lowrank_random"  # of a checkpoint: the states of the random generators of each process


@register_backend(BACKEND, force=True)
class WholeFiles(LocalBackend):
    """Local files that are whole or not there."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes into a folder that is there: one that was moved away is not made anew."""
        write_whole(Path(filepath), obj)


@HOOKS.register_module()
class WholeCheckpoints(CheckpointHook):
    """MMEngine's `CheckpointHook`, which deletes an old checkpoint only when the new one is there.

    Where a signal ends the run, it saves the last step: of several processes within their training, as in validation
    each may have another number of images. The next checkpoint that is due takes that one's place.

    Args:
        identity: hash of the run's identity, written into every checkpoint.
        max_keep_ckpts: checkpoints that are kept, -1 for all; never less than two.
        options: see `CheckpointHook`.
    """

    def __init__(self, identity: str = "", max_keep_ckpts: int = -1, **options: Any) -> None:
        options.setdefault("backend_args", {"backend": BACKEND})
        keep = max(max_keep_ckpts, LEAST) if max_keep_ckpts > 0 else max_keep_ckpts
        super().__init__(max_keep_ckpts=keep, **options)
        self.identity = identity
        self._saved = 0  # after how many steps
        self._random: Any = None  # states of generators: to be saved, or from a checkpoint until training starts
        self._torch: Any = None

    def before_train(self, runner: Any) -> None:
        """Take up what a resumed run says of its checkpoints, as files of this folder, wherever it was before."""
        if runner.iter:
            self._saved = runner.iter
            if self._random is not None:
                set_random_state(self._random)
        self._random = None
        if not self.by_epoch:  # within an epoch, MMEngine's loop of epochs cannot go on
            hold()
        hub = runner.message_hub
        for key in [name for name in hub.runtime_info if name.startswith(("best_ckpt", "last_ckpt"))]:
            hub.update_info(key, str(Path(runner.work_dir) / Path(str(hub.get_info(key))).name))
        self.last_ckpt = hub.get_info("last_ckpt") if "last_ckpt" in hub.runtime_info else None
        super().before_train(runner)
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids: deque[int] = deque(self.keep_ckpt_ids)
            if is_main_process():
                self._remove_outdated(runner.iter)

    def before_train_epoch(self, runner: Any) -> None:
        """A loader draws from torch's generator when it starts, which after a resume it does once more."""
        self._torch = torch.get_rng_state() if runner.iter else None

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Undo that."""
        if self._torch is not None:
            torch.set_rng_state(self._torch)
            self._torch = None

    def after_train_iter(self, runner: Any, *arguments: Any, **options: Any) -> None:
        """Save what is due; end the run where it is to end, but within a step of several batches."""
        super().after_train_iter(runner, *arguments, **options)
        if runner.optim_wrapper.should_update():
            self._end(runner, runner.iter + 1)

    def before_val_epoch(self, runner: Any) -> None:
        """A validation that is broken off is made again, with what it draws."""
        self._random = random_state()

    def after_val_iter(self, runner: Any, *arguments: Any, **options: Any) -> None:
        """End the run where it is to end."""
        if place().count == 1:
            self._end(runner, runner.iter)

    def after_val_epoch(self, runner: Any, *arguments: Any, **options: Any) -> None:
        """Save the best weights."""
        self._random = None
        super().after_val_epoch(runner, *arguments, **options)

    def _end(self, runner: Any, steps: int) -> None:
        number = asked_to_stop()
        if not number or self.by_epoch:
            return
        if self._saved < steps:
            self._save(runner, steps, {"epoch": runner.epoch, "iter": steps})
        raise Stopped(number)

    def _remove_outdated(self, before: int) -> None:
        """Remove checkpoints that were replaced: here, or by a process that was ended before it deleted them."""
        name = re.compile(re.escape(self.filename_tmpl).replace(r"\{\}", r"(\d+)"))
        for path in Path(str(self.out_dir)).glob("*.pth") if self.keep_ckpt_ids else ():
            found = name.fullmatch(path.name)
            if found and int(found[1]) < before and int(found[1]) not in self.keep_ckpt_ids:
                path.unlink(missing_ok=True)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Say whose checkpoint it is, and what will be drawn."""
        checkpoint[IDENTITY] = self.identity
        checkpoint[RANDOM] = random_state() if self._random is None else self._random

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the states of the generators until training starts."""
        state = checkpoint.pop(RANDOM, None)
        self._random = None if state is None else own_part(state)

    def collect(self, runner: Any) -> None:
        """Take from all processes what the first saves."""
        self._random = with_others(random_state() if self._random is None else self._random)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        if self.max_keep_ckpts > 0:
            if step not in self.keep_ckpt_ids:
                self.keep_ckpt_ids.append(step)
            while len(self.keep_ckpt_ids) > self.max_keep_ckpts:
                self.keep_ckpt_ids.popleft()
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        self.last_ckpt = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step))
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        self._save(runner, step, meta)
        if self.max_keep_ckpts > 0 and is_main_process():
            self._remove_outdated(step)

    def _save(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        runner.call_hook("collect")  # all processes are here; what follows is done by the first alone
        name = self.filename_tmpl.format(step)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            write_whole(Path(runner.work_dir) / LAST, self.file_backend.join_path(self.out_dir, name))
        self._saved, self._random = step, None
