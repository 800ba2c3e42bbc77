"""What `report --watch` sees of a folder of runs, and its exit code."""

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from experiment import ExperimentError, Record, Run, add_planned
from experiment.jobs import Job, Outcome, Program, do_job
from experiment.lock import hold
from report import watch as watch_module
from report.__main__ import main
from report.watch import shown, watch

RUN = Run("classification", "B", "mcunet", "digits", "vanilla", 2, 1)
RUNS = [replace(RUN, method=method, seed=seed) for method in ("vanilla", "asi_1of20") for seed in (1, 2)]
SEGMENTED = Run("segmentation", "finetune", "fcn", "digit_scenes", "vanilla", 5, 1)


def finish(root, run):
    run.folder(root).mkdir(parents=True, exist_ok=True)
    Record(run, {}, {}, {}, {}).save(run.folder(root))


def at_work(root, run, config, seconds):
    """What a run has in its folder after some rows."""
    folder = run.folder(root)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.dump(config))
    rows = "".join(f"{number},0.5,{value}\n" for number, value in enumerate(seconds))
    (folder / "metrics.csv").write_text(f"epoch,val_accuracy,seconds\n{rows}")
    return folder


def test_each_state_is_seen_from_the_folder_and_the_code_says_that_not_all_is_done(tmp_path, capsys):
    add_planned(tmp_path, [*RUNS, SEGMENTED])
    finish(tmp_path, RUNS[0])
    RUNS[1].folder(tmp_path).mkdir(parents=True)
    (RUNS[1].folder(tmp_path) / "failure.log").write_text("title\ncommand\nthere are no data\n")
    first = at_work(tmp_path, RUNS[2], {"trainer": {"max_epochs": 10}}, [60.0, 100.0, 62.0])
    lengths = {"max_iters": 200, "val_interval": 50}
    other = at_work(tmp_path, SEGMENTED, {"crop_size": (8, 8), "train_cfg": lengths}, [30.0])
    with hold(first), hold(other):
        assert main(["--watch", str(tmp_path)]) == 1
        said = capsys.readouterr().out
        process = "process"
    assert f"asi_1of20, last 2, seed 1: epoch 3/10, {process}" in said
    assert "7 min 14 s left" in said  # seven epochs of the median's 62 s
    assert "seed 1: iteration 50/200, process" in said
    assert "1 min 30 s left" in said
    assert "failed   mcunet on digits, vanilla, last 2, seed 2: there are no data\n" in said
    assert said.endswith("1 done, 2 running, 1 waiting, 1 failed of 5 runs\n")
    table = {tuple(line.replace("│", " ").split()) for line in said.splitlines() if line.startswith("│")}
    assert {("2", "vanilla", "1", "1"), ("2", "asi_1of20", "1", "1"), ("5", "vanilla", "1")} <= table
    assert not (tmp_path / "report").exists()


def test_when_all_is_done_the_code_is_0(tmp_path):
    add_planned(tmp_path, RUNS)
    for run in RUNS:
        finish(tmp_path, run)
    assert main([str(tmp_path), "--watch"]) == 0
    (RUNS[0].folder(tmp_path) / "result.json").write_text("{}")  # no record
    assert main([str(tmp_path), "--watch"]) == 1


def test_a_finished_run_of_which_other_settings_were_refused_since_has_failed(tmp_path, capsys):
    def refuse(arguments):
        raise ExperimentError("it holds a run with other settings")

    add_planned(tmp_path, [RUN])
    finish(tmp_path, RUN)
    job, done = Job("one", RUN, ("fit",)), Program("x", lambda arguments: None)
    assert do_job(job, done, tmp_path) is Outcome.DONE
    other = replace(job, arguments=("fit", "--other"))
    assert do_job(other, Program("x", refuse), tmp_path) is Outcome.FAILED
    assert main(["--watch", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "failed   mcunet on digits, vanilla, last 2, seed 1: it holds a run with other settings\n" in said
    assert said.endswith("0 done, 0 running, 0 waiting, 1 failed of 1 runs\n")
    assert do_job(job, Program("x", refuse), tmp_path) is Outcome.DONE  # known, and so not asked again
    assert main(["--watch", str(tmp_path)]) == 0


def test_runs_are_where_their_plan_is_at_any_depth_below_the_folder(tmp_path):
    root = tmp_path / "of one experiment"
    add_planned(root, RUNS)
    for run in RUNS:
        finish(root, run)
    for folder in (tmp_path, root, root / "classification" / "B"):
        assert main(["--watch", str(folder)]) == 0


def test_on_a_terminal_it_looks_until_nothing_is_left_to_wait_for(tmp_path, monkeypatch):
    add_planned(tmp_path, RUNS)
    left, seen = list(RUNS), io.StringIO()
    monkeypatch.setattr(watch_module, "Console", lambda **told: Console(file=seen, force_terminal=True, **told))
    monkeypatch.setattr(watch_module.time, "sleep", lambda seconds: finish(tmp_path, left.pop()))
    assert watch(tmp_path) == 0
    assert left == []
    assert "4 done, 0 running, 0 waiting, 0 failed of 4 runs" in seen.getvalue()


def test_a_run_that_was_killed_is_no_longer_at_work(tmp_path):
    add_planned(tmp_path, [RUN])
    folder = RUN.folder(tmp_path)
    folder.mkdir(parents=True)
    code = "import sys, os; from pathlib import Path; from experiment.lock import hold\n"
    code += "with hold(Path(sys.argv[1])): print('held', flush=True); os.kill(os.getpid(), 9)"
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=root, capture_output=True, check=False)
    assert killed.stdout == b"held\n"
    assert list(folder.glob(".lock-*"))
    (state,) = watch_module.Watch(tmp_path).look()
    assert state.state == "waiting"


def test_of_many_at_work_not_every_one_is_listed():
    states = [watch_module.State(replace(RUN, seed=seed), "running", "epoch 1/2") for seed in range(20)]
    text = io.StringIO()
    Console(file=text, width=200).print(shown(states))
    assert text.getvalue().count("running  mcunet") == 12
    assert "and 8 more running" in text.getvalue()


@pytest.mark.parametrize("made", [False, True])
def test_where_nothing_is_planned_it_says_so(tmp_path, capsys, made):
    root = tmp_path / "runs"
    if made:
        root.mkdir()
    assert main(["--watch", str(root)]) == 2
    assert ("no run is planned" if made else "is not a folder") in capsys.readouterr().err
