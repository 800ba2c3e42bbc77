"""A sweep: its order, a job that fails, and what is left to do."""

import contextlib
import io
import re
import shutil
from pathlib import Path

import pytest
import yaml
from commands import TINY

from classification import plans, sweep
from experiment import ExperimentError, Record, Run, RunFolder, find_planned
from experiment.command import dashed
from experiment.method import table_tag

NEEDED = ["--setup", "b", "--model", "mcunet", "--dataset", "digits"]


def words(runs, *options):
    return [*NEEDED, "--layers", "2", "--runs_dir", str(runs), *options]


class Commands:
    """Stands in for the command line: notes what it is asked to do, and fails where it is told to.

    It leaves no records, so that nothing counts as done.
    """

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
    derive = value.get("--model.derive", "false")
    measured = table_tag(int(derive) if derive.isdecimal() else derive == "true")
    method = measured if options[0] == "measure" else (names or ["vanilla"])[0]
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
    methods_shipped = set(plans.names("methods"))
    options = [*NEEDED, "--setup", setup, "--layers", "2", "4", "all", "--seeds", "1", "2", "--runs_dir", str(tmp_path)]
    options += ["--methods", *methods_shipped]
    sweep.main(options, commands := Commands())
    made, methods = [], set()
    for call in commands.calls:
        folder, needed = produced_and_needed(call, tmp_path)
        assert folder not in made
        for path in needed:
            assert any(path == str(there) or path.startswith(f"{there}/") for there in made), path
        made.append(folder)
        methods.add(folder.parts[-3])
    tables = {"perplexity", "perplexity_derived", "perplexity_derived_20000"}
    assert methods == methods_shipped | tables | ({"vanilla"} if setup == "b" else set())
    runs_each = len(methods_shipped) * 3 + 3 * len(tables) + (setup == "b")
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
    assert all(call[-len(TINY) :] == dashed(TINY) for call in commands.calls)


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        (ExperimentError("no such data set"), "\nno such data set\n"),
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
    ],
    ids=["mendable", "unforeseen"],
)
def test_a_job_that_fails_stops_those_alone_that_need_it_and_leaves_a_log(tmp_path, capsys, how, cause):
    runs = tmp_path / "runs"
    sweep.main(words(runs), everything := Commands())
    assert list(runs.rglob("failure.log")) == []
    capsys.readouterr()
    commands = Commands("methods/hosvd_0.8.yaml", how)
    assert sweep.main(words(runs), commands) == 1
    (failing,) = [call for call in commands.calls if "hosvd_0.8.yaml" in " ".join(call)]
    folder = produced_and_needed(failing, runs)[0]
    needing = [call for call in everything.calls if str(folder) in call]
    assert len(needing) == 1  # the run with ASI, of which it is the budget
    assert commands.calls == [call for call in everything.calls if call not in needing]
    log, unbegun = sorted(runs.rglob("failure.log"), key=lambda path: path.parent != folder)
    assert (log.parent, unbegun.parent.parts[-3]) == (folder, "asi_hosvd_0.8")
    assert f"python -m classification {' '.join(failing)}\n" in log.read_text()
    assert cause in log.read_text()
    assert f"digits: hosvd_0.8, last 2, seed 233: {log}\n" in capsys.readouterr().err

    sweep.main(words(runs), Commands())
    assert list(runs.rglob("failure.log")) == []


def test_what_is_planned_is_written_down_and_grows(tmp_path):
    sweep.main(words(tmp_path, "--methods", "vanilla"), Commands())
    sweep.main(words(tmp_path, "--methods", "hosvd_0.8", "asi", "--seeds", "1"), Commands())
    planned = {(run.setup, run.method, run.layers, run.seed) for run in find_planned(tmp_path)}
    pretraining = {("B-pretrain", "vanilla", "all", seed) for seed in (1, 233)}
    assert planned == pretraining | {("B", "vanilla", 2, 233), ("B", "hosvd_0.8", 2, 1), ("B", "asi_hosvd_0.8", 2, 1)}


def titles(arguments):
    return [job.title for job in sweep.parse(arguments)[0].jobs()]


def test_the_papers_depths_and_methods_are_the_default(tmp_path):
    found = titles(["--setup", "a", "--model", "resnet18", "--dataset", "digits"])
    methods = ["vanilla", *(f"gradient_filter_r{patch}" for patch in (2, 4, 7)), "hosvd_0.8", "asi_hosvd_0.8"]
    rows = [(method, layers) for layers in (2, 4) for method in methods]
    rows = [("perplexity", 2), ("perplexity", 4), *rows, ("vanilla", "all")]
    assert found == [f"digits: {method}, last {layers}, seed 233" for method, layers in rows]


def test_ranges_of_layers_several_data_sets_and_given_weights(tmp_path, monkeypatch):
    found = titles([*words(tmp_path, "--methods", "vanilla"), "--layers", "1-3", "all", "--weights", "some.pt"])
    assert found == [f"digits: vanilla, last {layers}, seed 233" for layers in (1, 2, 3, "all")]
    (job, *_) = sweep.parse(words(tmp_path, "--methods", "vanilla", "--weights", "some.pt"))[0].jobs()
    assert job.arguments[job.arguments.index("--model.weights") + 1] == "some.pt"


