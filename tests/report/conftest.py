"""Synthetic records, written the way that runs write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiment import Record, Run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The folder that `write` writes below."""
    return tmp_path / "runs"


@pytest.fixture
def write(runs: Path) -> Callable[..., Record]:
    """Write one record; `test` is a share, `memory` bytes; what is not given has a plain value."""

    def write(method: str, layers: int | str, seed: int = 0, **given: Any) -> Record:
        where = {name: given.pop(name, default) for name, default in WHERE.items()}
        run = Run(method=method, layers=layers, seed=seed, **where)
        record = _record(run, **given)
        record.run.folder(runs).mkdir(parents=True)
        path = record.save(record.run.folder(runs))
        return Record.load(path)

    return write


WHERE = {"task": "classification", "setup": "A", "model": "mcunet", "dataset": "pets"}


def _record(
    run: Run, test: float = 0.5, memory: int = 2**20, flops: int = 10**9, step: float = 0.1, **given: Any
) -> Record:
    accuracy = given.get("accuracy", {"val_best": min(1.0, test + 0.01), "val_last": test, "test": test})
    kept = given.get("kept", 2 * memory)
    memory_bytes = {
        "activation_formula": memory,
        "saved_measured": kept,
        "peak_measured": 3 * memory,
        "peak_inference": 2**19,
    }
    counts = {"paper": flops // 2, "corrected": flops}
    times = {"step_median": step, "total": 9.0}
    kept_as = given.get("memory_bytes", memory_bytes)
    told = {part: given.get(part, {}) for part in ("provenance", "recipe", "loss")}
    return Record(run, accuracy, kept_as, counts, times, **told)
