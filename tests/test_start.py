"""A command that only tells its options, or that there is nothing to do, imports nothing that takes seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from classification.sweep import parse
from experiment import Record
from experiment.receipt import write_receipt
from experiment.record import RESULT

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "torchvision", "pytorch_lightning", "torchmetrics", "transformers", "sklearn", "mmcv", "mmseg"}
HEAVY |= {"pandas", "matplotlib"}
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


@pytest.mark.slow
def test_importing_the_library_imports_no_compiler() -> None:
    program = "import sys, lowrank; assert 'torch._dynamo' not in sys.modules; dir(lowrank).index('SGD'); lowrank.SGD"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.slow
def test_every_command_is_told_by_the_overview_and_by_the_page() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    for package, names in COMMANDS.items():
        told = imported(package, "--help")[1].stdout
        for name in filter(None, names):
            assert re.search(rf"^ +{name} ", told, re.MULTILINE), name
            assert f"`python -m {package} {name}`" in page
    assert "`python -m report`" in page


@pytest.mark.slow
def test_nothing_is_coloured_without_a_terminal() -> None:
    program = "from mmengine.logging import MMLogger; MMLogger.get_instance('a', log_level='INFO').info('said')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "said" in done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_a_command_that_there_is_not_is_one_line_at_once() -> None:
    names, done = imported("classification", "trian")
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert len(said) == 1
    assert said[0].startswith("error: there is no command 'trian'; allowed: fit, ")
    assert not names & HEAVY


@pytest.mark.slow
def test_importing_the_package_registers_its_hook_though_its_command_does_not() -> None:
    program = "import segmentation; from mmengine.registry import HOOKS; print('LowRankHook' in HOOKS.module_dict)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "True\n"


@pytest.mark.slow
def test_a_finished_sweep_of_500_runs_is_listed_without_importing_anything_heavy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # 1,200 of them take a while
    methods = ("vanilla", "hosvd_0.8", "svd_0.8", "gradient_filter_r2", "asi")
    words = ["sweep", "--setup", "a", "--model", "mcunet", "--dataset", "pets", "--methods", *methods]
    words += ["--layers", "1-10", "--seeds", *map(str, range(10)), "--budget", "1/20", "--runs-dir", str(tmp_path)]
    words += ["--data.workers", "2"]  # goes to every run, and is checked by what is heavy where there is one to do
    jobs = parse(words[1:-2])[0].jobs()
    assert len(jobs) == 500 + 100  # and a table of perplexity for each depth and seed
    for job in jobs:
        folder = job.run.folder(tmp_path)
        folder.mkdir(parents=True)
        if job.result == RESULT:
            Record(job.run, {"test": 0.5}, {}, {}, {}).save(folder)
        else:
            (folder / job.result).write_text("{}")
        write_receipt(folder / job.result, [*job.arguments, *words[-2:]])
    names, done = imported("classification", *words)
    assert done.returncode == 0, done.stderr[-300:]
    assert "600 of 600 runs done" in done.stdout
    assert not names & HEAVY
    (tmp_path / "classification/A/mcunet/pets/vanilla/layers3/seed4" / RESULT).write_text("")
    names, done = imported("classification", *words[:-2], "--dat.workers", "2")
    assert done.returncode == 2  # now it is looked at what the option is
    assert names & HEAVY
