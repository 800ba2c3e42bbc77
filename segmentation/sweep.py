"""Many runs by one command: pretrain (digit scenes), calibrate, measure perplexity, train every method, depth and seed.

Each run goes through the ordinary command line, so a run of a sweep and a run by hand are the same run: what is done is
skipped, what was interrupted is resumed. A run that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from experiment import ExperimentError, Run
from experiment.budget import BUDGET_HELP, budget_source, budget_word
from experiment.jobs import Command, Job, Program, list_jobs, run_jobs
from experiment.record import RESULT
from segmentation.compose import CONFIGS, load_config
from segmentation.training import FINAL, TABLE

PUBLISHED_ON = "voc12aug"
BUDGETS = CONFIGS.parent / "published" / "segmentation_budgets.yaml"
PRETRAINED_ON = {"digit_scenes": "digit_scenes_pretrain"}
PROGRAM = "python -m segmentation"
SEED = 233  # the papers' seed, and that of what all seeds start from


@dataclass(frozen=True)
class Sweep:
    """What to run.

    Attributes:
        network, dataset: names of configs in configs/segmentation.
        methods: names of configs in configs/segmentation/methods.
        layers: depths, "5", "10" or "all"; with "all" only vanilla training.
        seeds: the seeds of the fine-tuning runs; they start from the same calibrated weights.
        runs_dir, data_dir: folders that hold all runs and all data sets.
        weights: what to calibrate: a file or an address. None: the network's own, for digit scenes a pretraining run.
        iterations: length of the fine-tuning runs; None: the recipe's.
        budget: ASI's memory: "published", "hosvd" for that of the HOSVD run, or such as "1/22" for that part of the
            vanilla run's. None: the published one where there is one, else "hosvd".
        extra: further arguments for every fine-tuning run.
    """

    network: str
    dataset: str
    methods: tuple[str, ...]
    layers: tuple[str, ...]
    seeds: tuple[int, ...]
    runs_dir: Path
    data_dir: Path
    weights: str | None = None
    iterations: int | None = None
    budget: str | None = None
    extra: tuple[str, ...] = ()

    def jobs(self) -> Iterator[Job]:
        """Every run, in an order in which each finds what it needs.

        Raises:
            ExperimentError: there are no weights to start from.
        """
        source = PRETRAINED_ON.get(self.dataset)
        weights = self.weights or (None if source else self._published_weights())
        if weights is None:
            assert source is not None
            yield self._job("train", "pretrain", "pretrain", source, "vanilla", "all", SEED, [])
            weights = str(self._folder("pretrain", source, "vanilla", "all", SEED) / FINAL)
        start = ["--load-from", weights]
        yield self._job("train", "calibrate", "calibrate", self.dataset, "vanilla", None, SEED, start)
        start = ["--load-from", str(self._folder("calibrate", self.dataset, "vanilla", "all", SEED) / FINAL)]
        depths = [layers for layers in self.layers if layers != "all"]
        for layers in depths if any(map(needs_ranks, self.methods)) else []:
            title = f"perplexity, last {layers}"
            yield self._job("measure", title, "finetune", self.dataset, "vanilla", layers, SEED, start)
        if self.iterations is not None:
            start += ["--iterations", str(self.iterations)]
        for seed in self.seeds:
            for layers in self.layers:
                for method in sorted(self.methods, key=needs_ranks):  # ASI needs the budget's run
                    if layers == "all" and method != "vanilla":
                        continue
                    options = start + (self._budget(layers, seed) if needs_ranks(method) else []) + list(self.extra)
                    title = f"{method}, {'all layers' if layers == 'all' else f'last {layers}'}"
                    yield self._job("train", title, "finetune", self.dataset, method, layers, seed, options)

    def _job(
        self,
        command: str,
        title: str,
        stage: str,
        dataset: str,
        method: str,
        layers: str | None,
        seed: int,
        options: Sequence[str],
    ) -> Job:
        files = [CONFIGS / "networks" / f"{self.network}.py", CONFIGS / "data" / f"{dataset}.py"]
        stages = [
            CONFIGS / "stages" / f"{name}.py" for name in (stage, f"{stage}_{self.network}", f"{stage}_{dataset}")
        ]
        files += [path for path in stages if path.exists()] + [CONFIGS / "methods" / f"{method}.py"]
        arguments = [command, *map(str, files), *(["--layers", layers] if layers else []), "--seed", str(seed)]
        arguments += ["--runs-dir", str(self.runs_dir), "--data-dir", str(self.data_dir), "--resume", *options]
        measuring = command == "measure"
        run = self._run(stage, dataset, "perplexity" if measuring else method, layers or "all", seed)
        return Job(f"{title}, seed {seed}", run, tuple(arguments), TABLE if measuring else RESULT)

    def _run(self, stage: str, dataset: str, method: str, layers: str, seed: int) -> Run:
        count: int | str = layers if layers == "all" else int(layers)
        return Run("segmentation", stage, self.network, dataset, method, count, seed)

    def _folder(self, stage: str, dataset: str, method: str, layers: str, seed: int) -> Path:
        return self._run(stage, dataset, method, layers, seed).folder(self.runs_dir)

    def _published_weights(self) -> str:
        weights: str | None = load_config([CONFIGS / "networks" / f"{self.network}.py"]).get("weights")
        if weights is None or self.dataset == "cityscapes":
            raise ExperimentError(f"{self.network} on {self.dataset} needs weights to start from; give --weights FILE")
        return weights

    def _budget(self, layers: str, seed: int) -> list[str]:
        table = ["--budget-table", str(self._folder("finetune", self.dataset, "perplexity", layers, SEED) / TABLE)]
        method, divisor = self.budget_source
        if method is None:
            return [*table, "--budget-mib", str(published_budget(self.network, int(layers)))]
        run = ["--budget-run", str(self._folder("finetune", self.dataset, method, layers, seed))]
        return [*table, *run, *(["--budget-divisor", str(divisor)] if divisor > 1 else [])]

    @property
    def budget_source(self) -> tuple[str | None, int]:
        """The method whose runs give ASI its budget, None if it is the published one; and what it is divided by."""
        return budget_source(self.budget, self.dataset == PUBLISHED_ON and self.network in _published())


@functools.cache
def needs_ranks(method: str) -> bool:
    """Whether a method's config leaves its ranks to a perplexity table and a budget."""
    settings = load_config([CONFIGS / "methods" / f"{method}.py"])["lowrank"]["method"]
    return settings["type"] == "ASI" and "ranks" not in settings