def test_epochs_go_to_training_and_the_data_folder_to_every_job(tmp_path):
    options = ["--methods", "hosvd_0.8", "asi", "--epochs", "3", "--data_dir", "there"]
    for job in sweep.parse(words(tmp_path, *options))[0].jobs():
        told = list(job.arguments)
        assert told[told.index("--data.root") + 1] == "there"
        assert ("--trainer.max_epochs" in told) == (told[0] == "fit")


def test_perplexity_of_setup_b_is_measured_on_the_half_that_its_configs_name(tmp_path):
    data = plans.names("data")
    shipped = {path.stem.partition("_")[2] for path in (plans.CONFIGS / "perplexity").glob("b_*.yaml")}
    with_own = shipped & set(data)
    assert shipped - with_own == {"digits_swin_mini"}
    for name in data:
        (job,) = [
            job
            for job in sweep.parse([*words(tmp_path, "--methods", "hosvd_0.8", "asi"), "--dataset", name])[0].jobs()
            if job.arguments[0] == "measure"
        ]
        files = [yaml.safe_load(Path(word).read_text()) for word in job.arguments if word.endswith(".yaml")]
        halves = [content["data"]["partition"] for content in files if "partition" in content.get("data", {})]
        assert halves[-1] == ("finetune" if name in with_own else "pretrain")
        energies = [
            content["model"]["mode_energies"] for content in files if "mode_energies" in content.get("model", {})
        ]
        assert bool(energies[-1]) == (name == "digits"), "the papers have one energy for all modes"


def test_a_network_may_need_other_energies_than_its_data_set(tmp_path):
    options = ["--model", "swin_mini", "--layers", "all", "--methods", "hosvd_0.8", "asi"]
    measure = next(job for job in sweep.parse(words(tmp_path, *options))[0].jobs() if job.arguments[0] == "measure")
    told = [word for word in measure.arguments if "perplexity" in word and word.endswith(".yaml")]
    assert [Path(word).stem for word in told] == ["b", "b_digits", "b_digits_swin_mini"]


def test_methods_with_derive_have_a_table_of_their_own_and_others_the_one_of_before(tmp_path):
    def tables(*methods):
        found = {}
        chosen = words(tmp_path, "--budget", "1/20", "--methods", "vanilla", *methods)
        for job in sweep.parse(chosen)[0].jobs():
            if job.arguments[0] == "measure":
                assert ("--model.derive" in job.arguments) == job.run.method.startswith("perplexity_derived")
            if "--model.budget.table" in job.arguments:
                table = Path(job.arguments[job.arguments.index("--model.budget.table") + 1])
                found[job.run.method] = table.relative_to(tmp_path).parts[4]
        return found, sum(job.arguments[0] == "measure" for job in sweep.parse(chosen)[0].jobs())

    before = {"asi_1of20": "perplexity", "asi_int8_1of20": "perplexity"}
    derived = {"asi_int8_derived_1of20": "perplexity_derived"}
    assert tables("asi", "asi_int8") == (before, 1)
    assert tables("asi_int8_derived") == (derived, 1)
    assert tables("asi", "asi_int8", "asi_int8_derived") == (before | derived, 2)
    far = {"asi_int8_derived_20000_1of20": "perplexity_derived_20000"}
    assert tables("asi_int8_derived_20000", "asi_int8_derived") == (far | derived, 2)


def published_words(*options):
    return ["--setup", "a", "--model", "mcunet", "--dataset", "pets", "--methods", "asi", "--layers", "4", *options]


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """Configs in which there is a data set pets."""
    configs = tmp_path / "configs"
    shutil.copytree(plans.CONFIGS, configs)
    (configs / "data" / "pets.yaml").write_text(yaml.safe_dump({"data": {"dataset": "pets"}}))
    monkeypatch.setattr(plans, "CONFIGS", configs)


@pytest.mark.usefixtures("pets")
@pytest.mark.parametrize("options", [[], ["--budget", "published"]])
def test_the_published_budget_is_taken_where_there_is_one(options):
    *_, job = sweep.parse(published_words(*options))[0].jobs()
    assert job.arguments[job.arguments.index("--model.budget.mib") + 1] == "0.249587357"
    assert job.arguments[job.arguments.index("--model.budget.name") + 1] == "papers"
    assert "--model.budget.run" not in job.arguments


