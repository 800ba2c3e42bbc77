"""Checkpoints and weights: nothing in them is ever run, and of a run's own the newest whole one is found.

MMEngine's loader falls back to plain pickle, which runs whatever a file from elsewhere says. `read_safely_everywhere`
puts the one here in its place, through MMEngine's own registry of loaders.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import Tensor, nn

from experiment import ExperimentError
from experiment.checkpoints import IDENTITY, CheckpointError, load_checkpoint, refuse_earlier
from experiment.download import download
from experiment.weights import PLAIN, read_weights

LAST = "last_checkpoint"  # MMEngine's file that names the newest checkpoint
CLASSIFIER = "conv_seg"  # layer of every head whose size is the number of classes
LEAST_SHARE = 0.5  # of a network's tensors that weights have to fit, for them to be of this network
_NAME = re.compile(r"(?:iter|epoch)_(\d+)\.pth")
_STATISTICS = ("min", "max", "current", "mean")


def _statistic_of(owner: Any, name: str) -> Any:
    """What stands for `getattr` in a checkpoint: MMEngine's buffers of losses name their own methods by it."""
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise ValueError(f"it asks for {name!r} of {owner!r}")
    return getattr(owner, name)


_BUFFERS = (HistoryBuffer, (_statistic_of, "builtins.getattr"))  # of losses, which published checkpoints hold


