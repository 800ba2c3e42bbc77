"""Settings of the suite's own parts of a config, such as `LowRankHook`, checked by name and kind.

MMEngine takes whatever it is given: a text in the place of a truth value, such as "no", would be true, and one in the
place of a list would be taken letter by letter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from experiment import ExperimentError

Kind = tuple[str, Callable[[Any], bool]]  # what is allowed, in words, and whether a value is that


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


def _is_energies(value: Any) -> bool:
    if not isinstance(value, list | tuple):
        return False
    return all(isinstance(one, int | float) and not isinstance(one, bool) and 0 < one <= 1 for one in value)


_TRUTH: Kind = ("True and False", lambda value: isinstance(value, bool))
_TRUTH_OR_USUAL: Kind = ("True, False and None, for as usual", lambda value: value is None or isinstance(value, bool))
_SETTINGS: Kind = ("settings by their names", lambda value: value is None or isinstance(value, Mapping))
_ANY: Kind = ("", lambda value: True)  # looked at elsewhere
HOOK_KINDS: dict[str, Kind] = {
    **{"type": _ANY, "priority": _ANY, "method": _ANY, "budget": _SETTINGS},
    "layers": ("a list of names of layers, and 'all'", lambda value: value == "all" or _is_names(value)),
    "freeze": ("a list of paths of modules", _is_names),
    **dict.fromkeys(("fuse", "recompute_loss"), _TRUTH_OR_USUAL),
    **dict.fromkeys(("freeze_statistics", "dropout", "channels_last"), _TRUTH),
}
BUDGET_KINDS: dict[str, Kind] = dict.fromkeys(("table", "mib", "run", "divisor", "name"), _ANY)
_ENERGIES: Kind = ("a list of numbers above 0 and at most 1", _is_energies)
PERPLEXITY_KINDS: dict[str, Kind] = {
    "energies": _ENERGIES,
    "mode_energies": _ENERGIES,
    "storages": ("a list of their names", _is_names),
    "derive": ("True, False and a number of products", lambda value: type(value) in (bool, int)),
    "batches": ("whole numbers from 1", lambda value: type(value) is int and value >= 1),
}


def check_hook(hook: Mapping[str, Any]) -> None:
    """Check the settings of a `LowRankHook`.

    Raises:
        ExperimentError: one that it does not have, or cannot be; or a method without layers.
    """
    _check(hook, "LowRankHook", HOOK_KINDS)
    _check(hook.get("budget") or {}, "the budget of LowRankHook", BUDGET_KINDS)
    method = hook.get("method") or {}
    if hook.get("layers") in ([], ()) and str(method.get("type")).rpartition(".")[2] != "Vanilla":
        raise ExperimentError(
            f"LowRankHook has the method {method.get('type')} and no layers, so that it would do nothing; name some in "
            f"its layers, or take Vanilla"
        )


def check_perplexity(settings: Any) -> None:
    """Check how a config has perplexity measured.

    Raises:
        ExperimentError: a setting that there is not, or that cannot be.
    """
    if not isinstance(settings, Mapping):
        raise ExperimentError(f"perplexity is {str(settings)[:200]!r}; allowed are settings by their names")
    _check(settings, "perplexity", PERPLEXITY_KINDS)


def _check(settings: Mapping[str, Any], where: str, kinds: Mapping[str, Kind]) -> None:
    for name, value in settings.items():
        if name not in kinds:
            raise ExperimentError(f"{where} has the setting {name!r}; allowed: {', '.join(kinds)}")
        allowed, fits = kinds[name]
        if not fits(value):
            raise ExperimentError(f"{name} of {where} is {str(value)[:200]!r}; allowed: {allowed}")
