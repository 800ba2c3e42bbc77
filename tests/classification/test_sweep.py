"""A sweep: its order, a job that fails, and what is left to do."""

import contextlib
import re

import pytest
from commands import TINY

from classification import sweep
from experiment import ExperimentError, Record, Run, RunFolder

NEEDED = ["--setup", "b", "--model", "mcunet", "--dataset", "digits"]


def words(runs, *options):
    return [*NEEDED, "--layers", "2", "--runs_dir", str(runs), *options]


class Commands:
    """Stands in for the command line: notes what it is asked to do, and fails where it is told to."""

    def __init__(self, failing="", how=None):
        self.calls = []
        self.failing, self.how = failing, how

    def __call__(self, arguments):
        self.calls.append(list(arguments))
        if self.failing and self.failing in " ".join(arguments):
            raise self.how


def produced_and_needed(arguments, runs):
    """The folder that a job makes, and the paths below the runs that its arguments name."""
    options = [str(argument) for argument in arguments]
    value = {name: options[place + 1] for place, name in enumerate(options) if name.startswith("--")}
    names = re.findall(r"methods/(\S+)\.yaml", " ".join(options))
    pretraining = any("b_pretrain.yaml" in option for option in options)
    method = "perplexity" if options[0] == "measure" else (names or ["vanilla"])[0]
    setup = "B-pretrain" if pretraining else "B" if any("/b.yaml" in option for option in options) else "A"
    layers = value.get("--model.layers", "all")
    run = Run(
        *("classification", setup, "mcunet", "digits", method),
        layers if layers == "all" else int(layers),
        int(value["--seed_everything"]),
    )
    needed = [
        value[name] for name in ("--model.weights", "--model.budget.table", "--model.budget.run") if name in value
    ]
    return run.folder(runs), needed


@pytest.mark.parametrize("setup", ["a", "b"])
def test_each_job_comes_after_what_it_needs(tmp_path, setup):
    options = [*NEEDED, "--setup", setup, "--layers", "2", "4", "all", "--seeds", "1", "2", "--runs_dir", str(tmp_path)]
    commands = Commands()
    assert sweep.main(options, commands) == 0
    made, methods = [], set()
    for call in commands.calls:
        folder, needed = produced_and_needed(call, tmp_path)
        assert folder not in made
        for path in needed:
            assert any(path == str(there) or path.startswith(f"{there}/") for there in made), path
        made.append(folder)
        methods.add(folder.parts[-3])
    every = {path.stem for path in (sweep.CONFIGS / "methods").glob("*.yaml")}
    methods_shipped = {method for method in every if not method.startswith(sweep.LINEAR_ONLY)}
    assert methods == methods_shipped | {"perplexity"} | ({"vanilla"} if setup == "b" else set())
    runs_each = len(methods_shipped) * 3 + 3 + (setup == "b")
    assert len(made) == 2 * runs_each


def test_a_dry_run_lists_the_jobs_in_their_order_and_does_nothing(tmp_path, capsys):
    commands = Commands()
    assert sweep.main(words(tmp_path, "--dry_run"), commands) == 0
    listed = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  python")]
    assert (commands.calls, list(tmp_path.iterdir())) == ([], [])
    sweep.main(words(tmp_path), commands)
    assert [line[3:] for line in listed] == commands.calls


def test_further_arguments_go_to_every_job(tmp_path):
    commands = Commands()
    sweep.main(words(tmp_path, *TINY), commands)
    assert all(call[-len(TINY) :] == list(TINY) for call in commands.calls)


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        (ExperimentError("no such data set"), "no such data set\n\n"),
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
    ],
    ids=["mendable", "unforeseen"],
)
def test_a_job_that_fails_stops_no_other_and_is_in_the_log(tmp_path, capsys, how, cause):
    commands = Commands("svd_0.8.yaml", how)
    everything = Commands()
    assert sweep.main(words(tmp_path / "runs"), everything) == 0
    assert not (tmp_path / "runs" / "failures.log").exists()
    assert sweep.main(words(tmp_path / "runs"), commands) == 1
    assert commands.calls == everything.calls
    log = (tmp_path / "runs" / "failures.log").read_text()
    failing = [call for call in commands.calls if "svd_0.8.yaml" in " ".join(call)]
    assert len(failing) == 2  # hosvd_0.8 as well
    for call in failing:
        assert f"python -m classification {' '.join(call)}\n" in log
    assert log.count(cause) == 2
    printed = capsys.readouterr().err
    assert "failures.log" in printed
    assert "svd_0.8, last 2" in printed


