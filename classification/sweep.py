"""Many runs by one command: pretrain (setup B), measure perplexity, train every method at every depth and seed.

Each run goes through the ordinary command line, so a run of a sweep and a run by hand are the same run: what is done is
skipped, what was interrupted is resumed. A run that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from classification.cli import MENDABLE, run
from experiment import Run

CONFIGS = Path(__file__).parent.parent / "configs" / "classification"
BUDGET_METHOD = "hosvd_0.8"  # the papers give ASI the memory that this method used
CONV_ONLY, LINEAR_ONLY = ("gradient_filter",), ("wsi", "wasi")  # how the names of such methods start
RANKED = ("asi", "wasi")  # such methods take their ranks from a perplexity table and that budget
FAILURES = "failures.log"


def is_ranked(method: str) -> bool:
    """Whether a method takes its ranks from a perplexity table."""
    return method.startswith(RANKED) and "_rank" not in method


Command = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its title and the arguments of the command that does it."""

    title: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """What to run.

    Attributes:
        setup: "a" or "b".
        model, dataset: names of configs in configs/classification.
        methods: names of configs in configs/classification/methods.
        layers: numbers of trailing layers.
        seeds: the seeds.
        runs_dir: folder that holds all runs.
        extra: further arguments for every training run.
    """

    setup: str
    model: str
    dataset: str
    methods: tuple[str, ...]
    layers: tuple[str, ...]
    seeds: tuple[int, ...]
    runs_dir: Path
    extra: tuple[str, ...] = ()

    def jobs(self) -> Iterator[Job]:
        """Every run, in an order in which each finds what it needs."""
        for seed in self.seeds:
            if self.setup == "b":
                yield self._job("fit", "pretrain", "b_pretrain", seed, [])
            weights = self._pretrained(seed) if self.setup == "b" else []
            if any(map(is_ranked, self.methods)):
                for layers in self.layers:
                    measured = ["--model.layers", layers, *weights]
                    measured += ["--data.partition", "pretrain"] if self.setup == "b" else []
                    yield self._job("measure", f"perplexity, last {layers}", self.setup, seed, measured)
            for layers in self.layers:
                for method in sorted(self.methods, key=is_ranked):  # the budget's run first
                    options = ["--config", str(CONFIGS / "methods" / f"{method}.yaml"), "--model.layers", layers]
                    options += weights + (self._budget(layers, seed) if is_ranked(method) else [])
                    yield self._job("fit", f"{method}, last {layers}", self.setup, seed, options)

    def _job(self, command: str, title: str, setup: str, seed: int, options: Sequence[str]) -> Job:
        configs = [CONFIGS / "setups" / f"{setup}.yaml", CONFIGS / "data" / f"{self.dataset}.yaml"]
        specific = CONFIGS / "setups" / f"{setup}_{self.dataset}.yaml"
        configs += [specific] if specific.exists() else []
        configs.append(CONFIGS / "models" / f"{self.model}.yaml")  # a network may have to differ from its data set
        arguments = [command, *(word for path in configs for word in ("--config", str(path)))]
        arguments += ["--seed_everything", str(seed), "--runs_dir", str(self.runs_dir)]
        arguments += ["--trainer.enable_progress_bar", "false", *options, *self.extra]
        return Job(f"{title}, seed {seed}", tuple(arguments))

    def _run(self, setup: str, method: str, layers: str, seed: int) -> Run:
        count: int | str = layers if layers == "all" else int(layers)
        return Run("classification", setup, self.model, self.dataset, method, count, seed)

    def _pretrained(self, seed: int) -> list[str]:
        folder = self._run("B-pretrain", "vanilla", "all", seed).folder(self.runs_dir)
        return ["--model.weights", str(folder / "checkpoints" / "best.ckpt")]

    def _budget(self, layers: str, seed: int) -> list[str]:
        setup = self.setup.upper()
        table = self._run(setup, "perplexity", layers, seed).folder(self.runs_dir) / "perplexity.json"
        budget = self._run(setup, BUDGET_METHOD, layers, seed).folder(self.runs_dir)
        return ["--model.budget.table", str(table), "--model.budget.run", str(budget)]


