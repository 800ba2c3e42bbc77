"""Sweeps of every task: their options, and their runs in an order in which each finds what it needs.

A task says what comes ahead of its runs, such as pretraining, and how its command line spells a run. What is shared:
tables of perplexity where a method needs ranks, then every method at every depth, budget and seed.
"""

from __future__ import annotations

import argparse
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from experiment.budget import BUDGET_HELP, Source, budget_source, budget_word
from experiment.command import dashed, folder_word, one_line
from experiment.errors import ExperimentError, is_mendable
from experiment.files import place_of, try_place
from experiment.jobs import WAIT, WAIT_HELP, Job, Program, list_jobs
from experiment.launcher import Launcher, add_options, launcher_of, take_slurm
from experiment.method import derives, leaves_ranks, table_tag
from experiment.plan import plan_of
from experiment.record import RESULT, TABLE, Run

SEED = 233  # the papers' seed
# Options of single runs that would make a sweep's runs others than it names, each with the sweep's own in their place.
OWN_OPTIONS = {
    **{"--seed-everything": "--seeds", "--seed": "--seeds", "--setup": "--setup", "--model.backbone": "--model"},
    **{"--data.dataset": "--dataset", "--model.layers": "--layers", "--model.method": "--methods"},
    **{"--model.budget": "--budget", "--budget": "--budget", "--model.derive": "--methods", "--derive": "--methods"},
    # As configs have them, see `Sweep.settings_in`.
    **{"--dataset": "--dataset", "--network": "--model", "--layers": "--layers", "--randomness.seed": "--seeds"},
    **{"--lowrank.method": "--methods", "--lowrank.budget": "--budget", "--perplexity.derive": "--methods"},
    # What is in the name of a method, by which a run is looked for.
    **{"--model.fuse": "--methods", "--model.rank-choice": "--methods", "--lowrank.fuse": "--methods"},
    **{"--stage": "", "--depths": "", "--custom-hooks": ""},
}
# Those that it sets only where it is asked to, or not for every run.
_WHERE_SET = {
    **{"--trainer.max-epochs": "--epochs", "--model.weights": "--weights", "--load-from": "--weights"},
    **{"--data.root": "--data-dir", "--work-dir": "--runs-dir", "--runs-dir": "--runs-dir"},
}


