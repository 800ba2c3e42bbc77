"""What a sweep runs: pretraining (setup B), perplexity, then every method at every depth and seed, in that order."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from experiment import ExperimentError, Run
from experiment.budget import BUDGET_METHOD, budget_source
from experiment.jobs import Job
from experiment.record import RESULT, TABLE

CONFIGS = Path(__file__).parent.parent / "configs" / "classification"
PUBLISHED_BUDGETS = CONFIGS.parent / "published" / "asi_budgets.yaml"
LAYERS = ("2", "4")  # the papers'; of vanilla they show all layers as well
METHODS = ("vanilla", "gradient_filter_r2", "gradient_filter_r4", "gradient_filter_r7", BUDGET_METHOD, "asi")
RANKED = ("lowrank.ASI", "lowrank.WASI")
CONV_ONLY, LINEAR_ONLY = ("gradient_filter",), ("wsi", "wasi")  # how the names of such methods start
TRANSFORMER_METHODS = ("vanilla", BUDGET_METHOD, "asi", "wsi_0.9", "wasi_0.9")
PERPLEXITY = "perplexity"


def names(kind: str) -> list[str]:
    """Names of the configs of a kind: "data", "methods", "models"."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


@functools.cache
def needs_ranks(method: str) -> bool:
    """Whether a method's config leaves its ranks to a perplexity table and a budget."""
    content = yaml.safe_load((CONFIGS / "methods" / f"{method}.yaml").read_text(encoding="utf-8"))
    chosen = content["model"]["method"]
    return chosen["class_path"] in RANKED and "ranks" not in chosen.get("init_args", {})


@functools.cache
def is_transformer(model: str) -> bool:
    """Whether a network's linear layers are trained, not its convolutions."""
    content = yaml.safe_load((CONFIGS / "models" / f"{model}.yaml").read_text(encoding="utf-8"))
    return content["model"].get("kind") == "linear"


@functools.cache
def _published() -> dict[tuple[str, str, str, str], float]:
    entries = yaml.safe_load(PUBLISHED_BUDGETS.read_text(encoding="utf-8"))
    return {(entry["setup"], entry["model"], entry["dataset"], str(entry["layers"])): entry["mib"] for entry in entries}


def published_budget(setup: str, model: str, dataset: str, layers: str) -> float | None:
    """ASI's published budget in MiB, for the last `layers` layers; None where none is published."""
    return _published().get((setup, model, dataset, layers))


