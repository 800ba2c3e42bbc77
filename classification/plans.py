"""What a sweep runs: pretraining (setup B), perplexity, then every method at every depth and seed, in that order."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from classification.config_files import settings_in
from experiment import ExperimentError, Run
from experiment.budget import BUDGET_METHOD
from experiment.jobs import Job
from experiment.strict_yaml import check_yaml_file
from experiment.sweep import Sweep as AnySweep

CONFIGS = Path(__file__).parent.parent / "configs" / "classification"
PUBLISHED_BUDGETS = CONFIGS.parent / "published" / "asi_budgets.yaml"
LAYERS = ("2", "4")  # the papers'; of vanilla they show all layers as well
DEEP = {  # networks that have so many layers
    *("efficientnet_lite0", "llama_mini", "mcunet", "minilm", "mobilenet_v2", "resnet18", "resnet34", "swin_mini"),
    *("swin_t", "tinyllama", "vit_b_32", "vit_mini"),
}
METHODS = ("vanilla", "gradient_filter_r2", "gradient_filter_r4", "gradient_filter_r7", BUDGET_METHOD, "asi")
TRANSFORMER_METHODS = ("vanilla", BUDGET_METHOD, "asi", "wsi_0.9", "wasi_0.9")


def names(kind: str) -> list[str]:
    """Names of the configs of a kind: "data", "methods", "models"."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


@functools.cache
def _model_settings(kind: str, name: str) -> dict[str, Any]:
    path = CONFIGS / kind / f"{name}.yaml"
    check_yaml_file(path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings = content.get("model") if isinstance(content, dict) else None
    if not isinstance(settings, dict):
        raise ExperimentError(f"config {path} has no settings of `model`; write them as those beside it are")
    return settings


def is_transformer(model: str) -> bool:
    """Whether a network's linear layers are trained, not its convolutions."""
    return _model_settings("models", model).get("kind") == "linear"


@functools.cache
def _published() -> dict[tuple[str, str, str, str], float]:
    entries = yaml.safe_load(PUBLISHED_BUDGETS.read_text(encoding="utf-8"))
    return {(entry["setup"], entry["model"], entry["dataset"], str(entry["layers"])): entry["mib"] for entry in entries}


def published_budget(setup: str, model: str, dataset: str, layers: str) -> float | None:
    """ASI's published budget in MiB, for the last `layers` layers; None where none is published."""
    return _published().get((setup, model, dataset, layers))


@dataclass(frozen=True, kw_only=True)
class Sweep(AnySweep):
    """A sweep over configs in configs/classification.

    Attributes:
        stage: "a" or "b".
    """

    stage: str

    task: ClassVar[str] = "classification"
    budget_option: ClassVar[str] = "--model.budget."
    derive_option: ClassVar[str] = "--model.derive"

    @property
    def depth_of_all(self) -> float:
        """The depth that the network is known to have; it takes seconds to see whether one of one's own has it."""
        return max(map(int, LAYERS)) if self.model in DEEP else 0

    @property
    def setup(self) -> str:
        """The setup of the runs, as records say it."""
        return self.stage.upper()

    def stages(self, dataset: str, seed: int) -> Iterator[Job]:
        """Pretraining in setup B, unless there are weights to start from."""
        if self._pretrains:
            yield self.job("fit", self._pretraining(dataset, seed), "", [])

    def start(self, dataset: str, seed: int) -> list[str]:
        """The weights that were given, or those of the pretraining."""
        if self.weights is not None:
            return ["--model.weights", self.weights]
        folder = self._pretraining(dataset, seed).folder(self.runs_dir)
        return ["--model.weights", str(folder / "checkpoints" / "best.ckpt")] if self._pretrains else []

    @property
    def _pretrains(self) -> bool:
        return self.stage == "b" and self.weights is None

    def _pretraining(self, dataset: str, seed: int) -> Run:
        return self.run(dataset, "vanilla", "all", seed, "B-pretrain")

    def rows(self) -> Iterator[tuple[str, str]]:
        """Depths and methods of the runs, those that need another run's memory after it."""
        for layers in self.layers or LAYERS:
            for method in sorted(self.methods, key=self.leaves_ranks):
                yield layers, method
        if self.layers is None and "vanilla" in self.methods:
            yield "all", "vanilla"

    def method_config(self, method: str) -> Mapping[str, Any]:
        """The method in a config of this name."""
        config = _model_settings("methods", method).get("method")
        if not isinstance(config, dict):
            path = CONFIGS / "methods" / f"{method}.yaml"
            raise ExperimentError(f"config {path} has no settings of `model.method`; write them as those beside it are")
        return config

    def settings_in(self, extra: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Those in configs, and in options that are groups of settings."""
        return settings_in(extra)

    def published(self, dataset: str, layers: str) -> float | None:
        """The published budget in MiB, if there is one."""
        return published_budget(self.setup, self.model, dataset, layers)

    def arguments(self, command: str, run: Run, method: str) -> list[str]:
        """The command of a run but for where it starts and its budget."""
        stage = "b_pretrain" if run.setup == "B-pretrain" else self.stage
        places = (stage, f"{stage}_{run.dataset}", f"{stage}_{run.dataset}_{self.model}")
        setups = [CONFIGS / "setups" / f"{name}.yaml" for name in places]
        # A network may have to differ from its data set.
        configs = [setups[0], CONFIGS / "data" / f"{run.dataset}.yaml", setups[1]]
        configs += [CONFIGS / "models" / f"{self.model}.yaml", setups[2]]
        if command == "measure":
            configs += [CONFIGS / "perplexity" / f"{name}.yaml" for name in places]
        elif method:
            configs.append(CONFIGS / "methods" / f"{method}.yaml")
        words = [word for path in configs if path.exists() for word in ("--config", str(path))]
        words += ["--seed_everything", str(run.seed), "--runs_dir", str(self.runs_dir)]
        words += ["--model.layers", str(run.layers)] if stage == self.stage else []
        if command == "fit" and self.length is not None:
            words += ["--trainer.max_epochs", str(self.length)]
        words += ["--data.root", self.data_dir] if self.data_dir is not None else []
        return [command, *words]