@dataclass(frozen=True, kw_only=True)
class Sweep(ABC):
    """What to run.

    Attributes:
        model: name of a network's config.
        datasets: names of configs of data sets.
        methods: names of configs of methods.
        layers: numbers of trailing layers, or "all"; None for the task's usual ones.
        seeds: the seeds.
        runs_dir: folder that holds all runs.
        data_dir: folder that holds all data sets; None for the task's usual one.
        length: of every training run, in the unit of the task, in place of the recipe's.
        budgets: words for the memory of methods that take ranks, see `experiment.budget.budget_source`; none for the
            published one where there is one, else that of the HOSVD run.
        weights: what to start from, in place of the task's usual way.
        extra: further arguments for every run.
        launcher: who does the runs.
    """

    model: str
    datasets: tuple[str, ...]
    methods: tuple[str, ...]
    layers: tuple[str, ...] | None
    seeds: tuple[int, ...]
    runs_dir: Path
    data_dir: str | None = None
    length: int | None = None
    budgets: tuple[str, ...] = ()
    weights: str | None = None
    extra: tuple[str, ...] = ()
    launcher: Launcher = field(default_factory=Launcher)

    task: ClassVar[str]
    budget_option: ClassVar[str]  # how options of a budget begin
    derive_option: ClassVar[str]  # measures what methods with `derive` need

    @property
    def depth_of_all(self) -> float:
        """A depth that the network is known to have; a deeper run is checked before the sweep begins."""
        return math.inf

    @property
    @abstractmethod
    def setup(self) -> str:
        """The setup of the runs, as records say it."""

    @abstractmethod
    def stages(self, dataset: str, seed: int) -> Iterator[Job]:
        """What comes ahead of the runs on a data set with a seed; the same job may come for several seeds."""

    @abstractmethod
    def start(self, dataset: str, seed: int) -> list[str]:
        """The arguments that say what weights the runs start from."""

    @abstractmethod
    def arguments(self, command: str, run: Run, method: str) -> list[str]:
        """The command of a run but for where it starts and its budget; `method` is the name of a config."""

    @abstractmethod
    def method_config(self, method: str) -> Mapping[str, Any]:
        """The method in a config of this name, as `experiment.method.build_method` takes it."""

    @abstractmethod
    def published(self, dataset: str, layers: str) -> float | None:
        """The published budget in MiB, if there is one."""

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, str]]:
        """Depths and methods of the runs, those that need another run's memory after it."""

    def settings_in(self, extra: Sequence[str]) -> Iterator[tuple[str, str]]:
        """What further arguments set otherwise than by options of their own, as in a config that they name: each
        setting as an option with dashes, and how an error names it."""
        return iter(())

    def table_seed(self, seed: int) -> int:
        """The seed of the perplexity table that runs with a seed use."""
        return seed

    def jobs(self) -> list[Job]:
        """Every run, in an order in which each finds what it needs.

        Raises:
            ExperimentError: a budget that nothing gives, or nothing to start from.
        """
        every = (job for dataset in self.datasets for seed in self.seeds for job in self._jobs(dataset, seed))
        return list(dict.fromkeys(every))

    def _jobs(self, dataset: str, seed: int) -> Iterator[Job]:
        yield from self.stages(dataset, seed)
        start, rows = self.start(dataset, seed), list(self.rows())
        ranked = [(layers, self.derives(method)) for layers, method in rows if self.leaves_ranks(method)]
        for layers, derive in dict.fromkeys(ranked):
            options = [*start, *((self.derive_option, str(derive).lower()) if derive else ())]
            yield self.job("measure", self._table(dataset, layers, seed, derive), "vanilla", options)
        for layers, method in rows:
            for source in self._sources(dataset, layers) if self.leaves_ranks(method) else [None]:
                tag = method if source is None else f"{method}_{source.tag}"
                table = self._table(dataset, layers, seed, self.derives(method))
                budget = [] if source is None else self._budget(source, dataset, layers, seed, table)
                yield self.job("fit", self.run(dataset, tag, layers, seed), method, [*start, *budget])

    def leaves_ranks(self, method: str) -> bool:
        """Whether a method of this name takes its ranks from a budget."""
        return leaves_ranks(self.method_config(method))

    def derives(self, method: str) -> bool | int:
        """With which `derive` the table of a method of this name is measured."""
        return derives(self.method_config(method))

    def job(self, command: str, run: Run, method: str, options: Sequence[str]) -> Job:
        """One run by its command, "fit" or "measure", as the task spells it."""
        words = (*self.arguments(command, run, method), *options, *self.extra)
        return Job(_title(run), run, words, TABLE if command == "measure" else RESULT)

    def run(self, dataset: str, method: str, layers: str, seed: int, setup: str | None = None) -> Run:
        """A run of this sweep; `setup` is of the runs if it is not given."""
        count: int | str = layers if layers == "all" else int(layers)
        return Run(self.task, setup or self.setup, self.model, dataset, method, count, seed)

    def _sources(self, dataset: str, layers: str) -> list[Source]:
        where = f"{self.model} on {dataset}, setup {self.setup}, last {layers}"
        words: Sequence[str | None] = self.budgets or (None,)
        sources = [budget_source(word, self.published(dataset, layers), where) for word in words]
        for source in sources:
            if source.method is not None and source.method not in self.methods:
                raise ExperimentError(
                    f"the budget for {where} is taken from {source.method}; add it to --methods, or give another "
                    f"--budget"
                )
        return sources

    def _table(self, dataset: str, layers: str, seed: int, derive: bool | int) -> Run:
        return self.run(dataset, table_tag(derive), layers, self.table_seed(seed))

    def _budget(self, source: Source, dataset: str, layers: str, seed: int, table: Run) -> list[str]:
        told = {"table": str(table.folder(self.runs_dir) / TABLE)}
        if source.method is None:
            told |= {"mib": str(source.mib)} | ({"name": source.name} if source.name else {})
        else:
            told["run"] = str(self.run(dataset, source.method, layers, seed).folder(self.runs_dir))
        if source.divisor > 1:
            told["divisor"] = str(source.divisor)
        return [word for name, value in told.items() for word in (f"{self.budget_option}{name}", value)]


