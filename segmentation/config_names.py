"""Names at the top of a config: what MMEngine and the suite read, and which is nearest to one that nothing reads.

A config of one's own may hold any other names, as variables. They are used up once its file is read: nothing that is
made of one changes with it later.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mmengine.config import Config

from experiment import ExperimentError

OWN = {"stage", "network", "dataset", "layers", "lowrank", "depths", "perplexity", "crop_size", "weights", "processes"}
OTHERS = {
    "_base_",
    "custom_imports",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "sync_bn",
    "activation_checkpointing",
    "efficient_conv_bn_eval",
    "compile",
    "config_files",
}
RUNNER = {  # arguments of MMEngine's `Runner`, which takes seconds to import
    *("model", "work_dir", "train_dataloader", "val_dataloader", "test_dataloader", "train_cfg", "val_cfg", "test_cfg"),
    *("auto_scale_lr", "optim_wrapper", "param_scheduler", "val_evaluator", "test_evaluator", "default_hooks"),
    *("custom_hooks", "data_preprocessor", "load_from", "resume", "launcher", "env_cfg", "log_processor", "log_level"),
    *("visualizer", "default_scope", "randomness", "experiment_name", "cfg"),
}
KNOWN = OWN | OTHERS | RUNNER
# What other programs read of a config, with what to give in its place.
_UNREAD = {
    "weights": "give --weights to a sweep, or --load-from to a run",
    "test_evaluator": "a run is validated, by val_evaluator",
    "test_cfg": "a run is validated, by val_cfg",
    "experiment_name": "a run's name is that of its folder",
}
USED_UP = (
    "a variable of the config, which is read before: what was made of it has the value of then, and this would have no "
    "effect; set that in its place, such as model.NAME or train_dataloader.NAME, or change the config"
)
NEAR = 0.8  # as `difflib` compares words: one letter of five, or two that are swapped


def check_names(path: str | Path, loaded: Config, before: Mapping[str, object] | None = None) -> None:
    """Refuse a name that a config gives a value without effect: nearly one that is read, which is a typo, or a variable
    that was used up in a config ahead of it.

    Args:
        path: of the config.
        loaded: what is in it, with what it is based on.
        before: the configs that it is merged over.

    Raises:
        ExperimentError: there is one; says the nearest.
    """
    before = before or {}
    if "config_files" in loaded:  # written by a run, whose configs were looked at, and which has their values alone
        return
    own = Path(path).read_text(encoding="utf-8")
    based = loaded.text.removesuffix(own)
    known = KNOWN | set(before) | {name for name in loaded if _is_set(name, based)}
    for name in sorted(set(map(str, loaded)) - known):
        near = difflib.get_close_matches(name, sorted(known), 1, NEAR)
        if near and _is_set(name, own) and not _is_read(name, loaded.text):
            raise ExperimentError(
                f"config {path} sets {name!r}, which nothing reads; mend it if it is to be {near[0]!r}, or give it a "
                f"name that is less alike"
            )
    for name in sorted(set(map(str, loaded)) & set(before) - KNOWN):
        if loaded[name] != before[name] and _is_set(name, own) and not _is_read(name, loaded.text):
            raise ExperimentError(f"config {path} sets {name!r}, {USED_UP}")


def check_options(options: Mapping[str, object] | None, config: Iterable[str]) -> None:
    """Refuse an option of the command line that is of nothing in the config, nor of MMEngine: a typo; or of a variable.

    Raises:
        ExperimentError: there is one; names it.
    """
    names = set(map(str, config))
    for key in options or {}:
        name = key.partition(".")[0]
        if name in names - KNOWN:
            raise ExperimentError(f"--cfg-options sets {key!r}, {USED_UP}")
        if name in _UNREAD:
            raise ExperimentError(f"--cfg-options sets {key!r}, which would have no effect; {_UNREAD[name]}")
        if name not in KNOWN:
            listed = ", ".join(sorted(str(one) for one in config))
            raise ExperimentError(f"--cfg-options has {key!r}, and nothing is called {name!r}; the config has {listed}")


def _is_set(name: str, text: str) -> bool:
    return re.search(rf"""^\s*["']?{re.escape(name)}["']?\s*[=:]""", text, re.MULTILINE) is not None


def _is_read(name: str, text: str) -> bool:
    return re.search(rf"""\b{re.escape(name)}\b(?!["']?\s*(=(?!=)|:))""", text) is not None