def run_all(jobs: Sequence[Job], command: Command, log: Path) -> list[Job]:
    """Run jobs one after the other; failures go to `log` with their traceback. Returns the jobs that failed."""
    failed = []
    for number, job in enumerate(jobs, start=1):
        print(f"[{number}/{len(jobs)}] {job.title}", flush=True)
        try:
            command(job.arguments)
        except Exception as error:
            failed.append(job)
            cause = str(error) if isinstance(error, MENDABLE) else traceback.format_exc()
            print(f"  failed: {' '.join(str(error).split())}", file=sys.stderr)
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                file.write(f"{job.title}\npython -m classification {' '.join(job.arguments)}\n{cause}\n\n")
    return failed


def parse(arguments: Sequence[str]) -> tuple[Sweep, bool]:
    """The sweep that the arguments describe, and whether only to list it."""
    parser = argparse.ArgumentParser(prog="python -m classification sweep", description=__doc__)
    choices = {kind: sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml")) for kind in ("models", "data")}
    methods = sorted(path.stem for path in (CONFIGS / "methods").glob("*.yaml"))
    parser.add_argument("--setup", choices=("a", "b"), required=True)
    parser.add_argument("--model", choices=choices["models"], required=True)
    parser.add_argument("--dataset", choices=choices["data"], required=True)
    parser.add_argument("--methods", nargs="+", choices=methods, metavar="METHOD", help="default: all for its layers")
    parser.add_argument("--layers", nargs="+", default=["2", "4"], metavar="N", help="whole numbers, or 'all'")
    parser.add_argument("--seeds", nargs="+", type=int, default=[233], metavar="SEED")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"))
    parser.add_argument("--dry_run", action="store_true", help="list the runs, and stop")
    options, extra = parser.parse_known_args(arguments)
    for layers in options.layers:
        if layers != "all" and not (layers.isdecimal() and int(layers) > 0):
            parser.error(f"--layers has {layers!r}; allowed are whole numbers from 1, or 'all'")
    if options.methods is None:
        options.methods = [method for method in methods if not method.startswith(_unfit(options.model))]
    ranked = [method for method in options.methods if is_ranked(method)]
    if ranked and BUDGET_METHOD not in options.methods:
        parser.error(f"{ranked[0]} takes its budget from {BUDGET_METHOD}; add it to --methods")
    sweep = Sweep(
        setup=options.setup,
        model=options.model,
        dataset=options.dataset,
        methods=tuple(options.methods),
        layers=tuple(options.layers),
        seeds=tuple(options.seeds),
        runs_dir=options.runs_dir,
        extra=tuple(extra),
    )
    return sweep, options.dry_run


def _unfit(model: str) -> tuple[str, ...]:
    """How the names of methods start that the layers of a model cannot be trained with."""
    config = yaml.safe_load((CONFIGS / "models" / f"{model}.yaml").read_text())
    return CONV_ONLY if config["model"].get("kind") == "linear" else LINEAR_ONLY


def main(arguments: Sequence[str], command: Command = run) -> int:
    """Run a sweep. Returns 0, or 1 after a list of what failed."""
    sweep, dry_run = parse(arguments)
    jobs = list(sweep.jobs())
    if dry_run:
        for number, job in enumerate(jobs, start=1):
            print(f"[{number}/{len(jobs)}] {job.title}\n  python -m classification {' '.join(job.arguments)}")
        return 0
    start = time.perf_counter()
    log = sweep.runs_dir / FAILURES
    failed = run_all(jobs, command, log)
    print(f"{len(jobs) - len(failed)} of {len(jobs)} runs done, {time.perf_counter() - start:.0f} s")
    if failed:
        print(f"failed, see {log}:", *(f"  {job.title}" for job in failed), sep="\n", file=sys.stderr)
    return 1 if failed else 0
