"""The shell scripts: documented, and their dry run lists the runs that they would do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_prints_the_head_of_the_script(script: Path) -> None:
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=True)
    assert f"Usage: bash scripts/{script.name}" in done.stdout
    assert "set -euo" not in done.stdout
    assert "set -euo pipefail" in script.read_text()


def test_quickstart_dry_run_lists_every_run(tmp_path: Path) -> None:
    # A stand-in for the virtual environment: this interpreter, marked as up to date.
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    wanted = subprocess.run(
        "cat requirements.txt pyproject.toml | cksum", shell=True, cwd=ROOT, capture_output=True, text=True, check=True
    )
    (venv / ".installed").write_text(wanted.stdout)
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "quickstart.sh", "--dry-run", "7"],
        env={"PATH": "/usr/bin:/bin", "VENV": str(venv), "RUNS_DIR": str(tmp_path / "runs"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    titles = [line.partition("] ")[2] for line in done.stdout.splitlines() if line.startswith("[")]
    methods = ["vanilla", "gradient_filter_r2", "svd_0.8", "hosvd_0.8", "asi"]
    trained = [f"{method}, last {layers}, seed 7" for layers in (2, 4) for method in methods]
    assert titles == ["pretrain, seed 7", "perplexity, last 2, seed 7", "perplexity, last 4, seed 7", *trained]
    assert not (tmp_path / "runs").exists()
