"""From a composed config to the run that it describes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from experiment import ExperimentError, Run
from experiment.folder import ANOTHER
from experiment.method import build_method
from experiment.method import method_tag as tag_of
from experiment.moved import if_moved
from experiment.provenance import plain
from experiment.ranks import Budget
from experiment.record import is_name
from lowrank import MODE_ENERGIES
from segmentation.compose import HOOK, hook_settings

# What has an influence on a perplexity table, and what besides on a trained network.
_BOTH = ("model", "train_dataloader", "custom_hooks", "randomness")
MEASURED = (*_BOTH, "perplexity")
TRAINED = (
    *_BOTH,
    "val_dataloader",
    "val_evaluator",
    "optim_wrapper",
    "param_scheduler",
    "train_cfg",
    "auto_scale_lr",
    "processes",
)
# What MMEngine takes beside, where it is there and not as always.
_BESIDE: dict[str, Any] = {
    "val_cfg": {"type": "ValLoop"},
    "data_preprocessor": None,
    "sync_bn": None,
    "model_wrapper_cfg": None,
    "activation_checkpointing": None,
    "efficient_conv_bn_eval": None,
    "compile": False,
}
# Hooks that show, time and save; without the others of MMEngine's own, a run is another one as well.
_WATCHING = {
    *("IterTimerHook", "LoggerHook", "ParamSchedulerHook", "CheckpointHook", "DistSamplerSeedHook", "RuntimeInfoHook"),
    *("SegVisualizationHook", "EmptyCacheHook", "ProfilerHook", "MemoryProfilerHook"),
}
_NEEDED = {"param_scheduler", "sampler_seed"}
WEIGHTS_OF_CLASSES = "class_weight"  # of a loss; a text is a file that holds them
STORAGES = ["input", "int8"]  # in which perplexity is measured by default, so that one table serves every method
NO_INFLUENCE = {"data_root", "num_workers", "persistent_workers", "pin_memory", "prefetch_factor"}


def method_tag(config: Config) -> str:
    """The method's name in records and folders; see `experiment.method.method_tag`."""
    settings = hook_settings(config) or {"method": None}
    budget = settings.get("budget")
    method = build_method(settings["method"])
    return tag_of(method, settings.get("fuse"), budget=Budget(**budget) if budget else None)


def run_of(config: Config, method: str) -> Run:
    """The run's identity in records and folders.

    Raises:
        ExperimentError: a setting that no run can have.
    """
    return Run(
        task="segmentation",
        setup=config.get("stage", "finetune"),
        model=network_of(config),
        dataset=dataset_of(config),
        method=method,
        layers=config.get("layers", "all"),
        seed=config.randomness.seed,
    )


def dataset_of(config: Config) -> str:
    """The name of a config's data set in records and folders: its `dataset`, or the type of what it trains on."""
    name: str | None = config.get("dataset")
    if name is not None:
        return name
    kind = config.train_dataloader.dataset.type
    return str(kind).replace(":", ".") if isinstance(kind, str) else str(kind.__name__)


def network_of(config: Config) -> str:
    """The name of a config's network in records, folders and perplexity tables: its `network`, or that of its file.

    Raises:
        ExperimentError: the file's name cannot be that of a folder.
    """
    files = config.get("config_files") or ["config"]
    name: str = config.get("network", Path(files[-1]).stem)
    if config.get("network") is None and not is_name(name):
        raise ExperimentError(
            f"config {files[-1]} does not name its network, and its file's name, {name!r}, is none for a folder; set "
            f"network = 'NAME' in it, of letters, digits and . _ + -"
        )
    return name


def advice(config: Config) -> str:
    """What to do where a run's folder holds another run, as of another config without names."""
    unnamed = {"dataset": "data set", "network": "network"}
    names = {key: what for key, what in unnamed.items() if config.get(key) is None}
    if not names:
        return ANOTHER
    how = " and ".join(f"{key} = 'NAME'" for key in names)
    return (
        f"if that is of another {' or '.join(names.values())}, tell them apart by {how} in the config; else {ANOTHER}"
    )


def identity_of(config: Config, keys: Sequence[str] = TRAINED) -> dict[str, Any]:
    """Everything in a config that has an influence on the result, files by their content."""
    identity = {key: _without(config.get(key)) for key in keys if config.get(key) is not None}
    identity["model"] = _by_content(identity["model"])
    if "train_cfg" in keys:
        beside = {key: config.get(key) for key, usual in _BESIDE.items() if config.get(key) not in (None, usual)}
        identity |= {key: _without(value) for key, value in (beside | _acting(config.get("default_hooks"))).items()}
    if "perplexity" in keys:
        told = {key: value for key, value in perplexity_settings(config).items() if value and value != STORAGES}
        identity["perplexity"] = _without(told)
        identity = {key: value for key, value in identity.items() if key != "perplexity" or value}
    if identity.get("processes") == 1:
        del identity["processes"]  # as in runs of before there were several
    identity["load_from"] = _weights(config.get("load_from"))
    for hook in identity.get("custom_hooks", []):
        if hook.get("budget"):
            hook["budget"] = _budget(config, hook["budget"])
    return identity


