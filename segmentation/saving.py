"""MMEngine's hook that saves checkpoints, saving them so that a crash or a full disk takes none away."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

from experiment import ExperimentError
from experiment.checkpoints import IDENTITY
from experiment.files import write_whole
from segmentation.checkpoints import LAST

LEAST = 2  # checkpoints that are kept, so that there is one before a damaged one
BACKEND = "whole"


def write_or_say(path: Path, content: str | bytes) -> None:
    """Write a file of a run, whole or not at all.

    Raises:
        ExperimentError: it cannot be written; what was there is there still.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise ExperimentError(
            f"{path} cannot be written ({error.strerror or error}); all that was saved before is kept: make room, or "
            f"give another --runs-dir; the same command goes on"
        ) from None


@register_backend(BACKEND, force=True)
class WholeFiles(LocalBackend):
    """Local files that are whole or not there."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes."""
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        write_or_say(Path(filepath), obj)


@HOOKS.register_module()
class WholeCheckpoints(CheckpointHook):
    """MMEngine's `CheckpointHook`, which deletes an old checkpoint only when the new one is there.

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

    def before_train(self, runner: Any) -> None:
        """Take up what a resumed run says of its checkpoints, as files of this folder, wherever it was before."""
        hub = runner.message_hub
        for key in [name for name in hub.runtime_info if name.startswith(("best_ckpt", "last_ckpt"))]:
            hub.update_info(key, str(Path(runner.work_dir) / Path(str(hub.get_info(key))).name))
        super().before_train(runner)
        if self.max_keep_ckpts > 0:
            self.keep_ckpt_ids: deque[int] = deque(self.keep_ckpt_ids)
            if is_main_process():
                self._remove_outdated(runner)

    def _remove_outdated(self, runner: Any) -> None:
        """Remove checkpoints that a killed process had replaced and not yet deleted."""
        name = re.compile(re.escape(self.filename_tmpl).replace(r"\{\}", r"(\d+)"))
        for path in Path(str(self.out_dir)).glob("*.pth") if self.keep_ckpt_ids else ():
            found = name.fullmatch(path.name)
            if found and int(found[1]) < runner.iter and int(found[1]) not in self.keep_ckpt_ids:
                path.unlink()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Say whose checkpoint it is."""
        checkpoint[IDENTITY] = self.identity

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        old = []
        if self.max_keep_ckpts > 0:
            if step not in self.keep_ckpt_ids:
                self.keep_ckpt_ids.append(step)
            while len(self.keep_ckpt_ids) > self.max_keep_ckpts:
                old.append(self.keep_ckpt_ids.popleft())
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        runner.call_hook("collect")  # all processes are here; what follows is done by the first alone
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
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
            write_or_say(Path(runner.work_dir) / LAST, str(self.last_ckpt))
            for number in old:
                (Path(str(self.out_dir)) / self.filename_tmpl.format(number)).unlink(missing_ok=True)
