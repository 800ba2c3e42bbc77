"""A run's method: from its config, the tag that names it in records and folders, and the ranks that it may need."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from experiment.errors import ExperimentError

if TYPE_CHECKING:
    from torch import nn

    from experiment.ranks import Budget, RankChoice
    from lowrank import Method

# The methods of `lowrank` whose ranks may come from a budget: known here, as importing `lowrank` takes seconds.
_RANKED = {"ASI": True, "WASI": True, "FixedBases": True} | dict.fromkeys(
    ("Vanilla", "GradientFilter", "SVD", "HOSVD", "WSI", "Rounded"), False
)


def build_method(config: Mapping[str, Any] | None) -> Method:
    """A method from its config; vanilla if there is none.

    Args:
        config: `{"class_path": "lowrank.HOSVD", "init_args": {"energy": 0.8}}`, or the same as `{"type": "HOSVD",
            "energy": 0.8}`. A class of one's own is named by its path, `my_package.methods.Mine`, or, once its module
            is imported, by its name alone.

    Raises:
        ExperimentError: no such class, or not with these settings.
    """
    if config is None:
        config = {"type": "Vanilla"}
    name, settings = _parts(config)
    found = method_class(name)
    try:
        return found(**settings)
    except TypeError as error:
        raise ExperimentError(f"method {name}: {error}") from None


def _parts(config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Name and settings of a method, in either of the two ways to write them."""
    if "class_path" in config:
        return config["class_path"], dict(config.get("init_args") or {})
    settings = dict(config)
    return settings.pop("type", None), settings


def method_class(name: Any) -> type[Method]:
    """The class of a method by its name; see `build_method`."""
    import lowrank
    from lowrank import Method

    found = getattr(lowrank, str(name).removeprefix("lowrank."), None)
    if found is None:
        paths = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _subclasses(Method)}
        own = {kind for path, kind in paths.items() if name in (kind.__name__, path)}
        if len(own) > 1:
            raise ExperimentError(f"there are {len(own)} methods {name!r}; give the path of its class")
        found = own.pop() if own else _imported(str(name))
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ExperimentError(
            f"method type is {name!r}; allowed: {', '.join(_RANKED)}, or the path of a class of your own, such as "
            f"my_package.Mine"
        )
    return found


def _subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    for inner in kind.__subclasses__():
        yield inner
        yield from _subclasses(inner)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    if not module:
        return None
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise ExperimentError(f"method type is {path!r}, and there is no module {error.name!r} to import") from None


def needs_ranks(method: Method) -> bool:
    """Whether a method leaves its ranks to a budget: it has a field `ranks`, which is None."""
    return getattr(method, "ranks", ()) is None


def leaves_ranks(config: Mapping[str, Any]) -> bool:
    """Whether the method of a config leaves its ranks to a budget; imports it only if it is not of `lowrank`."""
    name, settings = _parts(config)
    known = _RANKED.get(str(name).removeprefix("lowrank."))
    if known is None:
        return needs_ranks(build_method(config))
    return known and settings.get("ranks") is None


def require_own_ranks(config: Mapping[str, Any]) -> None:
    """Refuse the method of a config that has no budget and leaves its ranks to one.

    Raises:
        ExperimentError: see above.
    """
    if leaves_ranks(config):
        raise _no_ranks(str(_parts(config)[0]).rpartition(".")[2])


def require_use(config: Mapping[str, Any] | None, settings: str) -> None:
    """Refuse settings by which ranks are chosen, named by `settings`, of a method that leaves no ranks to a budget.

    Raises:
        ExperimentError: see above.
    """
    if config is None or not leaves_ranks(config):
        name = "Vanilla" if config is None else str(_parts(config)[0]).rpartition(".")[2]
        raise ExperimentError(
            f"{settings} would have no effect, as {name} leaves no ranks to a budget; leave it out, or take a method "
            f"that does, such as ASI without ranks"
        )


def _no_ranks(name: str) -> ExperimentError:
    return ExperimentError(
        f"{name} needs ranks: give its own, or a budget, which is a perplexity table and a memory: budget.table, and "
        f"budget.mib or budget.run"
    )