Kind = TypeVar("Kind", bound=Sweep)


def _title(run: Run) -> str:
    stage = run.setup.rpartition("-")[2]
    what = stage if stage in ("pretrain", "calibrate") else f"{run.method}, last {run.layers}"
    return f"{run.dataset}: {what}, seed {run.seed}"


def sweep_parser(
    program: str, description: str | None, methods: Sequence[str], defaults: str
) -> argparse.ArgumentParser:
    """The options that sweeps of every task have; a task adds its own.

    Args:
        program: what a user types ahead of `sweep`.
        description: of the command.
        methods: names of all configs of methods.
        defaults: says which of them are the default.
    """
    parser = argparse.ArgumentParser(
        prog=f"{program} sweep",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    listed = f"of {', '.join(methods)} (default: {defaults})"
    parser.add_argument("--methods", nargs="+", choices=methods, metavar="METHOD", help=listed)
    parser.add_argument("--seeds", nargs="+", type=seed_word, default=[SEED], metavar="SEED", help=f"(default: {SEED})")
    parser.add_argument("--budget", nargs="+", type=budget_word, metavar="BUDGET", default=[], help=BUDGET_HELP)
    parser.add_argument("--runs-dir", type=folder_word, default=Path("runs"), help="folder of all runs (default: runs)")
    parser.add_argument(
        "--data-dir", type=folder_word, metavar="DIR", help="folder that holds all data sets (default: data)"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs, and stop")
    parser.add_argument(WAIT, action="store_true", help=WAIT_HELP)
    add_options(parser)
    return parser


def seed_word(text: str) -> int:
    """A seed, as a command line takes it."""
    return _whole(text, 0, 2**32 - 1)  # numpy's generators have no others


def length_word(text: str) -> int:
    """How long a run is, in epochs or iterations, as a command line takes it."""
    return _whole(text, 1, 10**9)


def _whole(text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
    return int(text)


def shared_settings(options: argparse.Namespace, extra: Sequence[str]) -> dict[str, Any]:
    """What the shared options say of a sweep."""
    return {
        "model": options.model,
        "methods": tuple(dict.fromkeys(options.methods)),
        "seeds": tuple(dict.fromkeys(options.seeds)),
        "runs_dir": options.runs_dir,
        "data_dir": None if options.data_dir is None else str(options.data_dir),
        "budgets": tuple(dict.fromkeys(options.budget)),
        "weights": options.weights,
        "extra": tuple(extra),
        "launcher": launcher_of(options),
    }


def parsed(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    sweep_of: Callable[[argparse.Namespace, list[str]], Kind],
    check: Callable[[Sequence[str]], None],
) -> tuple[Kind, bool]:
    """The sweep that arguments describe, and whether only to list it; exits where they cannot work.

    Args:
        parser: see `sweep_parser`.
        arguments: of the command.
        sweep_of: makes the sweep of the parsed options and of the arguments that are not of a sweep.
        check: raises what is wrong with a run's arguments, so that a typo in what goes to every run is an error of the
            sweep.
    """
    words, slurm = take_slurm([word for word in dashed(arguments) if word != "--"])
    options, extra = parser.parse_known_args(words, argparse.Namespace(slurm=slurm))
    try:
        sweep = sweep_of(options, extra)
        jobs = sweep.jobs()
        told = [*((word.partition("=")[0],) * 2 for word in extra), *sweep.settings_in(extra)]
        refuse_own(told, {word for job in jobs for word in job.arguments[: len(job.arguments) - len(extra)]})
    except ExperimentError as error:
        parser.error(str(error))
    looked_at = {job.arguments[0]: job for job in reversed(jobs)} if extra else {}
    depths = {job.run.layers: job for job in jobs if isinstance(job.run.layers, int)}
    if depths and max(depths) > sweep.depth_of_all:
        looked_at["the deepest"] = depths[max(depths)]
    if looked_at and not all(job.known(sweep.runs_dir) for job in jobs):
        for job in looked_at.values():
            try:
                check(job.arguments)
            except Exception as error:
                if is_mendable(error):
                    parser.error(one_line(error))
                raise
    return sweep, options.dry_run


def refuse_own(extra: Iterable[tuple[str, str]], given: Collection[str]) -> None:
    """Refuse arguments of every run that say what the sweep says itself, as they would go over it.

    Args:
        extra: what arguments that go to every run set: options, with dashes, and how an error names each.
        given: words of the runs' commands without them.

    Raises:
        ExperimentError: there is one; names the sweep's own option for it.
    """
    named = {dashed([word])[0] for word in given if word.startswith("--")}
    for option, shown in extra:
        own = next((own for start, own in OWN_OPTIONS.items() if _is_or_of(option, start)), None)
        if own is None and option in named and option not in ("--config", "-c"):
            own = _WHERE_SET.get(option, "")
        if own is not None:
            instead = f"give {own} of the sweep in its place" if own else "leave it out"
            raise ExperimentError(f"{shown} is set by the sweep for each of its runs; {instead}")


def _is_or_of(option: str, start: str) -> bool:
    """Whether an option is this one, or one of its settings, such as --model.budget.mib or --budget-mib."""
    return option.startswith(start) and option[len(start) :][:1] in ("", ".", "+", "-")


def numbers(words: Sequence[str]) -> tuple[str, ...]:
    """The numbers of layers that words stand for: "4", "all", or each of "1-14".

    Raises:
        ExperimentError: a word that stands for none.
    """
    return tuple(dict.fromkeys(number for word in words for number in _numbers(word)))


def _numbers(word: str) -> list[str]:
    low, dash, high = word.partition("-")
    if word == "all":
        return [word]
    if not (low.isdecimal() and (high.isdecimal() if dash else True)) or int(low) < 1 or int(high or low) < int(low):
        raise ExperimentError(f"--layers has {word!r}; allowed are whole numbers from 1, ranges such as 1-14, or 'all'")
    return [str(number) for number in range(int(low), int(high or low) + 1)]


def do_sweep(sweep: Sweep, dry_run: bool, program: Program) -> int:
    """Run or list a sweep; the exit code as of `experiment.jobs.run_jobs`.

    Raises:
        ExperimentError: there are no such weights to start from, or the folder of the runs cannot be written.
    """
    jobs = sweep.jobs()
    lost = sweep.weights is not None and "://" not in sweep.weights and not Path(sweep.weights).is_file()
    if lost and not all(job.known(sweep.runs_dir) for job in jobs):  # a finished sweep needs none
        raise ExperimentError(f"--weights {sweep.weights}: there is no such file; every run would start from it")
    if dry_run:
        _require_places(sweep.runs_dir, [job.run for job in jobs if not job.done(sweep.runs_dir)])
        list_jobs(jobs, program)
        return 0
    return sweep.launcher.run(jobs, program, sweep.runs_dir)


def _require_places(root: Path, runs: Sequence[Run]) -> None:
    """Refuse folders of runs, or of the plans of these, that cannot be made or written."""
    wanted = dict.fromkeys(folder for run in runs for folder in (plan_of(run, root).parent, run.folder(root)))
    shown = root
    try:
        for place in dict.fromkeys(map(place_of, wanted)):
            shown = place if root in place.parents else root
            try_place(place)
    except OSError as error:
        raise ExperimentError(f"{shown} cannot be written ({error.strerror}); give another --runs-dir") from None
