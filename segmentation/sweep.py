"""Many runs by one command: pretrain (digit scenes), calibrate, measure perplexity, train every method, depth and seed.

Each run goes through the ordinary command line, so a run of a sweep and a run by hand are the same run: what is done is
skipped, what was interrupted is resumed. A failure stops only runs that need that one. Arguments that are not of this
command, such as --amp, go to every run.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from experiment import ExperimentError, Run
from experiment.checkpoints import FINAL
from experiment.command import dashed, importing
from experiment.jobs import Command, Job, Program
from experiment.sweep import SEED, do_sweep, length_word, parsed, shared_settings, sweep_parser
from experiment.sweep import Sweep as AnySweep
from segmentation import register
from segmentation.compose import CONFIGS, load_config

PUBLISHED_ON = "voc12aug"
BUDGETS = CONFIGS.parent / "published" / "segmentation_budgets.yaml"
PRETRAINED_ON = {name: f"{name}_pretrain" for name in ("digit_scenes", "digit_scenes_96")}
PROGRAM = "python -m segmentation"
OVERRIDE = "--cfg-options"


@dataclass(frozen=True, kw_only=True)
class Sweep(AnySweep):
    """A sweep over configs in configs/segmentation: depths are "5", "10" and, of vanilla alone, "all".

    All runs start from the same calibrated weights: the network's own, for digit scenes those of a pretraining run, or
    `weights`, fitted to the classes of the data set. Ranks are chosen by one perplexity table for all seeds.
    """

    layers: tuple[str, ...]

    task: ClassVar[str] = "segmentation"
    budget_option: ClassVar[str] = "--budget-"
    derive_option: ClassVar[str] = "--derive"
    setup: ClassVar[str] = "finetune"

    def stages(self, dataset: str, seed: int) -> Iterator[Job]:
        """Pretraining where there are no weights, and calibration: the same for every seed."""
        source = PRETRAINED_ON.get(dataset)
        weights = self.weights or (None if source else self._published_weights(dataset))
        if weights is None:
            assert source is not None
            pretraining = self.run(source, "vanilla", "all", SEED, "pretrain")
            yield self.job("fit", pretraining, "vanilla", [])
            weights = str(pretraining.folder(self.runs_dir) / FINAL)
        yield self.job("fit", self._calibration(dataset), "vanilla", ["--load-from", weights])

    def start(self, dataset: str, seed: int) -> list[str]:
        """The calibrated weights."""
        return ["--load-from", str(self._calibration(dataset).folder(self.runs_dir) / FINAL)]

    def _calibration(self, dataset: str) -> Run:
        return self.run(dataset, "vanilla", "all", SEED, "calibrate")

    def _published_weights(self, dataset: str) -> str:
        weights: str | None = load_config([CONFIGS / "networks" / f"{self.model}.py"]).get("weights")
        if weights is None or dataset == "cityscapes":
            raise ExperimentError(f"{self.model} on {dataset} needs weights to start from; give --weights FILE")
        return weights

    def table_seed(self, seed: int) -> int:
        """One table for all seeds, as they start from the same weights."""
        return SEED

    def rows(self) -> Iterator[tuple[str, str]]:
        """Depths and methods of the runs, those that need another run's memory after it."""
        for layers in self.layers:
            for method in sorted(self.methods, key=self.leaves_ranks):
                if layers != "all" or method == "vanilla":
                    yield layers, method

    def method_config(self, method: str) -> Mapping[str, Any]:
        """The method in a config of this name."""
        config: Mapping[str, Any] = _config(method).lowrank.method
        return config

    def settings_in(self, extra: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Those of `--cfg-options`."""
        option = ""
        for word in extra:
            option = word.partition("=")[0] if word.startswith("--") else option
            key = word.removeprefix(f"{OVERRIDE}=").partition("=")[0]
            if option == OVERRIDE and not key.startswith("--"):
                yield dashed([f"--{key}"])[0], f"{OVERRIDE} {key}"

    def published(self, dataset: str, layers: str) -> float | None:
        """The published budget in MiB, if there is one."""
        return published_budget(self.model, dataset, layers)

    def arguments(self, command: str, run: Run, method: str) -> list[str]:
        """The command of a run but for where it starts and its budget."""
        files = [CONFIGS / "networks" / f"{self.model}.py", CONFIGS / "data" / f"{run.dataset}.py"]
        places = (run.setup, f"{run.setup}_{self.model}", f"{run.setup}_{run.dataset}")
        files += [path for name in places if (path := CONFIGS / "stages" / f"{name}.py").exists()]
        words = [*map(str, files), str(CONFIGS / "methods" / f"{method}.py")]
        words += [] if run.setup == "calibrate" else ["--layers", str(run.layers)]
        words += ["--seed", str(run.seed), "--runs-dir", str(self.runs_dir)]
        words += ["--data-dir", self.data_dir] if self.data_dir is not None else []
        if command == "fit" and run.setup == self.setup and self.length is not None:
            words += ["--iterations", str(self.length)]
        return ["train" if command == "fit" else command, *words]


@functools.cache
def _config(method: str) -> Any:
    return load_config([CONFIGS / "methods" / f"{method}.py"])


@functools.cache
def _published() -> dict[str, dict[int, float]]:
    budgets: dict[str, dict[int, float]] = yaml.safe_load(BUDGETS.read_text(encoding="utf-8"))
    return budgets


def published_budget(network: str, dataset: str, layers: str) -> float | None:
    """ASI's memory budget as published, in MiB; None where none is."""
    depths = _published().get(network, {}) if dataset == PUBLISHED_ON and layers != "all" else {}
    return depths.get(int(layers)) if depths else None


def names(kind: str) -> list[str]:
    """Names of the configs of a kind: "data", "methods", "networks"."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.py"))


def parse(arguments: Sequence[str]) -> tuple[Sweep, bool]:
    """The sweep that the arguments describe, and whether only to list it."""
    methods = names("methods")
    parser = sweep_parser(PROGRAM, __doc__, methods, "all of them")
    parser.add_argument("--model", "--network", choices=names("networks"), required=True, help="name of a network")
    parser.add_argument("--dataset", choices=names("data"), required=True)
    depths = ("5", "10", "all")
    parser.add_argument("--layers", nargs="+", choices=depths, default=depths[:2], metavar="N", help="(default: 5 10)")
    parser.add_argument("--weights", metavar="FILE", help="what to calibrate (default: published or pretrained here)")
    iterations = "length of the fine-tuning runs (default: the recipe's)"
    parser.add_argument("--iterations", type=length_word, metavar="N", help=iterations)

    def sweep_of(options: argparse.Namespace, extra: list[str]) -> Sweep:
        options.methods = options.methods or methods
        return Sweep(
            datasets=(options.dataset,),
            layers=tuple(dict.fromkeys(options.layers)),
            length=options.iterations,
            **shared_settings(options, extra),
        )

    return parsed(parser, arguments, sweep_of, _check)


def _check(arguments: Sequence[str]) -> None:
    """Raise what is wrong with the options and settings of a run, and with the parts that they describe."""
    from segmentation.cli import config_of, parser

    config = config_of(parser().parse_args(arguments))
    if arguments[0] == "train":
        with importing():
            register()
            from segmentation.building import mendable_parts
            from segmentation.network import require_buildable  # takes seconds

        with mendable_parts():
            require_buildable(config)


def main(arguments: Sequence[str], command: Command) -> int:
    """Run a sweep. Returns 0, or 1 after a list of what is not done.

    Raises:
        ExperimentError: the folder of the runs cannot be written.
    """
    return do_sweep(*parse(arguments), Program(PROGRAM, command))
