"""`python -m classification weights MODEL`: published weights as a file that this suite loads.

Takes MCUNet's release (downloaded unless --from and --config give its two files), and the checkpoints that the gradient
filter's authors published of networks pretrained on one half of a data set. Every tensor is checked.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

import gdown
import torch

from classification.backbones.mcunet import released_weights
from classification.backbones.published import convert
from classification.backbones.weights import tensors_of
from classification.options import weights_parser
from experiment import ExperimentError
from experiment.archives import unpack
from experiment.command import Work, finish
from experiment.download import download
from experiment.files import write_whole
from experiment.weights import read_weights

RELEASE = "https://hanlab18.mit.edu/projects/tinyml/mcunet/release/mcunet-5fps_imagenet"
MOST_BYTES = 16 * 2**30  # of an archive of checkpoints, unpacked
ARCHIVES = (".tar", ".tar.gz", ".tgz")


def local(address: str, folder: Path) -> Path:
    """A file on this machine, downloaded into `folder` if `address` is no path.

    Args:
        address: a path, an http address, or a link to a file in Google Drive.
        folder: where downloads go.
    """
    where = urlparse(address)
    if where.scheme not in ("http", "https"):
        if not Path(address).is_file():
            raise ExperimentError(f"there is no file {address}")
        return Path(address)
    if where.hostname not in ("drive.google.com", "docs.google.com"):
        return download(address, folder / Path(where.path).name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # A folder as output keeps the file's own name.
        found = gdown.download(url=address, output=f"{folder}/", quiet=True, timeout=60.0, retries=3)
    except Exception as error:  # gdown's errors have no common base
        reason = " ".join(str(error).split())
        raise ExperimentError(
            f"{address} cannot be downloaded from Google Drive ({reason}); download it in a browser and give the file"
        ) from None
    return Path(str(found))


def checkpoint_in(path: Path, folder: Path, member: str | None) -> Path:
    """The checkpoint that a file is, or that an archive holds.

    Args:
        path: a checkpoint or a tar archive of checkpoints.
        folder: where an archive is unpacked.
        member: the end of the path of the one that is meant.
    """
    if not path.name.endswith(ARCHIVES):
        return path
    unpack(path, folder, MOST_BYTES)
    inside = {str(found.relative_to(folder)): found for found in sorted(folder.rglob("*.ckpt"))}
    chosen = [name for name in inside if name.endswith(member or "")]
    if len(chosen) != 1:
        raise ExperimentError(
            f"{path} holds {len(inside)} checkpoints; choose one with --member, by the end of its name, of: "
            f"{', '.join(inside) or 'none'}"
        )
    return inside[chosen[0]]


def convert_file(name: str, source: str, config: str | None, member: str | None, target: Path) -> None:
    """Convert one published checkpoint; the result is whole or not there."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = checkpoint_in(local(source, folder / "download"), folder / "unpacked", member)
        description = None if config is None else local(config, folder)
        state = convert(name, tensors_of(read_weights(path), str(path)), description)
    content = io.BytesIO()
    torch.save(state, content)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, content.getvalue())


def main(arguments: Sequence[str]) -> int:
    """Convert weights. Returns the exit code; see `experiment.command.finish`."""
    return finish(lambda work: _convert(arguments, work))


def _convert(arguments: Sequence[str], work: Work) -> None:
    work.title = "weights"
    parser = weights_parser()
    options = parser.parse_args(arguments)
    source, config, target = options.source, options.config, options.to
    if options.model == "mcunet" and source is None:
        source, config = f"{RELEASE}.pth", config or f"{RELEASE}.json"
    if source is None:
        parser.error(f"--from is needed: {options.model} has no release but torchvision's, which needs no conversion")
    if target is None:
        if options.model != "mcunet" or config is None:
            parser.error("--to is needed, unless the weights are MCUNet's release")
        target = released_weights()
    convert_file(options.model, source, config, options.member, target)
    print(f"weights of {options.model} in {target}")