def _acting(hooks: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those of the default hooks that do more than watch, and those that are switched off and would."""
    found = {
        name: hook
        for name, hook in (hooks or {}).items()
        if (name in _NEEDED if hook is None else hook.get("type") not in _WATCHING)
    }
    return {"default_hooks": found} if found else {}


def further_settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that are said nowhere else in its record, but have an influence on its result: each part of
    the config by a fingerprint, without the method, the seed and the number of processes."""
    hooks = [_without_method(hook) for hook in identity.get("custom_hooks", [])]
    parts = {key: value for key, value in identity.items() if key not in ("custom_hooks", "randomness", "processes")}
    return {key: plain(value) for key, value in sorted({**parts, "custom_hooks": hooks or None}.items()) if value}


def _without_method(hook: Mapping[str, Any]) -> dict[str, Any]:
    own = ("method", "budget", "fuse", "recompute_loss", "layers", "freeze") if hook.get("type") == HOOK else ()
    return {key: value for key, value in hook.items() if key not in own}


def perplexity_settings(config: Config) -> dict[str, Any]:
    """How perplexity is measured: arguments of `lowrank.measure_perplexity`, and "batches", their number.

    In a config `perplexity` has those that differ from the usual: an energy for each mode, on one batch. With
    `mode_energies=[]` there is one energy for all modes of a layer, as in the papers; with `derive=True`, or `--derive`
    of the command, the table serves methods with `derive`, and has a folder of its own.
    """
    settings = {"mode_energies": list(MODE_ENERGIES), "storages": STORAGES, **config.get("perplexity", {})}
    return {key: value for key, value in settings.items() if (key, value) != ("batches", 1)}


def _without(value: Any) -> Any:
    """A copy of plain dictionaries and lists without what has no influence."""
    if isinstance(value, dict):
        return {key: _without(inner) for key, inner in value.items() if key not in NO_INFLUENCE}
    if isinstance(value, list | tuple):
        return [_without(inner) for inner in value]
    return value


def _by_content(value: Any) -> Any:
    """A copy of a network's settings with files of weights that its parts start from by their content."""
    if isinstance(value, list):
        return [_by_content(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    of_classes = [WEIGHTS_OF_CLASSES] if isinstance(value.get(WEIGHTS_OF_CLASSES), str) else []
    named = {key: _weights(value[key]) for key in (*_weights_keys(value), *of_classes)}
    return {key: _by_content(inner) for key, inner in value.items()} | named


def without_named_weights(value: Any) -> Any:
    """A copy of a network's settings whose parts name no weights that they start from."""
    if isinstance(value, list | tuple):
        return type(value)(without_named_weights(inner) for inner in value if not _is_pretrained(inner))
    if not isinstance(value, Mapping):
        return value
    kept = {key: None if _is_pretrained(inner) else without_named_weights(inner) for key, inner in value.items()}
    return kept | dict.fromkeys(_weights_keys(value))


def _is_pretrained(settings: Any) -> bool:
    return isinstance(settings, Mapping) and settings.get("type") == "Pretrained"


def _weights_keys(settings: Mapping[str, Any]) -> list[str]:
    """Under which keys settings of a part of a network name weights that it starts from."""
    keys = ["pretrained", *(["checkpoint"] if _is_pretrained(settings) else [])]
    return [key for key in keys if isinstance(settings.get(key), str)]


def _weights(source: str | None) -> str | None:
    if source is None or "://" in source:
        return source
    try:
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise ExperimentError(f"weights {source} cannot be read: {error.strerror}{if_moved(source)}") from None


def budget_settings(config: Config) -> dict[str, Any]:
    """What ranks are chosen by; empty where none are. See `experiment.ranks.Budget`."""
    budget = (hook_settings(config) or {}).get("budget")
    return Budget(**budget).settings if budget else {}


def require_budget(config: Config, identity: Mapping[str, Any], data: str | None, measured: str | None) -> None:
    """Refuse a budget that is of other data or weights; see `experiment.ranks.Budget`.

    Args:
        config: of the run.
        identity: of the run.
        data, measured: fingerprints of all its data, and of those to train on; see `segmentation.data.registry.Data`.
    """
    if given := (hook_settings(config) or {}).get("budget"):
        budget = Budget(**given)
        budget.require_data(data, measured)
        budget.require_weights(identity, weights_of)


def weights_of(identity: Mapping[str, Any]) -> str:
    """Which weights the network of an identity starts from, in words: those that are loaded over all, or else those
    that its parts name for themselves."""
    if identity.get("load_from"):
        return f"fingerprint {identity['load_from']}"
    return ", ".join(sorted(set(named_weights(identity.get("model"))))) or "none"


def named_weights(value: Any) -> Iterator[str]:
    """The weights that parts of a network name for themselves in its settings, each as it stands there."""
    if isinstance(value, list | tuple):
        for inner in value:
            yield from named_weights(inner)
    elif isinstance(value, Mapping):
        yield from (value[key] for key in _weights_keys(value))
        for inner in value.values():
            yield from named_weights(inner)


def _budget(config: Config, settings: dict[str, Any]) -> dict[str, Any]:
    """The budget by its content."""
    if config.get("crop_size") is None:
        raise ExperimentError(
            "a budget is for images of one size, which the config does not say; set crop_size to the height and width "
            "that its pipeline gives, such as crop_size = (512, 512)"
        )
    batch_shape = (config.train_dataloader.batch_size, 3, *config.crop_size)
    return Budget(**settings).identity(network_of(config), batch_shape, dataset=dataset_of(config))
