"""The scripts of models and setups: which runs they list, that they do them, and that they go on after a kill."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from commands import ROOT

from classification import sweep
from experiment import find_planned
from report.summary import find_runs

SCRIPTS = ROOT / "scripts" / "classification"
MODELS = ("mcunet", "mobilenet_v2", "resnet18", "resnet34")
# Without --trainer.enable_progress_bar, since what a script prints is what tests wait for.
SMALL = (
    *("--data.image_size", "64", "--data.batch_size", "8", "--data.eval_batch_size", "16"),
    *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "2", "--trainer.limit_test_batches", "2"),
    *("--model.cache_front", "false", "--model.pretrained", "false"),
)


def run(script, environment, *words, **variables):
    """Run a script that must succeed. Returns what it printed."""
    command = ["bash", str(SCRIPTS / script), *words]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def words_of(script_environment):
    """What a script gives to Python, which is not started; once `scripts/setup.sh` was content."""

    def words_of(script, *words, **variables):
        python = Path(script_environment["VENV"]) / "bin" / "python"
        python.write_text("#!/usr/bin/env bash\nprintf '%s\\0' \"$@\"\n")
        program, *given = run(script, script_environment, *words, **variables).split("\0")[:-1]
        assert program == "-m"
        return given

    return words_of


def listed(printed):
    """The titles of a dry run."""
    return re.findall(r"^\[\d+/\d+\] (.+)$", printed, re.MULTILINE)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("setup", ["a", "b"])
def test_a_script_is_of_its_model_and_setup(words_of, tmp_path, capsys, setup, model):
    package, command, *words = words_of(
        f"setup_{setup}/{model}.sh", "--dry-run", "digits", "--", "--data.batch_size", "7"
    )
    assert (package, command) == ("classification", "sweep")
    assert sweep.main(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  python")]
    # Six methods at two depths and vanilla on all, two perplexity tables, and in setup B pretraining.
    assert len(lines) == 2 * 6 + 1 + 2 + (setup == "b")
    assert all(f"/models/{model}.yaml" in line and line.endswith("--data.batch-size 7") for line in lines)
    assert sum(f"/setups/{setup}.yaml" in line for line in lines) == 15
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_papers_data_sets_and_budgets_are_the_default(script_environment):
    printed = run("setup_a/mcunet.sh", script_environment, "--dry-run")
    datasets = [title.partition(":")[0] for title in listed(printed)]
    assert list(dict.fromkeys(datasets)) == ["pets", "flowers102", "cub200", "cifar10", "cifar100"]
    assert len(re.findall(r"--model\.budget\.mib 0\.\d+", printed)) == 2 * 5
    printed = run("setup_b/resnet34.sh", script_environment, "--dry-run")
    assert {title.partition(":")[0] for title in listed(printed)} == {"imagenet"}
    assert re.findall(r"--model\.budget\.mib (0\.2965|1\.1127)\d+", printed) == ["0.2965", "1.1127"]


def test_variables_reach_the_runs(script_environment, tmp_path):
    weights = tmp_path / "some file.pt"
    weights.touch()
    settings = {"METHODS": "vanilla asi hosvd_0.8", "LAYERS": "1-2 all", "SEEDS": "4 5", "BUDGET": "hosvd"}
    settings |= {"EPOCHS": "3", "DATA_DIR": "a folder", "WEIGHTS": str(weights)}
    printed = run("setup_b/mcunet.sh", script_environment, "digits", "--dry-run", **settings)
    rows = [(name, depth) for depth in ("1", "2", "all") for name in ("vanilla", "hosvd_0.8", "asi_hosvd_0.8")]
    rows = [("perplexity", depth) for depth in ("1", "2", "all")] + rows
    assert listed(printed) == [f"digits: {name}, last {depth}, seed {seed}" for seed in (4, 5) for name, depth in rows]
    settings = {"SETUP": "b", "LAYERS": "1-2 all", "METHODS": "asi hosvd_0.8"}
    curve = run("curve.sh", script_environment, "mcunet", "digits", "--dry-run", **settings)
    assert [title for title in listed(curve) if ": asi" in title] == [
        f"digits: asi_hosvd_0.8, last {depth}, seed 233" for depth in ("1", "2", "all")
    ]
    lines = [line for line in printed.splitlines() if line.startswith("  python")]
    assert all("--data.root 'a folder'" in line and f"--model.weights '{weights}'" in line for line in lines)
    assert sum("--trainer.max_epochs 3" in line for line in lines) == 2 * 9


def test_the_curve_of_a_transformer_is_of_methods_for_linear_layers(script_environment):
    printed = run("curve.sh", script_environment, "minilm", "review_sentences", "--dry-run", LAYERS="1-2")
    methods = ["vanilla", "hosvd_0.8", "wsi_0.9", "asi_hosvd_0.8", "wasi_0.9_hosvd_0.8"]
    rows = [(method, depth) for depth in (1, 2) for method in methods]
    assert listed(printed)[2:] == [f"review_sentences: {method}, last {depth}, seed 233" for method, depth in rows]


def test_a_script_without_a_model_explains_itself(script_environment):
    command = ["bash", str(SCRIPTS / "run.sh")]
    done = subprocess.run(command, env=script_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Usage:" in done.stderr


@pytest.mark.slow
def test_methods_run_to_the_end_then_nothing_is_left_and_the_table_has_them(script_environment, tmp_path):
    runs = tmp_path / "runs"
    methods = ["asi", "asi_cold", "asi_one_energy", "asi_per_layer", "asi_published", "asi_random"]
    others = ["gradient_filter_r2", "hosvd_0.8", "vanilla"]
    settings = {"METHODS": " ".join(methods + others), "LAYERS": "2", "EPOCHS": "1", "SEEDS": "233"}
    run("setup_b/mcunet.sh", script_environment, "digits", "--", *SMALL, **settings)
    records = [record for _, record in find_runs(runs)]
    assert {record.run for record in records} == set(find_planned(runs))
    methods = [f"{method}_hosvd_0.8" for method in methods] + others
    assert sorted(record.run.method for record in records if record.run.setup == "B") == sorted(methods)

    # The ablations are among them, so there is nothing to do but the tables.
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    printed = run("ablations.sh", script_environment, "--", *SMALL, LAYERS="2", EPOCHS="1", SEEDS="233")
    assert printed.count("done already") == 10  # eight methods, perplexity and pretraining
    assert "training" not in printed
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path.suffix != ".log")
    table = (runs / "report" / "classification" / "B" / "mcunet" / "digits" / "table.md").read_text()
    assert all(f"| {method} " in table for method in methods)


def weights(runs: Path):
    """Final and best weights of every run, by the run's folder."""
    return {path.relative_to(runs): torch.load(path, weights_only=True)["state_dict"] for path in runs.rglob("*.ckpt")}