@pytest.mark.usefixtures("pets")
def test_the_measured_budget_is_taken_where_it_is_asked_for():
    *_, job = sweep.parse(published_words("--budget", "hosvd", "--methods", "asi", "hosvd_0.8"))[0].jobs()
    assert "--model.budget.run" in job.arguments
    assert not {"--model.budget.mib", "--model.budget.divisor"} & {*job.arguments}
    *_, job = sweep.parse(published_words("--budget", "1/20", "--methods", "asi", "vanilla"))[0].jobs()
    assert job.arguments[job.arguments.index("--model.budget.run") + 1].endswith("/vanilla/layers4/seed233")
    assert job.arguments[job.arguments.index("--model.budget.divisor") + 1] == "20"


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
        (
            ["--methods", "asi"],
            "the budget for mcunet on digits, setup B, last 2 is taken from hosvd_0.8; add it to --methods",
        ),
        (["--budget", "published"], "no budget is published for mcunet on digits, setup B, last 2"),
        (["--layers", "3-1"], "--layers has '3-1'"),
        (["--layers", "1-"], "--layers has '1-'"),
        (["--epochs", "0"], "--epochs: '0' is no whole number from 1"),
        (["--model", "lenet"], "lenet"),
        (["--seeds", "x"], "x"),
        (["--seeds", "-1"], "--seeds: '-1' is no whole number from 0"),
        (["--seeds", "4294967296"], "to 4294967295"),
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
        said = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        code = sweep.main(arguments)
    return runs, arguments, code, said.getvalue()


def done(runs):
    return {path.parent.parent.parent.name for path in runs.rglob("layers*/*/result.json")}


@pytest.mark.slow
def test_a_sweep_does_what_it_can_then_what_is_missing_and_then_nothing(swept, capsys):
    runs, arguments, code, said = swept
    assert code == 1
    assert done(runs) == {"vanilla"}
    assert len(list(runs.rglob("result.json"))) == 2  # pretraining and vanilla
    assert list(runs.rglob("failure.log")) == []  # what is in work elsewhere, and what needs it, has not failed
    assert "failed" not in said
    assert re.findall(r"^  digits: (\S+), last 2, seed 233$", said, re.MULTILINE) == ["hosvd_0.8", "asi_hosvd_0.8"]

    before = {path: path.stat().st_mtime_ns for path in runs.rglob("result.json")}
    capsys.readouterr()
    assert sweep.main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^training: .* setup B, (\S+), layers", printed, re.MULTILINE) == ["hosvd_0.8", "asi_hosvd_0.8"]
    assert printed.count("done already") == 3
    assert done(runs) == {"vanilla", "hosvd_0.8", "asi_hosvd_0.8"}
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())

    assert sweep.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("done already") == 5
    assert "training" not in printed
    assert "5 of 5 runs done" in printed

    records = {method: next(runs.rglob(f"{method}/layers2/*/result.json")) for method in ("hosvd_0.8", "asi_hosvd_0.8")}
    allowed, kept = (Record.load(path).memory_bytes["activation_formula"] for path in records.values())
    assert 0 < kept <= allowed


@pytest.mark.slow
def test_the_runs_of_a_sweep_start_from_the_pretrained_weights(swept):
    runs, arguments, *_ = swept
    jobs = list(sweep.parse(arguments)[0].jobs())
    weights = [job.arguments[job.arguments.index("--model.weights") + 1] for job in jobs[1:]]
    (pretrained,) = runs.rglob("B-pretrain/**/best.ckpt")
    assert set(weights) == {str(pretrained)}


@pytest.mark.parametrize(("model", "methods"), [("mcunet", plans.METHODS), ("vit_mini", plans.TRANSFORMER_METHODS)])
def test_by_default_a_sweep_has_the_papers_methods_for_the_layers_of_the_network(model, methods):
    assert sweep.parse(["--setup", "b", "--model", model, "--dataset", "digits"])[0].methods == methods
    assert set(methods) <= set(plans.names("methods"))


def test_wasi_takes_its_ranks_and_budget_as_asi_does_unless_they_are_given():
    arguments = ["--setup", "a", "--model", "vit_mini", "--dataset", "digits", "--layers", "2"]
    found, _ = sweep.parse([*arguments, "--methods", "wasi_0.9", "hosvd_0.8", "wasi_0.1_rank20"])
    jobs = {job.run.method: job.arguments for job in found.jobs()}
    assert list(jobs) == ["perplexity", "hosvd_0.8", "wasi_0.1_rank20", "wasi_0.9_hosvd_0.8"]
    assert "--model.budget.run" in jobs["wasi_0.9_hosvd_0.8"]
    assert "--model.budget.run" not in jobs["wasi_0.1_rank20"]


@pytest.mark.parametrize("option", [["--dry_runs"], ["--epoch", "1"], ["--model.colour", "red"], ["--data.workers=-1"]])
@pytest.mark.parametrize("way", ["run", "dry run"])
def test_a_typo_is_refused_before_any_job(tmp_path, capsys, option, way):
    commands = Commands()
    with pytest.raises(SystemExit) as ended:
        sweep.main(words(tmp_path, *option, *(["--dry-run"] if way == "dry run" else [])), commands)
    assert (ended.value.code, commands.calls, list(tmp_path.iterdir())) == (2, [], [])
    assert option[0].partition("=")[0] in capsys.readouterr().err


def test_options_may_be_spelled_with_a_dash(tmp_path, capsys):
    dashed = [*NEEDED, "--layers", "2", "--runs-dir", str(tmp_path), "--data-dir=there", "--data.batch-size", "4"]
    (job, *_) = sweep.parse([*dashed, "--dry-run"])[0].jobs()
    assert {"--data.root", "there", "--data.batch-size", str(tmp_path)} <= {*job.arguments}
