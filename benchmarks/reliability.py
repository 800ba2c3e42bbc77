"""Kill a small run again and again at random moments, and compare what it ends in with the run that no one stopped.

    python -m benchmarks.reliability [--help]

Each try is a process of its own that gets SIGKILL while it loads, at any moment after that, or while it writes a file;
the same command then goes on. Folders of runs are on another disk than the temporary folder. Weights, the states of
optimizer and method, record and metrics.csv have to be equal bit by bit, but for times.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.kills import METRICS, KillError, Process, differences, parts
from experiment.record import RESULT

CONFIGS = Path(__file__).parent.parent / "configs"
MOMENTS = ("loading", "anywhere", "writing")
SHARES = (0.2, 0.4, 0.4)  # how often each of these is drawn
MOST_OF_ONE_RUN = 7  # kills, after which a run is let go on to its end
EPOCHS, ITERATIONS = 12, 12
EDGE = 0.002  # seconds after which a file that is being written is so still


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        killed: how many kills by what they met.
        runs: how many runs were ended and compared.
        problems: in what they differ from the run that no one stopped.
        left: bytes that killed processes left in the temporary folder.
    """

    killed: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    problems: list[str] = field(default_factory=list)
    left: int = 0

    def __str__(self) -> str:
        met = ", ".join(f"{count} {what}" for what, count in sorted(self.killed.items()))
        return (
            f"{self.killed.total()} kills ({met}) of {self.runs} runs: {len(self.problems)} differences, {self.left} "
            f"bytes left in the temporary folder"
        )


