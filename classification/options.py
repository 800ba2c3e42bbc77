"""Options of the commands that train nothing, apart from what does their work: that takes seconds to import."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

from experiment.command import folder_word

PUBLISHED = ("mcunet", "mobilenet_v2", "resnet18", "resnet34")  # networks that checkpoints of halves are published of
_FROM = "archives on this machine in place of downloads, or folders that hold them or the data set itself"
_PREPARE = """Download a data set, check it, unpack it, and note that it is ready.

A data set is there as a whole or not at all: it is unpacked beside its place, compared with its official numbers of
classes and images, and only then moved into place. An interrupted download goes on where it ended.
"""
_WEIGHTS = """Write published weights as a file that this suite loads.

Takes MCUNet's release (downloaded unless --from and --config give its two files), and the checkpoints that the gradient
filter's authors published of networks pretrained on one half of a data set. Every tensor is checked.
"""


def prepare_parser() -> argparse.ArgumentParser:
    """The command line of `prepare`."""
    parser = argparse.ArgumentParser(prog="python -m classification prepare", description=_PREPARE)
    parser.add_argument("name", metavar="NAME", help=f"one of: {', '.join(prepared_names())}")
    parser.add_argument(
        "--root", "--data-dir", type=folder_word, default=Path("data"), help="folder that holds all data sets"
    )
    parser.add_argument("--from", dest="given", nargs="+", type=Path, default=[], metavar="PATH", help=_FROM)
    return parser


def weights_parser() -> argparse.ArgumentParser:
    """The command line of `weights`."""
    parser = argparse.ArgumentParser(prog="python -m classification weights", description=_WEIGHTS)
    parser.add_argument("model", metavar="MODEL", choices=PUBLISHED, help=f"one of: {', '.join(PUBLISHED)}")
    parser.add_argument(
        "--from", dest="source", metavar="FILE", help="checkpoint or archive: path, address, Drive link"
    )
    parser.add_argument("--config", metavar="FILE", help="JSON file of MCUNet's release: path or address")
    parser.add_argument("--member", metavar="NAME", help="which checkpoint of an archive")
    parser.add_argument("--to", type=Path, metavar="FILE", help="result; by default where --model.pretrained finds it")
    return parser


PARSERS = {"prepare": prepare_parser, "weights": weights_parser}


def prepared_names() -> list[str]:
    """Names of the data sets to prepare, as their modules register them; see `classification.data.registry.source`."""
    modules = (Path(__file__).parent / "data").glob("*.py")
    calls = (node for path in modules for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return sorted(
        str(call.args[0].value)
        for call in calls
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "source"
        and isinstance(call.args[0], ast.Constant)
    )
