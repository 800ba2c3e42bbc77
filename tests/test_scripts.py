"""The shell scripts: documented, and their dry run lists the runs that they would do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scripts").rglob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_prints_the_head_of_the_script(script: str) -> None:
    done = subprocess.run(["bash", ROOT / script, "--help"], capture_output=True, text=True, check=True)
    assert f"Usage: bash {script}" in done.stdout
    assert "set -euo" not in done.stdout
    assert "set -euo pipefail" in (ROOT / script).read_text()


def test_quickstart_dry_run_lists_every_run(tmp_path: Path, script_environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "quickstart.sh", "--dry-run", "7"],
        env=script_environment,
        capture_output=True,
        text=True,
        check=True,
    )
    titles = [line.partition("] ")[2] for line in done.stdout.splitlines() if line.startswith("[")]
    methods = ["vanilla", "gradient_filter_r2", "svd_0.8", "hosvd_0.8", "asi"]
    rows = [(method, layers) for layers in (2, 4) for method in methods]
    rows = [("perplexity", 2), ("perplexity", 4), *rows]
    trained = [f"digits: {method}, last {layers}, seed 7" for method, layers in rows]
    assert titles == ["digits: pretrain, seed 7", *trained]
    assert not (tmp_path / "runs").exists()