def classification(folder: Path) -> tuple[list[str], int]:
    """Arguments of Python for a small run below a folder, with ASI and momentum, and its number of rows."""
    below = CONFIGS / "classification"
    files = ("setups/a", "models/mcunet", "data/digits", "methods/asi")
    words = ["-m", "classification", "fit", *(f"--config={below / name}.yaml" for name in files)]
    words += ["--model.method.init_args.ranks=3", "--model.pretrained=false", "--model.layers=2"]
    words += ["--model.momentum=0.9", "--model.warmup_epochs=2", "--tensorboard=false", f"--runs_dir={folder}"]
    words += ["--data.image_size=32", "--data.batch_size=8", "--data.eval_batch_size=32"]
    words += [f"--trainer.max_epochs={EPOCHS}", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    return [*words, "--trainer.limit_test_batches=1", "--trainer.enable_progress_bar=false"], EPOCHS


def segmentation(folder: Path) -> tuple[list[str], int]:
    """Arguments of Python for a small run below a folder, with ASI and momentum, and its number of rows."""
    below = CONFIGS / "segmentation"
    method = folder.parent / "asi_of_rank_3.py"
    method.write_text("lowrank = dict(method=dict(type='ASI', ranks=3))\n")
    files = ("networks/pspnet_small", "data/digit_scenes", "stages/finetune", "stages/finetune_digit_scenes")
    words = ["-m", "segmentation", "train", *(f"{below / name}.py" for name in files), str(method)]
    words += ["--layers=10", f"--iterations={ITERATIONS}", f"--data-dir={folder.parent / 'data'}", "--resume"]
    words += [f"--runs-dir={folder}", "--cfg-options", "model.backbone.stem_channels=8"]
    words += ["model.backbone.base_channels=8", "model.decode_head.in_channels=64", "model.decode_head.channels=8"]
    words += ["crop_size=(32,32)", "model.data_preprocessor.size=(32,32)", "train_dataloader.batch_size=2"]
    pipeline = "train_dataloader.dataset.dataset.pipeline"
    words += [f"{pipeline}.2.scale=(32,32)", f"{pipeline}.3.crop_size=(32,32)", "val_dataloader.dataset.indices=4"]
    words += ["train_cfg.val_interval=2", "default_hooks.checkpoint.interval=1", "default_hooks.logger.interval=1"]
    return words, ITERATIONS // 2


TASKS = {"classification": classification, "segmentation": segmentation}


@dataclass
class Trial:
    """One task's run, killed until there were enough of it.

    Args:
        task: a key of `TASKS`.
        disk: folder for the runs.
        temporary: the temporary folder that they are given.
        generator: draws the moments.
    """

    task: str
    disk: Path
    temporary: Path
    generator: random.Random

    def __post_init__(self) -> None:
        self.whole = self.disk / "whole"
        start = time.monotonic()
        process = self._start(self.whole)
        process.until(lambda: process.begun)
        self.loading = time.monotonic() - start
        process.finish()
        self.working = time.monotonic() - start - self.loading

    def kills(self, count: int) -> Outcome:
        """Kill runs this many times, and let each of them end.

        Raises:
            KillError: a run that goes on does not end with exit code 0.
        """
        outcome = Outcome()
        while outcome.killed.total() < count:
            runs = self.disk / "killed"
            shutil.rmtree(runs, ignore_errors=True)
            for _ in range(min(self.generator.randint(2, MOST_OF_ONE_RUN), count - outcome.killed.total())):
                met = self._try(runs)
                if met is None:
                    break
                outcome.killed[met] += 1
            self._start(runs).finish()
            outcome.runs += 1
            found = differences(self._folder(runs), self._folder(self.whole))
            outcome.problems += [f"run {outcome.runs}: {what}" for what in found]
            print(f"  {self.task}: {outcome}", *found, sep="\n    ", flush=True)
        outcome.left = sum(path.stat().st_size for path in self.temporary.rglob("*") if path.is_file())
        return outcome

    def _start(self, runs: Path) -> Process:
        words, self.rows = TASKS[self.task](runs)
        return Process.start(words, self.disk / "output", self.temporary)

    def _folder(self, runs: Path) -> Path:
        return next(path.parent for path in runs.rglob(RESULT))

    def _try(self, runs: Path) -> str | None:
        """Kill a run at a moment that is drawn; returns what that met, None if the run had ended before."""
        process = self._start(runs)
        moment = self.generator.choices(MOMENTS, SHARES)[0]
        if moment == "loading":
            time.sleep(self.generator.uniform(0, self.loading))
        else:
            process.until(lambda: process.begun)
            if moment == "anywhere":
                process.until(lambda: False, self.generator.uniform(0, self.working))
            else:
                self._wait_for_writing(process, runs)
        met = self._met(process, runs)
        return met if process.kill() else self._ended(process)

    def _wait_for_writing(self, process: Process, runs: Path) -> None:
        """Until one of the next files is being written, and then for a moment that may see its end."""
        folder = self._run_folder(runs)
        for _ in range(self.generator.randint(1, 8)):
            process.until(lambda: not parts(folder))
            process.until(lambda: bool(parts(folder)))
        time.sleep(self.generator.uniform(0, EDGE))

    def _run_folder(self, runs: Path) -> Path:
        """The folder of the run that is at work; it is there when that has begun."""
        return runs / self._folder(self.whole).relative_to(self.whole)

    def _met(self, process: Process, runs: Path) -> str:
        folder = self._run_folder(runs)
        writing = parts(folder)
        if writing:
            return f"writing {'a checkpoint' if writing[0].endswith(('.ckpt', '.pth')) else writing[0]}"
        if not process.begun:
            return "loading"
        rows = (folder / METRICS).read_text().count("\n") - 1 if (folder / METRICS).exists() else 0
        return "after the last epoch" if rows >= self.rows else "training"

    def _ended(self, process: Process) -> None:
        process.finish()


def another_disk(disk: Path) -> None:
    """Raise unless a folder is on another disk than temporary files are.

    Raises:
        KillError: it is not there, or not on another disk.
    """
    if not disk.is_dir() or disk.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        raise KillError(f"{disk} is no folder of another disk than {tempfile.gettempdir()}; give one as --disk")


def torment(task: str, count: int, disk: Path, seed: int) -> Outcome:
    """Kill small runs of a task so many times; see the module.

    Raises:
        KillError: the disk is not another one, or a run does not end as it has to.
    """
    another_disk(disk)
    with tempfile.TemporaryDirectory(dir=disk) as runs, tempfile.TemporaryDirectory() as temporary:
        return Trial(task, Path(runs), Path(temporary), random.Random(seed)).kills(count)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0; 1 if anything was lost; 2 if it could not be tried."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: both)")
    parser.add_argument("--kills", type=int, default=10, help="of each task (default: %(default)s)")
    parser.add_argument("--disk", type=Path, default=Path("/dev/shm"), help="for the runs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    options = parser.parse_args(arguments)
    lost = 0
    for task in options.tasks:
        try:
            outcome = torment(task, options.kills, options.disk, options.seed)
        except KillError as error:
            print(f"error: {task}: {error}", file=sys.stderr)
            return 2
        print(f"{task}: {outcome}", *outcome.problems, sep="\n  ")
        lost += len(outcome.problems)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
