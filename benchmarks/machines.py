"""What a sweep costs beside its runs: `python -m benchmarks.machines records | workers | slurm`.

records: the plan of 5,000 jobs, and the report and the watch of 5,000 records: processor time and memory.
workers: a sweep of short runs one after the other and in two processes, elapsed and processor time, and in what records
differ. slurm: the same sweep on a Slurm of this machine (`benchmarks.cluster`), a third of whose jobs are disturbed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cluster import Cluster
from benchmarks.disturbances import disturb
from benchmarks.kills import differences
from experiment import Record, Run, add_planned
from experiment.record import RESULT
from experiment.slurm import LOG

RECORDS = 5000
METHODS = ("vanilla", "gradient_filter_r2", "hosvd_0.8", "asi_hosvd_0.8")
SHORT = (
    *("--data.image_size", "64", "--data.batch_size", "8", "--trainer.max_epochs", "2"),
    *("--trainer.limit_val_batches", "2", "--trainer.limit_test_batches", "2"),
    *("--trainer.enable_progress_bar", "false", "--tensorboard", "false"),
)


_METER = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, *sys.argv[1:]], stdout=2).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(done, used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


@dataclass(frozen=True)
class Cost:
    """What a command and all that it started took: seconds, and the largest memory of one of them in MiB."""

    elapsed: float
    processor: float
    mebibytes: float
    code: int

    def __str__(self) -> str:
        return f"{self.elapsed:.1f} s, {self.processor:.1f} s of processor time, {self.mebibytes:.0f} MiB"


def measured(words: Sequence[str], threads: int | None = 1) -> Cost:
    """Run `python WORDS`, with so many threads; None for as many as it likes."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    environment.pop("OMP_NUM_THREADS", None)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    start = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-c", _METER, *words], env=environment, capture_output=True, text=True, check=True
    )
    elapsed = time.perf_counter() - start
    done, processor, kibibytes = found.stdout.split()
    if int(done):
        print(found.stderr[-2000:], file=sys.stderr)
    return Cost(elapsed, float(processor), int(kibibytes) / 1024, int(done))


def write_records(root: Path, count: int) -> None:
    """So many records, as sweeps leave them: five seeds of each method and depth, and 100 for each data set."""
    runs = []
    for number in range(count):
        rest, seed = divmod(number, 5)
        rest, method = divmod(rest, len(METHODS))
        rest, depth = divmod(rest, 5)
        runs.append(Run("classification", "A", "mcunet", f"data{rest}", METHODS[method], depth + 1, seed))
    for number, run in enumerate(runs):
        share = (number * 7919 % 1000) / 1000
        kept = 10**6 * (1 + number % 997)
        accuracy = {"val_best": share, "val_last": share, "test": share}
        memory = {"activation_formula": kept, "saved_measured": 2 * kept, "peak_measured": 3 * kept}
        recipe = {"epochs": 50, "steps": 1000, "learning_rate": 0.05, "batch_size": 128, "image_size": 224}
        run.folder(root).mkdir(parents=True)
        found = Record(
            run, accuracy, memory, {"paper": 9 * kept, "corrected": 8 * kept}, {"step_median": 0.1}, {}, recipe
        )
        found.save(run.folder(root))
    add_planned(root, runs)