@functools.cache
def _published() -> dict[str, dict[int, float]]:
    budgets: dict[str, dict[int, float]] = yaml.safe_load(BUDGETS.read_text(encoding="utf-8"))
    return budgets


def published_budget(network: str, layers: int) -> float:
    """ASI's memory budget as published, in MiB.

    Raises:
        ExperimentError: there is none for this network and depth.
    """
    try:
        return _published()[network][layers]
    except KeyError:
        raise ExperimentError(f"no published budget for {network} at {layers} layers in {BUDGETS}") from None


def parse(arguments: Sequence[str]) -> tuple[Sweep, bool]:
    """The sweep that the arguments describe, and whether only to list it."""
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} sweep", description=__doc__)
    names: Callable[[str], list[str]] = lambda kind: sorted(path.stem for path in (CONFIGS / kind).glob("*.py"))  # noqa: E731
    methods = names("methods")
    parser.add_argument("--network", choices=names("networks"), required=True)
    parser.add_argument("--dataset", choices=names("data"), required=True)
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, metavar="METHOD")
    parser.add_argument("--layers", nargs="+", choices=("5", "10", "all"), default=["5", "10"], metavar="N")
    parser.add_argument("--seeds", nargs="+", type=int, default=[SEED], metavar="SEED")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--weights", metavar="FILE", help="what to calibrate (default: published or pretrained here)")
    parser.add_argument("--iterations", type=int, help="length of the fine-tuning runs (default: the recipe's)")
    parser.add_argument("--budget", type=budget_word, help=BUDGET_HELP)
    parser.add_argument("--dry-run", action="store_true", help="list the runs, and stop")
    options, extra = parser.parse_known_args(arguments)
    sweep = Sweep(
        network=options.network,
        dataset=options.dataset,
        methods=tuple(options.methods),
        layers=tuple(options.layers),
        seeds=tuple(options.seeds),
        runs_dir=options.runs_dir,
        data_dir=options.data_dir,
        weights=options.weights,
        iterations=options.iterations,
        budget=options.budget,
        extra=tuple(extra),
    )
    needed, _ = sweep.budget_source
    if any(map(needs_ranks, sweep.methods)) and needed is not None and needed not in sweep.methods:
        parser.error(f"asi takes its budget from {needed}; add it to --methods, or give another --budget")
    return sweep, options.dry_run


def sweep(arguments: Sequence[str], command: Command, mendable: tuple[type[Exception], ...]) -> int:
    """Run a sweep. Returns 0, or 1 after a list of what failed.

    Raises:
        ExperimentError: there are no weights to start from, or no published budget.
    """
    plan, dry_run = parse(arguments)
    jobs = list(plan.jobs())
    if dry_run:
        list_jobs(jobs, PROGRAM)
        return 0
    program = Program(PROGRAM, command, lambda error: isinstance(error, mendable))
    return run_jobs(jobs, program, plan.runs_dir)
