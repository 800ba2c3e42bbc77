"""One config from several files, each stating only its own part: network, data set, stage, method; and the depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config, ConfigDict

from experiment import ExperimentError
from experiment.strict_yaml import check_yaml_file
from segmentation.config_names import check_names
from segmentation.data.prepare import is_prepared

CONFIGS = Path(__file__).parent.parent / "configs" / "segmentation"
HOOK = "LowRankHook"
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
_PLACES = {"data_root", "data_prefix", "ann_file"}  # what tells a data set's config from that of one around others
_NAMING = {"LoadImageFromFile": "NamedImage", "LoadAnnotations": "NamedLabels"}


def load_config(files: Sequence[str | Path], options: Mapping[str, Any] | None = None) -> Config:
    """The files merged in their order, a later one over an earlier one, and the options over all.

    Raises:
        ExperimentError: a file is missing, is not a config, or has a name that is nearly one that is read.
    """
    config = Config()
    for path in files:
        try:
            if Path(path).suffix in (".yaml", ".yml"):  # MMEngine's reader would run what some tags ask for
                read_run_config(Path(path))
            loaded = Config.fromfile(str(path))
        except ExperimentError:
            raise
        except (Exception, SystemExit) as error:  # a config is code, which may fail in any way
            raise ExperimentError(f"config {path} cannot be read: {type(error).__name__}: {error}") from None
        check_names(path, loaded, config)
        config.merge_from_dict(loaded.to_dict(), allow_list_keys=False)
        if "config_files" not in loaded:  # else a run wrote it, which is of the configs that it names
            files_so_far = [*config.get("config_files", []), str(path)]
            config.merge_from_dict({"config_files": files_so_far}, allow_list_keys=False)
    if options:
        config.merge_from_dict(dict(options))
    return config


class _Plain(yaml.SafeLoader):
    """YAML of plain values and tuples; what would call a function of Python is an error."""


_Plain.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node, deep=True))
)


def read_run_config(path: Path) -> Config:
    """The config that a run wrote into its folder; nothing in it is run.

    Raises:
        ExperimentError: it is missing, or is no such config.
    """
    check_yaml_file(path, aliases=True)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Plain)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ExperimentError(f"config {path} cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ExperimentError(f"config {path} holds no settings")
    return Config(content)


def choose_depth(config: Config, layers: int | str | None) -> None:
    """Turn `depths` and `lowrank` of the suite's configs into a `LowRankHook` among `custom_hooks`, in place.

    A config without `depths` stays as it is: it says itself what it does.

    Args:
        config: a merged config.
        layers: 5, 10 or "all"; None only where the stage has a depth of its own.

    Raises:
        ExperimentError: the network has no such depth.
    """
    if "depths" not in config:
        if layers is not None:
            raise ExperimentError("--layers is for configs with `depths`; this one names its layers in custom_hooks")
        if config.get("lowrank"):
            raise ExperimentError(
                f"lowrank, as of a config of a method, is for configs with `depths`; this one names its method in the "
                f"{HOOK} of its custom_hooks"
            )
        return
    given = config.get("lowrank", {})
    if own := [f"lowrank.{key}" for key in ("layers", "freeze") if key in given]:
        raise ExperimentError(f"{' and '.join(own)} would have no effect, as --layers says both; leave it out")
    settings = {"method": {"type": "Vanilla"}, **given}
    stage = config.get("stage")
    depth = config.depths.get(stage)
    if depth is None:
        depth = {"layers": "all"} if layers == "all" else config.depths.get(f"last{layers}")
    if depth is None:
        allowed = [name.removeprefix("last") for name in config.depths if name.startswith("last")]
        raise ExperimentError(f"--layers is {layers}; {config.network} has {', '.join(allowed)} and all")
    settings |= {"layers": depth["layers"], "freeze": depth.get("freeze", [])}
    if settings["method"]["type"] == "GradientFilter" and "patch" not in settings["method"]:
        if layers == "all" or not depth.get("patches"):
            raise ExperimentError("the gradient filter has a patch per layer at 5 and 10 layers; give its `patch` here")
        patches = dict(zip(depth["layers"], depth["patches"], strict=True))
        settings["method"] = {**settings["method"], "patch": patches}
    hooks = [hook for hook in config.get("custom_hooks", []) if hook["type"] != HOOK]
    config.custom_hooks = [*hooks, ConfigDict(type=HOOK, **settings)]
    if layers is not None:
        config.layers = layers
    for key in ("depths", "lowrank"):
        config.pop(key, None)


def hook_settings(config: Config) -> dict[str, Any] | None:
    """The settings of the config's `LowRankHook`, if it has one."""
    hooks = [dict(hook) for hook in config.get("custom_hooks") or [] if hook["type"] == HOOK]
    if len(hooks) > 1:
        raise ExperimentError(f"custom_hooks has {len(hooks)} of {HOOK}; allowed is one")
    return {key: value for key, value in hooks[0].items() if key not in ("type", "priority")} if hooks else None


