"""A command that only tells its options, or that there is nothing to do, imports nothing that takes seconds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "torchvision", "pytorch_lightning", "torchmetrics", "transformers", "sklearn", "mmcv", "mmseg"}
COMMANDS = {
    "classification": ("", "fit", "measure", "validate", "test", "sweep", "prepare", "weights"),
    "segmentation": ("", "train", "measure", "sweep", "prepare", "picture"),
    "report": ("",),
}


def imported(*words: str) -> tuple[set[str], subprocess.CompletedProcess[str]]:
    """Top-level names of all modules that a command imports, and how it ended."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *words], capture_output=True, text=True, cwd=ROOT, check=False
    )
    names = set(re.findall(r"^import time:.*\| +(\w+)", done.stderr, re.MULTILINE))
    assert "argparse" in names or "ast" in names
    return names, done


@pytest.mark.parametrize(
    ("package", "command"), [(package, command) for package, names in COMMANDS.items() for command in names]
)
def test_help_imports_nothing_heavy(package: str, command: str) -> None:
    names, done = imported(package, *([command] if command else []), "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: python -m {package}")
    assert not names & HEAVY


def test_a_command_that_there_is_not_is_one_line_at_once() -> None:
    names, done = imported("classification", "trian")
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert len(said) == 1
    assert said[0].startswith("error: there is no command 'trian'; allowed: fit, ")
    assert not names & HEAVY


def test_importing_the_package_registers_its_hook_though_its_command_does_not() -> None:
    program = "import segmentation; from mmengine.registry import HOOKS; print('LowRankHook' in HOOKS.module_dict)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "True\n"