def records(root: Path) -> None:
    """Measure what 5,000 jobs and records cost."""
    words = [
        "classification",
        "sweep",
        "--setup",
        "b",
        "--model",
        "mcunet",
        "--dataset",
        "digits",
        "--runs-dir",
        str(root),
    ]
    words += [
        "--layers",
        "1-14",
        "--methods",
        "vanilla",
        "hosvd_0.8",
        "asi",
        "--seeds",
        *map(str, range(RECORDS // 57 + 1)),
    ]
    print(f"plan of {RECORDS} jobs: {measured(['-m', *words, '--dry-run'])}")
    write_records(root, RECORDS)
    print(f"first report of {RECORDS} records: {measured(['-m', 'report', str(root)])}")
    print(f"the same again: {measured(['-m', 'report', str(root)])}")
    changed = next(root.rglob(RESULT))
    changed.write_text(changed.read_text().replace('"test": 0', '"test": 0.5 ', 1).replace("0.5 .", "0."))
    print(f"with one of them changed: {measured(['-m', 'report', str(root)])}")
    print(f"watch: {measured(['-m', 'report', '--watch', str(root)])}")


def short_sweep(root: Path, runs: int, batches: int) -> list[str]:
    """A sweep with so many runs of two epochs of so many batches, of which each fourth is a pretraining."""
    words = ["-m", "classification", "sweep", "--setup", "b", "--model", "mcunet", "--dataset", "digits"]
    words += ["--methods", "vanilla", "gradient_filter_r2", "hosvd_0.8", "--layers", "2"]
    words += ["--seeds", *map(str, range(1, runs // 4 + 1)), "--runs-dir", str(root)]
    return [*words, *SHORT, "--trainer.limit_train_batches", str(batches)]


def told(differences: Sequence[str]) -> str:
    """How many there are, and the first of them."""
    return f"{len(differences)}, such as {differences[0]}" if differences else "none"


def compare(root: Path, other: Path) -> list[str]:
    """In what the runs of two folders differ, but for times and logs."""
    folders = {path.parent.relative_to(root) for path in root.rglob(RESULT)}
    found = [
        f"{folder} is done in one alone"
        for folder in folders ^ {p.parent.relative_to(other) for p in other.rglob(RESULT)}
    ]
    for folder in sorted(folders):
        if (other / folder / RESULT).exists():
            unequal = differences(root / folder, other / folder)
            # What was saved last but one is where a signal came, if one came.
            found += [f"{folder}: {what}" for what in unequal if not what.startswith((LOG, "checkpoints/previous."))]
    return found


def workers(root: Path, runs: int, batches: int) -> None:
    """Measure a sweep of short runs in one process and in two."""
    threads = {"all threads": None, "one thread": 1}
    for name, count in threads.items():
        folder = root / name.replace(" ", "_")
        serial = measured(short_sweep(folder / "1", runs, batches), count)
        print(f"{runs} runs, {name}, one after the other: {serial}", flush=True)
        two = measured([*short_sweep(folder / "2", runs, batches), "--workers", "2"], count)
        print(f"{runs} runs, {name}, two workers: {two}; {two.elapsed / serial.elapsed:.2f} of the time", flush=True)
        print(f"  differences: {told(compare(folder / '1', folder / '2'))}", flush=True)


def slurm(root: Path, runs: int, batches: int, seed: int) -> None:
    """Do a sweep on Slurm with two jobs at a time, a third of which is disturbed, and compare with the serial one."""
    os.environ["OMP_NUM_THREADS"] = "1"
    serial = measured(short_sweep(root / "1", runs, batches))
    print(f"{runs} runs one after the other: {serial}", flush=True)
    with Cluster(2) as cluster:
        submitted = measured([*short_sweep(root / "2", runs, batches), "--launcher", "slurm", "--workers", "2"])
        if submitted.code:
            raise SystemExit(submitted.code)
        start = time.perf_counter()
        done = disturb(cluster, runs // 3, seed, latest=20.0, share=0.9)
        print(f"{runs} runs on Slurm: {time.perf_counter() - start:.0f} s; disturbed {len(done)}: {', '.join(done)}")
    starts = sum(path.read_text().count("--- job ") for path in (root / "2").rglob(LOG))
    trained = sum(path.read_text().count("record in ") for path in (root / "2").rglob(LOG))
    print(f"  {starts} starts, {trained} records written; differences: {told(compare(root / '1', root / '2'))}")


def main() -> None:
    """Measure what the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machines", description=__doc__)
    parser.add_argument("what", choices=("records", "workers", "slurm"))
    parser.add_argument("--runs", type=int, default=24, help="of a sweep, four for each seed (default: 24)")
    parser.add_argument("--batches", type=int, default=10, help="of each of a run's two epochs (default: 10)")
    parser.add_argument("--seed", type=int, default=1, help="of what is disturbed (default: 1)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lowrank-") as folder:
        if options.what == "records":
            records(Path(folder))
        elif options.what == "workers":
            workers(Path(folder), options.runs, options.batches)
        else:
            slurm(Path(folder), options.runs, options.batches, options.seed)


if __name__ == "__main__":
    main()
