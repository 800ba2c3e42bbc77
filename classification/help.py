"""What `--help` prints, read from the sources of what takes the options: importing them would take many seconds.

The parser itself is built from the same signatures and docstrings, so that neither tells anything else.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from classification.options import PARSERS

PROGRAM = "python -m classification"
COMMANDS = {
    "fit": "train a run, test its best epoch, measure memory and time, and write its record",
    "measure": "measure the perplexity of the trailing layers on one training batch",
    "validate": "validation accuracy of a checkpoint, by default the run's best",
    "test": "test accuracy of a checkpoint, by default the run's best",
    "sweep": "many runs by one command: every method at every depth and seed",
    "prepare": "download a data set, check it, and unpack it",
    "weights": "published weights as a file that is loaded here",
}
SINGLE = ("fit", "measure", "validate", "test")  # commands of one run
HELP = ("--help", "-h")
# Options of a run beside those of trainer, model and data: how they are parsed.
RUN_OPTIONS: dict[str, dict[str, Any]] = {
    "--setup": {"type": str, "default": "A", "help": "name of the setup, for the record"},
    "--runs-dir": {"type": str, "default": "runs", "help": "folder that holds all runs"},
    "--dry-run": {"action": "store_true", "help": "say what would be done, and stop"},
    "--tensorboard": {"type": bool, "default": True, "help": "log to TensorBoard, in the run's folder"},
    "--batches": {
        "type": int,
        "default": 1,
        "metavar": "N",
        "help": "number of training batches that measure takes the mean over",
    },
    "--wandb": {
        "type": str | None,
        "default": None,
        "metavar": "PROJECT",
        "help": "project of Weights & Biases to log to as well",
    },
}
# One device, also where there are several: on all of them, a run would have another batch size.
TRAINER_DEFAULTS = {"logger": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "devices": 1}
LINKED = ("data.shuffle_seed", "model.rank_seed", "model.num_classes")  # taken from other settings
_HERE = Path(__file__).parent
_SECTIONS = {
    "model": ("FineTune", "the network, the method and the recipe"),
    "data": ("ImageDataModule", "the data set and its batches"),
    "trainer": ("Trainer", "of Lightning, where those that cannot work here are refused"),
}


@dataclass(frozen=True)
class Option:
    """One setting: its name, its type and default as the source has them, and what is said of it."""

    name: str
    kind: str
    default: str | None
    text: str


def wanted(arguments: Sequence[str]) -> bool:
    """Whether arguments ask for help that is told here: that of `sweep` is told by itself."""
    first = arguments[0] if arguments else ""
    return first in HELP or (first in (*SINGLE, *PARSERS) and any(word in HELP for word in arguments[1:]))


def text_of(arguments: Sequence[str]) -> str:
    """The help that arguments ask for."""
    if arguments[0] in PARSERS:
        return PARSERS[arguments[0]]().format_help()
    return _run_text(arguments[0]) if arguments[0] in SINGLE else overview()


def overview() -> str:
    """What commands there are."""
    rows = (f"  {name:<10}{text}" for name, text in COMMANDS.items())
    return "\n".join(
        [
            f"usage: {PROGRAM} {{{','.join(COMMANDS)}}} ...",
            "",
            "Fine-tune the trailing layers of a network in little memory.",
            "",
            *rows,
            "",
            f"{PROGRAM} COMMAND --help tells the options of each; configs for them are in configs/classification.",
        ]
    )


def _run_text(command: str) -> str:
    lines = [
        f"usage: {PROGRAM} {command} [--config FILE ...] [--OPTION VALUE ...]",
        "",
        f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}.",
        "",
        "A later config goes over an earlier one, and options over all. A dash in a name is as good as an underscore.",
        "",
        "  --config FILE, -c FILE",
        *_wrapped("settings as YAML; may be given several times"),
        "  --print_config",
        *_wrapped("print the settings that the other arguments give, as YAML, and stop"),
        "  --seed_everything N",
        *_wrapped("seed of the run (default: 233, the papers')"),
    ]
    if command in ("validate", "test"):
        lines += ["  --ckpt_path FILE", *_wrapped("the checkpoint (default: that of the run's best epoch)")]
        lines += ["  --verbose", *_wrapped("print a table of what was found (default: True)")]
    for name, settings in RUN_OPTIONS.items():
        lines += [f"  {name}", *_wrapped(f"{settings['help']} (default: {settings.get('default', False)})")]
    for part, (_, title) in _SECTIONS.items():
        lines += ["", f"{part}: {title}"]
        for option in options_of(part):
            default = "needed" if option.default is None else f"default: {option.default}"
            lines += [f"  --{part}.{option.name}", *_wrapped(f"{option.text} ({option.kind}; {default})")]
    lines += ["", "of a class, such as a method of lowrank: --model.method.help lowrank.ASI tells its own settings"]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 118, initial_indent=" " * 8, subsequent_indent=" " * 8, break_long_words=False)


def options_of(part: str) -> list[Option]:
    """The settings of a part: "model", "data" or "trainer"."""
    tree = ast.parse(_source(part).read_text(encoding="utf-8"))
    name = _SECTIONS[part][0]
    owner = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    made = next(node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    told = _told(ast.get_docstring(made) or ast.get_docstring(owner) or "")
    changed = TRAINER_DEFAULTS if part == "trainer" else {}
    return [
        Option(name, kind, str(changed.get(name, default)) if default is not None else None, told.get(name, ""))
        for name, kind, default in _parameters(made)
        if f"{part}.{name}" not in LINKED
    ]


def _source(part: str) -> Path:
    if part != "trainer":
        return _HERE / {"model": "module.py", "data": "data/module.py"}[part]
    found = importlib.util.find_spec("pytorch_lightning")  # does not import it
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "trainer" / "trainer.py"


def _parameters(function: ast.FunctionDef) -> Iterator[tuple[str, str, str | None]]:
    """Name, type and default of each parameter."""
    given = function.args
    positional = [*given.posonlyargs, *given.args][1:]  # without self
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    every = [*zip(positional, defaults, strict=True), *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    for parameter, default in every:
        kind = "any" if parameter.annotation is None else ast.unparse(parameter.annotation)
        yield parameter.arg, kind, None if default is None else ast.unparse(default)


def _told(docstring: str) -> dict[str, str]:
    """What the arguments' section of a docstring says of each."""
    _, _, section = inspect.cleandoc(docstring).partition("Args:\n")
    section = re.split(r"^\S", section, maxsplit=1, flags=re.MULTILINE)[0]
    found: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent(section).splitlines():
        entry = re.match(r"(\w+)(?: \(.*?\))?:\s*(.*)", line)
        if entry:
            name, line = entry[1], entry[2]
        if name:
            found[name] = " ".join(f"{found.get(name, '')} {line}".split())
    return found