def derives(config: Mapping[str, Any]) -> bool | int:
    """With which `derive` the table for the method of a config is measured; imports it only if it is not of
    `lowrank`."""
    name, settings = _parts(config)
    known = str(name).removeprefix("lowrank.") in _RANKED
    derive = settings.get("derive", False) if known else build_method(config).derive
    return derive if type(derive) is int else bool(derive)


def check_precision(config: Mapping[str, Any] | None, mixed: str) -> None:
    """Refuse the method of a config in mixed precision, where it needs single; `mixed` names the setting that is it.

    Raises:
        ExperimentError: see above.
    """
    if config is not None and derives(config):
        raise ExperimentError(
            f"{mixed} with a method with derive: in mixed precision no input follows from another; train in single "
            f"precision, or with a method without it"
        )


def table_tag(derive: bool | int) -> str:
    """What stands for the method in the folder of a perplexity table: one with `derive` has a folder of its own, since
    runs are told by what their table holds.

    Raises:
        ExperimentError: a number of products that `derive` cannot be, ahead of all that measuring takes.
    """
    if isinstance(derive, bool):
        return "perplexity_derived" if derive else "perplexity"
    from lowrank import SettingError
    from lowrank.methods.deriving import check_derive

    try:
        check_derive(derive)
    except SettingError as error:
        raise ExperimentError(f"of the perplexity table {error}") from None
    return f"perplexity_derived_{derive}"


def with_ranks(
    method: Method, budget: Budget | None, names: Sequence[str], choice: RankChoice = "perplexity", seed: int = 0
) -> Method:
    """The method with the ranks that the budget gives these layers, if it needs any.

    Raises:
        ExperimentError: it needs ranks, and there is no budget; see also `experiment.ranks.Budget.plan`.
    """
    if not needs_ranks(method):
        return method
    if budget is None:
        raise _no_ranks(type(method).__name__)
    from lowrank.methods.deriving import measured_with

    plan = budget.plan(names, choice, seed, getattr(method, "storage", "input"), measured_with(method.derive))
    return replace(method, ranks=plan)  # type: ignore[type-var]


def derived_layers(method: Method) -> dict[str, str]:
    """Per name of a layer whose input follows from another one's, as a budget chose it, that one's name."""
    found: dict[str, str] = getattr(getattr(method, "ranks", None), "derived", {})
    return found


def require_derived(network: nn.Module, behind: Mapping[str, str]) -> None:
    """Refuse a step in which an input was kept that a budget takes for derived from another layer's.

    Args:
        network: after a forward pass in training.
        behind: see `derived_layers`.

    Raises:
        ExperimentError: see above.
    """
    from lowrank import converted_layers

    for layer in converted_layers(network):
        state = layer._lowrank
        if state.name in behind and state.derived is None and state.kept_bytes:
            raise ExperimentError(
                f"layer {state.name!r} keeps {state.kept_bytes} bytes of its input, which was to follow from what "
                f"{behind[state.name]!r} keeps: the code between them, mixed precision or checkpointing is in the way; "
                f"train without these, or with a method without derive"
            )


def fuses(method: Method, fuse: bool | None) -> bool:
    """Whether a run keeps less in the rest of the network; by default (None) yes, but vanilla is ordinary training.

    Raises:
        ExperimentError: it is not to, and the method needs it.
    """
    from lowrank import Vanilla

    if fuse is False and method.derive:
        raise ExperimentError(
            f"fuse is off with {type(method).__name__}(derive={method.derive!r}): what lies between the layers is "
            f"not known then, and no input follows from another; leave fuse out"
        )
    return type(method) is not Vanilla if fuse is None else fuse


def method_tag(
    method: Method, fuse: bool | None = None, choice: RankChoice = "perplexity", budget: Budget | None = None
) -> str:
    """The method's name in records and folders; says where ranks or `fuse` are not chosen as usual, and the budget."""
    fused, ranked = fuses(method, fuse), needs_ranks(method)
    words = [method.tag]
    if ranked and choice != "perplexity":
        words.append(choice)
    if fused != fuses(method, None):
        words.append("fused" if fused else "unfused")
    if ranked and budget is not None:
        words.append(budget.tag)
    return "_".join(words)
