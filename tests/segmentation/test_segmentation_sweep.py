"""Sweeps: which runs in which order, where each finds what it needs, and what failed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiment import ExperimentError
from experiment.sweep import SEED
from segmentation import sweep
from segmentation.cli import parser, task_of
from segmentation.sweep import parse, published_budget


def sweep_of(*arguments: str):
    return parse([*arguments, "--runs-dir", "r", "--data-dir", "d"])[0]


TABLES = {"perplexity": None, "perplexity_derived": "true", "perplexity_derived_20000": "20000"}  # and their --derive


def option(job, name: str) -> str:
    return job.arguments[job.arguments.index(name) + 1]


def test_each_run_starts_from_what_the_ones_before_leave():
    plan = sweep_of("--network", "pspnet_small", "--dataset", "digit_scenes", "--layers", "10", "--seeds", "1", "2")
    jobs = list(plan.jobs())
    titles = [job.title for job in jobs]
    stages = ["digit_scenes_pretrain: pretrain", "digit_scenes: calibrate"]
    stages += [f"digit_scenes: {table}, last 10" for table in TABLES]
    assert titles[:5] == [f"{stage}, seed 233" for stage in stages]
    asi, hosvd = (f"digit_scenes: {method}, last 10, seed 1" for method in ("asi_hosvd_0.8", "hosvd_0.8"))
    assert titles.index(asi) > titles.index(hosvd)
    assert len(titles) == 5 + 2 * len(plan.methods)
    below = "r/segmentation"
    pretrained = f"{below}/pretrain/pspnet_small/digit_scenes_pretrain/vanilla/layersall/seed{SEED}/final.pth"
    calibrated = f"{below}/calibrate/pspnet_small/digit_scenes/vanilla/layersall/seed{SEED}/final.pth"
    assert option(jobs[1], "--load-from") == pretrained
    assert {option(job, "--load-from") for job in jobs[2:]} == {calibrated}
    asi = jobs[titles.index("digit_scenes: asi_hosvd_0.8, last 10, seed 2")]
    finetune = f"{below}/finetune/pspnet_small/digit_scenes"
    assert option(asi, "--budget-run") == f"{finetune}/hosvd_0.8/layers10/seed2"
    assert option(asi, "--budget-table") == f"{finetune}/perplexity/layers10/seed{SEED}/perplexity.json"
    derived = jobs[titles.index("digit_scenes: asi_int8_derived_hosvd_0.8, last 10, seed 2")]
    assert option(derived, "--budget-table") == f"{finetune}/perplexity_derived/layers10/seed{SEED}/perplexity.json"
    for job in jobs:
        assert TABLES.get(job.run.method) == (option(job, "--derive") if "--derive" in job.arguments else None)


@pytest.mark.slow
def test_every_job_is_a_command_that_the_command_line_takes():
    pairs = (("upernet", "voc12aug"), ("deeplabv3_mbv2_small", "digit_scenes"), ("pspnet_small", "digit_scenes_96"))
    for network, dataset in pairs:
        plan = sweep_of("--network", network, "--dataset", dataset, "--layers", "5", "all", "--iterations", "20")
        for job in plan.jobs():
            task = task_of(parser().parse_args(job.arguments))
            assert task.config.stage == job.run.setup
            assert task.config.network == network
            measured = job.arguments[0] == "measure"
            told = {"true": True, "20000": 20000}.get(TABLES.get(job.run.method), False)
            found = task.config.get("perplexity", {}).get("derive", False)
            assert (found, type(found)) == (told, type(told))
            if job.run.setup == "finetune" and not measured:
                assert task.config.train_cfg.max_iters == 20


@pytest.mark.slow
def test_networks_have_their_own_recipe_where_the_papers_give_them_one():
    def settings(network: str, stage: str):
        plan = sweep_of("--network", network, "--dataset", "voc12aug", "--methods", "vanilla")
        wanted = ("calibrate", "vanilla") if stage == "calibrate" else ("finetune", stage)
        job = next(job for job in plan.jobs() if (job.run.setup, job.run.method) == wanted)
        return task_of(parser().parse_args(job.arguments)).config

    assert settings("fcn", "calibrate").train_cfg.max_iters == 1000
    assert settings("pspnet_mbv2", "calibrate").train_cfg.max_iters == 5000
    assert settings("upernet", "calibrate").param_scheduler[0].end == 20000
    assert settings("upernet", "vanilla").optim_wrapper.optimizer.weight_decay == 1e-4
    assert settings("deeplabv3", "vanilla").optim_wrapper.optimizer.weight_decay == 5e-4
    assert settings("deeplabv3", "vanilla").load_from.endswith("vanilla/layersall/seed233/final.pth")
    assert settings("deeplabv3", "calibrate").load_from.startswith("https://")


def test_published_budgets_are_given_in_mib():
    for extra in ([], ["--budget", "published"]):
        plan = sweep_of(*("--network", "fcn", "--dataset", "voc12aug", "--methods", "asi", "--layers", "5"), *extra)
        (asi,) = [job for job in plan.jobs() if job.run.method.startswith("asi")]
        assert float(option(asi, "--budget-mib")) == published_budget("fcn", "voc12aug", "5")
        assert asi.run.method == "asi_papers"


def test_a_budget_is_the_memory_of_a_run_of_the_same_seed_or_a_part_of_it():
    chosen = ("--network", "fcn", "--dataset", "voc12aug", "--layers", "5", "--seeds", "7", "--methods", "asi")
    for budget, method, divisor in (("hosvd", "hosvd_0.8", 1), ("1/22", "vanilla", 22)):
        (asi,) = [
            job for job in sweep_of(*chosen, method, "--budget", budget).jobs() if job.run.method.startswith("asi")
        ]
        settings = dict(task_of(parser().parse_args(asi.arguments)).config.custom_hooks[-1].budget)
        assert settings["run"] == f"r/segmentation/finetune/fcn/voc12aug/{method}/layers5/seed7"
        assert settings.get("divisor", 1) == divisor


def test_what_cannot_be_run_is_refused(capsys):
    chosen = ["--network", "pspnet", "--methods", "asi", "--dataset"]
    for refused, message in (
        (["cityscapes"], "pspnet on cityscapes needs weights to start from; give --weights FILE"),
        (["digit_scenes"], "is taken from hosvd_0.8; add it to --methods"),
        (["voc12aug", "--budget", "1/22"], "is taken from vanilla; add it"),
        (["voc12aug", "--budget", "22"], "'22' is neither published nor hosvd nor such as 1/22 or 0.5mib"),
    ):
        with pytest.raises(SystemExit):
            parse([*chosen, *refused])
        assert message in capsys.readouterr().err


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path, capsys):
    done = []

    def command(arguments):
        if "hosvd_0.8.py" in " ".join(arguments):
            raise ExperimentError("no room")
        done.append(arguments)

    chosen = ["--network", "pspnet", "--dataset", "voc12aug", "--methods", "vanilla", "hosvd_0.8", "--layers", "5"]
    assert sweep.main([*chosen, "--runs-dir", str(tmp_path)], command) == 1
    assert len(done) == 2
    assert "voc12aug: hosvd_0.8, last 5, seed 233" in capsys.readouterr().err
    (log,) = (path.read_text() for path in tmp_path.rglob("failure.log"))
    assert "python -m segmentation train" in log
    assert log.rstrip().endswith("no room")


@pytest.mark.parametrize(
    ("setting", "instead"),
    [
        ("dataset=voc12aug", "give --dataset of the sweep"),
        ("network=fcn", "give --model of the sweep"),
        ("stage=calibrate", "leave it out"),
        ("layers=5", "give --layers of the sweep"),
        ("randomness.seed=5", "give --seeds of the sweep"),
        ("lowrank.method.energy=0.5", "give --methods of the sweep"),
        ("perplexity.derive=True", "give --methods of the sweep"),
        ("load_from=some.pth", "give --weights of the sweep"),
        ("lowrank.fuse=True", "give --methods of the sweep"),
    ],
)
@pytest.mark.parametrize("option", [["--cfg-options"], ["--cfg-options", "train_dataloader.batch_size=2"]])
def test_what_a_sweep_sets_itself_is_not_overridden(capsys, setting, instead, option):
    with pytest.raises(SystemExit) as ended:
        sweep_of("--network", "pspnet_small", "--dataset", "digit_scenes", *option, setting)
    key = setting.partition("=")[0]
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert f"--cfg-options {key} is set by the sweep for each of its runs; {instead}" in error


def test_what_it_does_not_set_goes_to_every_run():
    extra = ["--cfg-options", "optim_wrapper.optimizer.lr=0.1", "train_dataloader.batch_size=2"]
    plan = sweep_of("--network", "pspnet_small", "--dataset", "digit_scenes", *extra)
    assert all(list(job.arguments[-3:]) == extra for job in plan.jobs())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim_wrapper.optimizer.lr_typo=1", "cannot be built: .* unexpected keyword argument 'lr_typo'"),
        ("default_hooks.logger.nope=1", "LoggerHook.* unexpected keyword argument 'nope'"),
        ("optim_wrapper.clip_grad.max_nrom=1", "has the setting 'max_nrom'; allowed: type, max_norm"),
    ],
)
def test_what_no_run_can_be_built_with_is_refused_before_the_sweep_begins(setting, message, capsys):
    network = ("--network", "pspnet_small", "--dataset", "digit_scenes", "--layers", "5", "--methods", "vanilla")
    with pytest.raises(SystemExit, match="2"):
        sweep_of(*network, "--cfg-options", setting)
    assert re.search(rf"error: .*{message}", capsys.readouterr().err)