def frozen_statistics(config: Config) -> bool:
    """Whether batch normalisations are trained with stored statistics, which is the hook's work."""
    settings = hook_settings(config)
    return settings is not None and settings.get("freeze_statistics", True)


def rescale(config: Config, iterations: int) -> None:
    """Make the run as long as this, with schedule, validations and checkpoints in proportion, in place.

    Raises:
        ExperimentError: it is no length, or the run is not counted in iterations.
    """
    if iterations < 1:
        raise ExperimentError(f"--iterations is {iterations}; allowed are whole numbers from 1")
    length = config.train_cfg.get("max_iters")
    if length is None:
        raise ExperimentError(
            "--iterations is for a run that is counted in iterations, and train_cfg has no max_iters; give "
            "--cfg-options train_cfg.max_epochs=N, or a train_cfg with IterBasedTrainLoop and max_iters"
        )
    share = iterations / length

    def scaled(number: int) -> int:
        return max(1, round(number * share))

    config.train_cfg.update(max_iters=iterations, val_interval=scaled(config.train_cfg.get("val_interval", 1000)))
    checkpoint = (config.get("default_hooks") or {}).get("checkpoint") or {}
    if checkpoint.get("interval", -1) > 0:
        checkpoint["interval"] = scaled(checkpoint["interval"])
    given = config.get("param_scheduler") or []
    schedulers = [given] if isinstance(given, Mapping) else list(given)
    for scheduler in schedulers:
        _rescale_schedule(scheduler, share, scaled)
    if given:
        config.param_scheduler = [one for one in schedulers if one.get("begin", 0) < one.get("end", math.inf)]


def _rescale_schedule(scheduler: Any, share: float, scaled: Callable[[int], int]) -> None:
    """Make what a scheduler says in iterations shorter or longer, in place."""
    if "begin" in scheduler:
        scheduler["begin"] = round(scheduler["begin"] * share)
    for name in ("end", "T_max", "total_steps", "total_iters", "step_size"):
        if scheduler.get(name) not in (None, math.inf):
            scheduler[name] = scaled(scheduler[name])
    if "milestones" in scheduler:
        scheduler["milestones"] = [scaled(one) for one in scheduler["milestones"]]


def with_naming_readers(config: Config) -> Config:
    """A copy whose readers of images and label maps name the file that they cannot read; see `segmentation.data`."""
    copy, classes = Config(config.to_dict()), class_count(config)
    prepared = is_prepared(config)
    for part in _dictionaries(copy._cfg_dict):
        name = _NAMING.get(part["type"]) if isinstance(part.get("type"), str) else None
        if name is not None:
            part.update(type=name, prepared=prepared, **({"classes": classes} if name == "NamedLabels" else {}))
    return copy


def reader_of(part: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The settings of a stock reader, such as "LoadAnnotations", in a data set's pipeline; None if it has none."""
    found = (one for one in _dictionaries(part.get("pipeline")) if one.get("type") == name)
    return next(found, None)


def class_count(config: Config) -> int | None:
    """How many classes the network tells, by the last of its heads; None if it does not say that in the usual place."""
    head = config.get("model", {}).get("decode_head")
    head = head[-1] if isinstance(head, list | tuple) and head else head
    return head.get("num_classes") if isinstance(head, Mapping) else None


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _dictionaries(inner)


def datasets(config: Any) -> list[dict[str, Any]]:
    """Every data set's config in a config's loaders, or in a part of one, those inside of others included.

    What a config says of data sets outside of its loaders, as variables, is not loaded.
    """
    if isinstance(config, Config):
        return [part for name in LOADERS for part in datasets(config.get(name))]
    return [part for part in _dictionaries(config) if "type" in part and _PLACES & part.keys()]


def move_data(config: Config, data_dir: Path) -> None:
    """Read the data set from `data_dir/<dataset>`, in place.

    Raises:
        ExperimentError: the config does not name its data set, or has not one `data_root`.
    """
    name, parts = config.get("dataset"), datasets(config)
    roots = sorted({str(part.get("data_root")) for part in parts})
    if not name:
        raise ExperimentError(
            "--data-dir is for a config that names its data set, a folder in there, as dataset = 'NAME'; this one has "
            f"data_root {', '.join(roots)}: change that"
        )
    if len(roots) > 1 or not all(part.get("data_root") for part in parts):
        raise ExperimentError(
            f"--data-dir is for a config whose data are below one data_root; this one has {', '.join(roots)}: change "
            f"that"
        )
    for part in parts:
        part["data_root"] = str(data_dir / name)