@pytest.mark.slow
def test_a_script_that_is_killed_and_run_again_ends_with_the_same_weights(script_environment, tmp_path):
    settings = {"METHODS": "hosvd_0.8 asi", "LAYERS": "2", "EPOCHS": "3"}
    killed = ["--trainer.callbacks+", "commands.KillInEpoch", "--trainer.callbacks.epoch", "2"]
    killed += ["--trainer.callbacks.word", "/asi_hosvd_0.8/"]
    paths = os.pathsep.join([script_environment["PYTHONPATH"], str(Path(__file__).parent)])
    command = ["bash", str(SCRIPTS / "setup_a/mcunet.sh"), "digits", "--", *SMALL, *killed]
    ended = subprocess.run(command, env=script_environment | settings | {"PYTHONPATH": paths}, check=False)
    assert ended.returncode == -9  # the script's own process is the one that trains
    assert len(find_runs(tmp_path / "runs")) == 1

    # The curve of a single depth is these runs, and a figure of them.
    printed = run("curve.sh", script_environment, "mcunet", "digits", "--", *SMALL, **settings)
    assert (tmp_path / "runs/report/classification/A/mcunet/digits/pareto.svg").exists()
    assert len(re.findall(r"^resuming: .* asi_hosvd_0.8, layers 2", printed, re.MULTILINE)) == 1
    words = ["--setup", "a", "--model", "mcunet", "--dataset", "digits", "--runs_dir", str(tmp_path / "whole")]
    words += ["--methods", "hosvd_0.8", "asi", "--layers", "2", "--epochs", "3"]
    assert sweep.main([*words, *SMALL]) == 0
    interrupted, whole = weights(tmp_path / "runs"), weights(tmp_path / "whole")
    assert interrupted.keys() == whole.keys()
    assert len(whole) == 2 * 3  # of two runs: the last, the one before and the best
    for path, state in whole.items():
        assert state.keys() == interrupted[path].keys()
        assert all(torch.equal(state[name], interrupted[path][name]) for name in state), path
