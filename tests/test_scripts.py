"""The shell scripts: documented, and their dry run lists the runs that they would do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "scripts").rglob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_prints_the_head_of_the_script(script: Path) -> None:
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=True)
    assert f"Usage: bash {script.relative_to(ROOT)}" in done.stdout
    assert "set -euo" not in done.stdout
    assert "set -euo pipefail" in script.read_text()


def titles_of(script: Path, tmp_path: Path, *arguments: str, **environment: str) -> list[str]:
    """Titles of the runs that a script's dry run lists."""
    # A stand-in for the virtual environment: this interpreter, marked as up to date.
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    python = venv / "bin" / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    wanted = subprocess.run(
        "cat requirements.txt pyproject.toml | cksum", shell=True, cwd=ROOT, capture_output=True, text=True, check=True
    )
    (venv / ".installed").write_text(wanted.stdout)
    paths = {"VENV": str(venv), "RUNS_DIR": str(tmp_path / "runs"), "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", script, "--dry-run", *arguments],
        env={"PATH": "/usr/bin:/bin", **paths, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not (tmp_path / "runs").exists()
    return [line.partition("] ")[2] for line in done.stdout.splitlines() if line.startswith("[")]


def test_quickstart_dry_run_lists_every_run(tmp_path: Path) -> None:
    titles = titles_of(ROOT / "scripts" / "quickstart.sh", tmp_path, "7")
    methods = ["vanilla", "gradient_filter_r2", "svd_0.8", "hosvd_0.8", "asi"]
    trained = [f"{method}, last {layers}, seed 7" for layers in (2, 4) for method in methods]
    assert titles == ["pretrain, seed 7", "perplexity, last 2, seed 7", "perplexity, last 4, seed 7", *trained]


TRANSFORMERS = ROOT / "scripts" / "classification" / "transformers"


def test_scripts_of_transformers_list_their_runs(tmp_path: Path) -> None:
    methods = ["vanilla", "hosvd_0.8", "wsi_0.9", "asi", "wasi_0.9"]
    expected = ["perplexity, last 2, seed 5", *(f"{method}, last 2, seed 5" for method in methods)]
    for name in ("swin_t", "vit_b_32"):
        assert titles_of(TRANSFORMERS / f"{name}.sh", tmp_path, LAYERS="2", SEEDS="5") == expected
    methods = ["vanilla", "asi_rank20", "wasi_0.1_rank20"]
    expected = [f"{method}, last {layers}, seed 233" for layers in (1, 2, 3, 4, 5) for method in methods] * 2
    options = {"EXTRA": "--model.weights /data/tinyllama --data.tokenizer /data/tinyllama"}
    assert titles_of(TRANSFORMERS / "tinyllama.sh", tmp_path, "boolq", "ag_news", **options) == expected