def read(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """What a checkpoint or a file of weights holds by name; nothing in it is run.

    Raises:
        ExperimentError: see `experiment.weights.read_weights`, or it holds no weights by name.
    """
    content = read_weights(path, _BUFFERS, map_location)
    if not isinstance(content, dict):
        raise ExperimentError(f"weights file {path} holds no weights by name, but {type(content).__name__}")
    if isinstance(content.get("meta"), dict):
        content["meta"].pop("config", None)  # a program, which MMEngine would run when it resumes
    return content


def read_safely_everywhere() -> None:
    """Make MMEngine read every checkpoint in this process by `read`, those that a config names included."""
    loaders = {
        "": load_from_file,
        "http://": load_from_address,
        "https://": load_from_address,
        "torchvision://": load_from_collection,
        "modelzoo://": load_from_collection,
        "open-mmlab://": load_from_collection,
        "openmmlab://": load_from_collection,
        "mmcls://": load_from_collection,
        "pavi://": load_from_elsewhere,
        r"(\S+\:)?s3://": load_from_elsewhere,
        r"(\S+\:)?petrel://": load_from_elsewhere,
    }
    for prefix, loader in loaders.items():
        CheckpointLoader.register_scheme(prefix, loader, force=True)


# MMEngine says in its log what follows `load_from_` in a loader's name.
def load_from_file(path: str, map_location: Any = "cpu") -> dict[str, Any]:
    """Weights in a file."""
    return read(path, map_location)


def load_from_address(url: str, map_location: Any = "cpu") -> dict[str, Any]:
    """Weights at an address, downloaded once to where PyTorch keeps its downloads."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.split("?")[0].rpartition("/")[2]
    if is_main_process() and not path.is_file():
        download(url, path)
    barrier()
    return read(path, map_location)


def load_from_collection(name: str, map_location: Any = "cpu") -> dict[str, Any]:
    """Weights by their name in one of the collections that MMEngine knows."""
    scheme, _, model = name.partition("://")
    if scheme in ("torchvision", "modelzoo"):
        addresses = mmengine_checkpoint.get_torchvision_models()
    elif scheme == "mmcls":
        addresses = mmengine_checkpoint.get_mmcls_models()
    else:
        addresses = mmengine_checkpoint.get_external_models()
        model = mmengine_checkpoint.get_deprecated_model_names().get(model, model)
    if model not in addresses:
        raise ExperimentError(f"there are no weights {name}; give a file or an address")
    if not addresses[model].startswith(("http://", "https://")):
        return read(Path(mmengine_checkpoint._get_mmengine_home()) / addresses[model], map_location)
    content = load_from_address(addresses[model], map_location)
    return mmengine_checkpoint._process_mmcls_checkpoint(content) if scheme == "mmcls" else content


def load_from_elsewhere(name: str, map_location: Any = "cpu") -> dict[str, Any]:
    """What is not to be had from here."""
    raise ExperimentError(f"weights {name} cannot be read from there; give a file, or an http or https address")


def weights_in(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors by their names in a network, of a checkpoint or of plain weights."""
    state = content.get("state_dict")
    state = state if isinstance(state, dict) else content
    return {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}


def check_fit(model: nn.Module, content: Mapping[str, Any], source: str, whole: bool = False) -> None:
    """Refuse weights that are of another network; say it if a part of the network does not get any.

    Args:
        model: the network.
        content: what `read` gave.
        source: where the weights are from.
        whole: every tensor has to fit, that of the classifiers included.

    Raises:
        ExperimentError: an earlier version of the suite saved them, or they do not fit.
    """
    refuse_earlier([*map(str, content), *map(str, content.get("state_dict") or {})], source)
    state = weights_in(content)
    own = {key: value for key, value in model.state_dict().items() if whole or f".{CLASSIFIER}." not in f".{key}"}
    lacking = [key for key, value in own.items() if key not in state or state[key].shape != value.shape]
    fitting = len(own) - len(lacking)
    counts = f"{fitting} of {len(own)} tensors of the network fit"
    if fitting < (1.0 if whole else LEAST_SHARE) * len(own) or (own and not fitting):
        raise ExperimentError(
            f"weights {source} are of another network: {counts}, not such as {lacking[0]!r}; the file has "
            f"{len(state)} tensors{f', such as {next(iter(state))!r}' if state else ''}"
        )
    if lacking and is_main_process():
        print(f"weights {source}: {counts}; {lacking[0]!r} and others begin as without them", flush=True)


def check_loaded(module: nn.Module, content: Mapping[str, Any], source: str, name: str) -> None:
    """Refuse weights of which a part of a network has got next to nothing, whatever names its loader gives them.

    Args:
        module: the part, as it is once it was given them.
        content: what `read` gave.
        source: where the weights are from.
        name: of the part in the network.

    Raises:
        ExperimentError: see above.
    """
    there: dict[torch.Size, list[Tensor]] = {}
    inner = content.get("model")  # as files of some transformers have it
    for tensor in weights_in(inner if isinstance(inner, dict) else content).values():
        there.setdefault(tensor.shape, []).append(tensor)
    # One of a single number, such as the zeros that a bias begins with, tells nothing.
    own = [tensor for tensor in module.state_dict().values() if (tensor != tensor.flatten()[:1]).any()]
    got = sum(any(torch.equal(tensor, one.to(tensor.dtype)) for one in there.get(tensor.shape, [])) for tensor in own)
    if got < LEAST_SHARE * len(own):
        raise ExperimentError(
            f"weights {source} are not those of {name or 'the network'}: {got} of its {len(own)} tensors are in them; "
            f"give others in its init_cfg, or leave that out"
        )


def load_weights(model: nn.Module, source: str, whole: bool = False) -> None:
    """Load weights from a file or an address into a network, where they fit.

    Args:
        model: the network.
        source: a file, an address, or a name such as open-mmlab://resnet50.
        whole: every tensor has to fit.

    Raises:
        ExperimentError: they cannot be read, or are of another network; nothing was changed.
    """
    read_safely_everywhere()
    content = CheckpointLoader.load_checkpoint(source, "cpu", logger="silent")
    check_fit(model, content, source, whole)
    own = model.state_dict()
    fitting = {key: value for key, value in weights_in(content).items() if key in own and own[key].shape == value.shape}
    model.load_state_dict(fitting, strict=False)


def newest(folder: Path, identity: str) -> Path:
    """The newest whole checkpoint of a run in its own folder; says which ones before it are not whole.

    Only names count, so a folder may have been moved or copied.

    Args:
        folder: of the run.
        identity: hash of the run's identity.

    Raises:
        ExperimentError: there is none, or an earlier version of the suite saved it.
    """
    found = {path.name: int(match[1]) for path in folder.glob("*.pth") if (match := _NAME.fullmatch(path.name))}
    names = sorted(found, key=lambda name: found[name], reverse=True)
    named = _named(folder)
    if named in names:
        names = [named, *(name for name in names if found[name] < found[named])]
    problems: list[str] = []
    for name in names:
        problem = _problem(folder / name, identity)
        if problem is None:
            if problems and is_main_process():
                print(f"{'; '.join(problems)}; going on from {name}", flush=True)
            return folder / name
        problems.append(problem)
    what = "; ".join(problems) or f"{folder} has no checkpoint"
    raise ExperimentError(f"{what}; no other is there to go on from: delete {folder} to start afresh")


def _named(folder: Path) -> str:
    """Name of the checkpoint that MMEngine wrote down last, "" if it wrote nothing that is one."""
    try:
        text = (folder / LAST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
    return text.replace("\\", "/").rpartition("/")[2]


def _problem(path: Path, identity: str) -> str | None:
    """Why a run cannot go on from a checkpoint; None if it can."""
    try:
        with torch.serialization.safe_globals([*PLAIN, *_BUFFERS]):
            content = load_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    refuse_earlier(map(str, content), path)
    meta = content.get("meta")
    whole = all(isinstance(content.get(key), dict) for key in ("state_dict", "message_hub", "optimizer"))
    if not whole or not isinstance(meta, dict) or not all(type(meta.get(key)) is int for key in ("iter", "epoch")):
        return f"checkpoint {path} holds no state of a training run"
    if content.get(IDENTITY) != identity:
        return f"checkpoint {path} is of a run with other settings, or of an earlier version"
    return None
