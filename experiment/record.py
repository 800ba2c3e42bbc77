"""The record of a finished run, `result.json`, and the folder that a run's identity gives it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiment.errors import ExperimentError
from experiment.files import write_whole

SCHEMA = 1
RESULT, TABLE = "result.json", "perplexity.json"  # what a finished training run leaves, and a perplexity measurement
NUMBERS = ("accuracy", "memory_bytes", "flops", "time_s", "loss")  # parts of a record that hold numbers alone
FURTHER = "further_settings"  # in a record's provenance: settings that its recipe does not say
CODE = "code"  # in it as well: hashes of the files of its method and its model, see `experiment.sources`
SETTINGS = "settings"  # in it as well: all others of the run's identity, which its names and its recipe stand for
PER_SEED = ("model.weights", "load_from")  # of these: one for each seed, as networks pretrained with it
RANKS, MEMORY, CURVES = "ranks.json", "memory.json", "curves.png"  # beside a result, for people; see `leavings`


class RunError(ExperimentError, ValueError):
    """A run that there cannot be."""


@dataclass(frozen=True)
class Run:
    """What tells one run from another.

    Attributes:
        task: "classification" or "segmentation".
        setup: "A" (all data, pretrained weights) or "B" (pretrained on one half, fine-tuned on the other).
        model: name of the network.
        dataset: name of the data set.
        method: the method's tag, such as "hosvd_0.8", or with its budget "asi_1of20".
        layers: how many trailing layers are trained with the method, or "all".
        seed: the run's seed.

    Raises:
        RunError: a name that is none, a depth or a seed that is no whole number.
    """

    task: str
    setup: str
    model: str
    dataset: str
    method: str
    layers: int | str
    seed: int

    def __post_init__(self) -> None:
        for key in ("task", "setup", "model", "dataset", "method"):
            name = getattr(self, key)
            if not is_name(name):
                raise RunError(f"{key} is {name!r}; a name is made of letters, digits and . _ + -")
        check_layers(self.layers)
        if type(self.seed) is not int:
            raise RunError(f"seed is {self.seed!r}, not a whole number")

    def folder(self, root: Path) -> Path:
        """The run's folder below `root`."""
        parts = (self.task, self.setup, self.model, self.dataset, self.method)
        return root.joinpath(*parts, f"layers{self.layers}", f"seed{self.seed}")

    def __str__(self) -> str:
        return (
            f"{self.model} on {self.dataset}, setup {self.setup}, {self.method}, layers {self.layers}, seed {self.seed}"
        )


def is_name(name: Any) -> bool:
    """Whether something can name a part of a run, and so be a folder."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.+-]*", name) is not None


def check_layers(layers: Any) -> None:
    """Raise `RunError` unless `layers` is a whole number from 1, or "all"."""
    if layers != "all" and (type(layers) is not int or layers < 1):
        raise RunError(f"layers is {layers!r}, neither a whole number from 1 nor 'all'")


@dataclass(frozen=True)
class Record:
    """Everything that the reports need to know of a finished run.

    Attributes:
        run: which run.
        accuracy: shares from 0 to 1; for classification "val_best", "val_last" and "test" (of the best epoch).
        memory_bytes: "activation_formula" (largest mean of an epoch, bytes kept of the trained layers' inputs by
            formula), "saved_measured" (all that autograd keeps), "peak_measured" and "peak_inference"; of the trained
            layers' weights "weight_measured", "weight_gradient_measured" and "weight_optimizer_measured", and where
            they are held as factors "weight_emulated_formula" (see `lowrank.WeightMemory`). Records of before these
            were measured do not have them.
        flops: of one training step of the trained layers, "paper" and "corrected" (see `lowrank.costs`).
        time_s: "step_median" and "total", seconds.
        provenance: see `experiment.provenance`; and "further_settings", those that have an influence on the result and
            are said neither by the run nor by its recipe; and "settings", all others by their full names, which the
            names of the run and its recipe stand for, by which a report sees whether they do. Records of before these
            were noted do not have them, nor "code", hashes of the files that hold the run's method and model.
        recipe: how it was trained: "epochs", "steps" (of the optimizer, in all), "learning_rate" (the largest),
            "batch_size" (of each process), "processes" (that trained together), "joined_batch_size" (of all of them),
            "image_size" (None of texts), "precision"; and "limit", where it was trained on a part of its data set.
            Empty in records of before it was noted.
        loss: "train_last", the mean over the samples of the last epoch; empty in records of before it was noted.
    """

    run: Run
    accuracy: dict[str, float]
    memory_bytes: dict[str, int]
    flops: dict[str, int]
    time_s: dict[str, float]
    provenance: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, int | float | str | bool]:
        """What was chosen for the run, as a logger of hyperparameters takes it."""
        told = asdict(self.run) | self.recipe
        return {key: value if isinstance(value, int | float | str) else str(value) for key, value in told.items()}

    @property
    def results(self) -> dict[str, float]:
        """What came of it, for the same: accuracies (shares), bytes, operations and seconds, by "part/name"."""
        parts = ("accuracy", "memory_bytes", "flops", "time_s")
        return {f"{part}/{name}": float(value) for part in parts for name, value in getattr(self, part).items()}

    def save(self, folder: Path) -> Path:
        """Write `result.json`, whole or not at all.

        Raises:
            ExperimentError: a number is none, infinite or below 0, or an accuracy is no share, so that it could not be
                read.
        """
        path = folder / RESULT
        try:
            for part in NUMBERS:
                _numbers(getattr(self, part), part)
        except ValueError as error:
            raise ExperimentError(f"{path} is not written, as {error}, which is no result; look at the data") from None
        write_whole(path, json.dumps({"schema": SCHEMA, "status": "done", **asdict(self)}, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a record.

        Raises:
            ExperimentError: the file is missing, damaged, or of another schema.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA or content["status"] != "done":
                raise ValueError(f"schema {content['schema']} and status {content['status']!r}")
            parts = {key: _numbers(content[key], key) for key in NUMBERS if key != "loss"}
            parts["loss"] = _numbers(content.get("loss", {}), "loss")
            told = {"provenance": content["provenance"], "recipe": content.get("recipe", {})}
            for key, value in told.items():
                if not isinstance(value, dict):
                    raise ValueError(f"{key} is {value!r}")
            if told["recipe"]:  # where it says nothing of processes, one has trained
                one = {"processes": 1, "joined_batch_size": told["recipe"].get("batch_size")}
                told["recipe"] = one | told["recipe"]
            return cls(run=Run(**content["run"]), **told, **parts)
        except OSError as error:
            raise ExperimentError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise ExperimentError(f"{path} is not a run's record ({error}); delete it and run again") from None


def is_result(path: Path, identity_hash: str | None = None, run: Run | None = None) -> bool:
    """Whether a file is what a finished run leaves: a whole record, or of another name a whole JSON object.

    Args:
        path: the file; need not exist.
        identity_hash: of the run that a record has to be of, if it is known.
        run: that run itself, if it is known.
    """
    if path.name != RESULT:
        return _is_json_object(path)
    try:
        record = Record.load(path)
    except ExperimentError:
        return False
    same = identity_hash is None or record.provenance.get("config_hash", identity_hash) == identity_hash
    return same and run in (None, record.run)


def _is_json_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _numbers(values: Any, key: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{key} is {values!r}")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key}.{name} is {value!r}")
        if value < 0 and key != "loss":
            raise ValueError(f"{key}.{name} is {value!r}, below 0")
        if value > 1 and key == "accuracy":
            raise ValueError(f"accuracy.{name} is {value!r}, and not a share from 0 to 1")
    return values
