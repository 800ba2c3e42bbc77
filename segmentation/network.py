"""The network of a config: built, with what it starts from, and whether the config's settings are for it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from logging import FileHandler
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.logging import MMLogger
from mmengine.runner import CheckpointLoader
from mmseg.registry import DATASETS, MODELS

from experiment import ExperimentError
from experiment.download import downloads_told
from segmentation.building import require_optimizer
from segmentation.checkpoints import check_fit, check_loaded, load_weights, read_safely_everywhere
from segmentation.compose import class_count, datasets, frozen_statistics, hook_settings
from segmentation.heads import (
    require_beginning,
    require_heads,
    require_joined,
    require_plain_files,
    require_spread,
)
from segmentation.hook import LowRankHook
from segmentation.identity import named_weights, without_named_weights
from segmentation.quiet import quietly, register_modules, unlogged
from segmentation.runner_config import runner_config
from segmentation.unread import require_read
from segmentation.unstarted import require_parts


def prepared_model(config: Config, weights: bool = True) -> tuple[Any, list[str]]:
    """The config's model with its weights, frozen as for training but not converted, and the layers it trains.

    Args:
        config: see `segmentation.compose`.
        weights: False where the network alone is asked after, with whatever it has when it is built.

    Raises:
        ExperimentError: the config has no `LowRankHook` with layers, or an earlier version saved the weights.
    """
    settings = hook_settings(config)
    if settings is None or not settings["layers"]:
        raise ExperimentError("the config names no layers; give --layers, or a LowRankHook in custom_hooks")
    model = _built(config) if weights else require_steps(config)
    if weights:
        _start(model, config)
    exact = {**settings, "method": {"type": "Vanilla"}, "budget": None, "fuse": False, "recompute_loss": False}
    hook = LowRankHook(**exact)
    layers = hook.prepare(model)
    return model, layers


def _start(model: Any, config: Config) -> None:
    """Give a model what it starts from."""
    read_safely_everywhere()
    with quietly():
        _forget_closed_logs()
        model.init_weights()
    if config.get("load_from"):
        load_weights(model, config.load_from)


def _forget_closed_logs() -> None:
    """Log files of a run that ended in this process are closed; MMEngine writes initial weights to all that it has."""
    logger = MMLogger.get_current_instance()
    for handler in [one for one in logger.handlers if isinstance(one, FileHandler) and one.stream is None]:
        logger.removeHandler(handler)


def _built(config: Config, settings: Mapping[str, Any] | None = None) -> Any:
    """The network of a config, or of other settings of it, whose heads are for one another."""
    register_modules()
    require_plain_files(config.model)
    with quietly():
        model = MODELS.build(config.model if settings is None else ConfigDict(settings))
    require_heads(model)
    return model


def require_steps(config: Config) -> Any:
    """Refuse a network that cannot begin as its config says, or make a step; gives the network, as it begins.

    Raises:
        ExperimentError: see `segmentation.heads`.
    """
    settings = without_named_weights(config.model.to_dict())  # these may have to be downloaded, see `require_weights`
    model = _built(config, settings)
    with unlogged():
        _forget_closed_logs()
        require_beginning(model, settings)
    require_joined(model, config.to_dict())
    if not frozen_statistics(config):
        require_spread(model, config.to_dict())
    return model.train()


def require_trainable(config: Config, of_runner: Config, with_data: bool) -> None:
    """Refuse what training would find once the network is built: layers, or parts to freeze, that it does not have,
    and an optimizer, hooks and other parts that cannot be built.

    Args:
        config: see `segmentation.compose`.
        of_runner: the same as MMEngine's runner is given it.
        with_data: whether the data are there.

    Raises:
        ExperimentError, ConversionError: see `segmentation.hook.LowRankHook.prepare`.
        Exception: see `segmentation.unstarted.require_parts`.
    """
    model, settings = require_steps(config), hook_settings(config)
    require_parts(of_runner, model, with_data)
    if settings is not None:
        LowRankHook(**settings).prepare(model)


def require_buildable(config: Config) -> None:
    """Refuse a config of whose run a part cannot be built, whatever its data, weights and layers are.

    Raises:
        ExperimentError: see `segmentation.unread.require_read`.
        Exception: see `segmentation.unstarted.require_parts`.
    """
    require_optimizer(config)
    require_read(config)
    require_parts(runner_config(config, Path(), ""), require_steps(config), with_data=False)


def require_classes(config: Config) -> None:
    """Refuse a network of another number of classes than its data sets have.

    Raises:
        ExperimentError: see above.
    """
    register_modules()
    count = class_count(config)
    for part in datasets(config):
        kind = DATASETS.get(part["type"])
        given = part.get("metainfo")  # a text in it may be a file with the names
        is_usual = isinstance(kind, type) and issubclass(kind, BaseDataset)
        named = (kind._load_metainfo(given) if is_usual else given or {}).get("classes")
        if count is not None and named is not None and len(named) != count:
            raise ExperimentError(
                f"model.decode_head.num_classes is {count}, and the data set {part['type']} has {len(named)} classes"
            )


def require_weights(config: Config, download: bool) -> None:
    """Refuse weights that cannot be read, or are of another network, before anything is written.

    Args:
        config: see `segmentation.compose`.
        download: whether those at an address are downloaded; else it is said that they would be, if they are not there.

    Raises:
        ExperimentError: see `segmentation.checkpoints.check_fit`, or a part does not get those that it names.
    """
    read_safely_everywhere()
    with contextlib.nullcontext() if download else downloads_told():
        source = config.get("load_from")
        if source:
            content = CheckpointLoader.load_checkpoint(source, "cpu", logger="silent")
            check_fit(_built(config), content, source)
        elif any(named_weights(config.model.to_dict())):
            _require_parts_weights(config)


def _require_parts_weights(config: Config) -> None:
    """MMEngine loads what fits of the weights that a part names for itself, be that nothing, and says so in its log."""
    model = _built(config)
    with quietly():
        _forget_closed_logs()
        model.init_weights()
    for name, module in model.named_modules():
        settings = getattr(module, "init_cfg", None)
        if isinstance(settings, Mapping) and settings.get("type") == "Pretrained":
            source = settings["checkpoint"]
            content = CheckpointLoader.load_checkpoint(source, "cpu", logger="silent")
            check_loaded(module, content, source, name)