@dataclass(frozen=True)
class Sweep:
    """What to run.

    Attributes:
        setup: "a" or "b".
        model: name of a config in configs/classification/models.
        datasets: names of configs in configs/classification/data.
        methods: names of configs in configs/classification/methods.
        layers: numbers of trailing layers, or "all"; None for the papers': 2 and 4, and vanilla on all as well.
        seeds: the seeds.
        runs_dir: folder that holds all runs.
        budget: ASI's memory: "published", "hosvd" for that of the HOSVD run, or such as "1/22" for that part of the
            vanilla run's. None: the published one where there is one, else "hosvd".
        weights: local file to start from, in place of pretraining or of a download.
        epochs: of every training run, in place of the setup's.
        extra: further arguments for every run.
    """

    setup: str
    model: str
    datasets: tuple[str, ...]
    methods: tuple[str, ...]
    layers: tuple[str, ...] | None
    seeds: tuple[int, ...]
    runs_dir: Path
    budget: str | None = None
    weights: Path | None = None
    epochs: int | None = None
    extra: tuple[str, ...] = ()

    def jobs(self) -> list[Job]:
        """Every run, in an order in which each finds what it needs.

        Raises:
            ExperimentError: a budget that nothing gives.
        """
        return [job for dataset in self.datasets for seed in self.seeds for job in self._jobs(dataset, seed)]

    def _jobs(self, dataset: str, seed: int) -> Iterator[Job]:
        pretrains = self.setup == "b" and self.weights is None
        if pretrains:
            yield self._job("fit", self._run("B-pretrain", dataset, "vanilla", "all", seed), "b_pretrain", [])
        start = ["--model.weights", str(self.weights)] if self.weights is not None else []
        start = self._pretrained(dataset, seed) if pretrains else start
        if any(map(needs_ranks, self.methods)):
            for layers in self.layers or LAYERS:
                options = ["--model.layers", layers, *start]
                run = self._run(self.setup.upper(), dataset, PERPLEXITY, layers, seed)
                yield self._job("measure", run, self.setup, options)
        for method, layers in self._rows():
            options = ["--config", str(CONFIGS / "methods" / f"{method}.yaml"), "--model.layers", layers, *start]
            options += self._budget(dataset, layers, seed) if needs_ranks(method) else []
            run = self._run(self.setup.upper(), dataset, method, layers, seed)
            yield self._job("fit", run, self.setup, options)

    def _rows(self) -> Iterator[tuple[str, str]]:
        """Methods and layers, those that need another run's memory after it."""
        for layers in self.layers or LAYERS:
            for method in sorted(self.methods, key=needs_ranks):
                yield method, layers
        if self.layers is None and "vanilla" in self.methods:
            yield "vanilla", "all"

    def _job(self, command: str, run: Run, setup: str, options: Sequence[str]) -> Job:
        folder = CONFIGS / "setups"
        configs = [folder / f"{setup}.yaml", CONFIGS / "data" / f"{run.dataset}.yaml"]
        configs.append(folder / f"{setup}_{run.dataset}.yaml")
        configs.append(CONFIGS / "models" / f"{self.model}.yaml")  # a network may have to differ from its data set
        configs.append(folder / f"{setup}_{run.dataset}_{self.model}.yaml")
        if command == "measure":
            places = (setup, f"{setup}_{run.dataset}", f"{setup}_{run.dataset}_{self.model}")
            configs += [CONFIGS / "perplexity" / f"{name}.yaml" for name in places]
        configs = [path for path in configs if path.exists()]
        arguments = [command, *(word for path in configs for word in ("--config", str(path)))]
        arguments += ["--seed_everything", str(run.seed), "--runs_dir", str(self.runs_dir), *options]
        if command == "fit" and self.epochs is not None:
            arguments += ["--trainer.max_epochs", str(self.epochs)]
        result = TABLE if run.method == PERPLEXITY else RESULT
        return Job(_title(run), run, (*arguments, *self.extra), result)

    def _run(self, setup: str, dataset: str, method: str, layers: str, seed: int) -> Run:
        count: int | str = layers if layers == "all" else int(layers)
        return Run("classification", setup, self.model, dataset, method, count, seed)

    def _pretrained(self, dataset: str, seed: int) -> list[str]:
        folder = self._run("B-pretrain", dataset, "vanilla", "all", seed).folder(self.runs_dir)
        return ["--model.weights", str(folder / "checkpoints" / "best.ckpt")]

    def _budget(self, dataset: str, layers: str, seed: int) -> list[str]:
        setup = self.setup.upper()
        table = self._run(setup, dataset, PERPLEXITY, layers, seed).folder(self.runs_dir) / TABLE
        words = ["--model.budget.table", str(table)]
        where = f"{self.model} on {dataset}, setup {setup}, last {layers}"
        mib = published_budget(setup, self.model, dataset, layers)
        method, divisor = budget_source(self.budget, mib is not None)
        if method is None and mib is None:
            raise ExperimentError(f"no budget is published for {where}; take it from HOSVD's run: BUDGET=hosvd")
        if method is None:
            return [*words, "--model.budget.mib", str(mib)]
        if method not in self.methods:
            raise ExperimentError(f"asi takes its budget for {where} from {method}; add it to the methods")
        words += ["--model.budget.run", str(self._run(setup, dataset, method, layers, seed).folder(self.runs_dir))]
        return [*words, *(["--model.budget.divisor", str(divisor)] if divisor > 1 else [])]


def _title(run: Run) -> str:
    if run.setup.endswith("pretrain"):
        return f"{run.dataset}: pretrain, seed {run.seed}"
    return f"{run.dataset}: {run.method}, last {run.layers}, seed {run.seed}"