def test_a_user_who_stops_a_sweep_stops_it(tmp_path):
    def command(arguments):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.main(words(tmp_path), command)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "0"], "--layers has '0'"),
        (["--layers", "two"], "--layers has 'two'"),
        (["--methods", "nothing"], "nothing"),
        (["--methods", "asi"], "asi takes its budget from hosvd_0.8"),
        (["--model", "lenet"], "lenet"),
        (["--seeds", "x"], "x"),
    ],
)
def test_a_mistake_in_a_sweep_is_refused_before_any_job(tmp_path, capsys, options, message):
    commands = Commands()
    with pytest.raises(SystemExit) as ended:
        sweep.main([*words(tmp_path), *options], commands)
    assert (ended.value.code, commands.calls) == (2, [])
    assert message in capsys.readouterr().err


# The end of this file trains.

METHODS = ("vanilla", "hosvd_0.8", "asi")
SMALL = (*TINY, "--data.image_size", "64")  # at 32 the trained layers see one pixel, and there is nothing to choose


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A folder after a sweep in which another process held one run's folder, and what that sweep returned."""
    runs = tmp_path_factory.mktemp("runs")
    arguments = words(runs, "--methods", *METHODS, *SMALL)
    held = Run("classification", "B", "mcunet", "digits", "hosvd_0.8", 2, 233).folder(runs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(RunFolder(held, {}, "result.json").locked(""))
        (held / "identity.json").unlink()  # the other process has not come further than its lock
        code = sweep.main(arguments)
    return runs, arguments, code


def done(runs):
    return {path.parent.parent.parent.name for path in runs.rglob("layers*/*/result.json")}


def test_a_sweep_does_what_it_can_then_what_is_missing_and_then_nothing(swept, capsys):
    runs, arguments, code = swept
    assert code == 1
    assert done(runs) == {"vanilla"}
    assert len(list(runs.rglob("result.json"))) == 2  # pretraining and vanilla
    log = (runs / "failures.log").read_text()
    assert re.findall(r"^(\S+), last 2, seed 233$", log, re.MULTILINE) == ["hosvd_0.8", "asi"]

    before = {path: path.stat().st_mtime_ns for path in runs.rglob("result.json")}
    capsys.readouterr()
    assert sweep.main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^training: .* setup B, (\S+), layers", printed, re.MULTILINE) == ["hosvd_0.8", "asi"]
    assert printed.count("done already") == 3
    assert done(runs) == set(METHODS)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())

    assert sweep.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("done already") == 5
    assert "training" not in printed
    assert "5 of 5 runs done" in printed

    records = {method: next(runs.rglob(f"{method}/layers2/*/result.json")) for method in ("hosvd_0.8", "asi")}
    allowed, kept = (Record.load(path).memory_bytes["activation_formula"] for path in records.values())
    assert 0 < kept <= allowed


def test_the_runs_of_a_sweep_start_from_the_pretrained_weights(swept):
    runs, arguments, _ = swept
    jobs = list(sweep.parse(arguments)[0].jobs())
    weights = [job.arguments[job.arguments.index("--model.weights") + 1] for job in jobs[1:]]
    (pretrained,) = runs.rglob("B-pretrain/**/best.ckpt")
    assert set(weights) == {str(pretrained)}


@pytest.mark.parametrize(("model", "left_out"), [("mcunet", ("wsi", "wasi")), ("vit_mini", ("gradient_filter",))])
def test_by_default_a_sweep_has_the_methods_that_the_layers_can_be_trained_with(model, left_out):
    methods = sweep.parse(["--setup", "b", "--model", model, "--dataset", "digits"])[0].methods
    every = {path.stem for path in (sweep.CONFIGS / "methods").glob("*.yaml")}
    assert every - {*methods} == {method for method in every if method.startswith(left_out)}
    assert len(methods) < len(every)


def test_wasi_takes_its_ranks_and_budget_as_asi_does_unless_they_are_given():
    arguments = ["--setup", "a", "--model", "vit_mini", "--dataset", "digits", "--layers", "2"]
    found, _ = sweep.parse([*arguments, "--methods", "wasi_0.9", "hosvd_0.8", "wasi_0.1_rank20"])
    jobs = {job.title.partition(",")[0]: job.arguments for job in found.jobs()}
    assert list(jobs) == ["perplexity", "hosvd_0.8", "wasi_0.1_rank20", "wasi_0.9"]
    assert "--model.budget.run" in jobs["wasi_0.9"]
    assert "--model.budget.run" not in jobs["wasi_0.1_rank20"]
