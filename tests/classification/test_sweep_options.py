"""Options of a sweep's runs: what the sweep sets itself is refused among those that go to every run."""

import shutil

import pytest
from test_sweep import Commands, words

from classification import plans, sweep
from classification.backbones.mcunet import MCUNet
from classification.backbones.registry import backbone
from classification.built import require_layers
from experiment.command import dashed


@pytest.mark.parametrize(
    ("extra", "own"),
    [
        (["--seed_everything", "5"], "--seeds"),
        (["--seed-everything=5"], "--seeds"),
        (["--setup", "b", "--model.backbone", "resnet18"], "--model"),
        (["--model.layers", "1"], "--layers"),
        (["--data.dataset", "fish"], "--dataset"),
        (["--model.method", "lowrank.Vanilla"], "--methods"),
        (["--model.method.init_args.energy", "0.5"], "--methods"),
        (["--model.fuse", "false"], "--methods"),
        (["--model.rank_choice", "random"], "--methods"),
        (["--model.budget.mib", "1"], "--budget"),
        (["--epochs", "1", "--trainer.max_epochs", "2"], "--epochs"),
        (["--data-dir", "d", "--data.root", "e"], "--data-dir"),
        (["--weights", "some.pt", "--model.weights", "other.pt"], "--weights"),
        (["--model.weights", "other.pt"], "--weights"),  # of the pretraining
    ],
    ids=lambda words: words[-2] if isinstance(words, list) and len(words) > 1 else None,
)
def test_what_a_sweep_sets_itself_is_not_passed_through(tmp_path, capsys, extra, own):
    commands = Commands()
    with pytest.raises(SystemExit) as ended:
        sweep.main(words(tmp_path, *extra), commands)
    assert (ended.value.code, commands.calls) == (2, [])
    error = capsys.readouterr().err.splitlines()[-1]
    option = dashed([next(word for word in reversed(extra) if word.startswith("--"))])[0].partition("=")[0]
    assert f"{option} is set by the sweep for each of its runs; give {own} of the sweep in its place" in error
    assert not list(tmp_path.iterdir())


IN_CONFIGS = [
    ("data: {dataset: fish}", "data.dataset", "give --dataset"),
    ("seed_everything: 5", "seed_everything", "give --seeds"),
    ("trainer: {max_epochs: 7}", "trainer.max_epochs", "give --epochs"),
    ("model: {method: {class_path: lowrank.SVD}}", "model.method", "give --methods"),
    ("{runs_dir: elsewhere}", "runs_dir", "give --runs-dir"),
]


@pytest.mark.parametrize("option", ["--config", "-c"])
@pytest.mark.parametrize(("content", "setting", "instead"), IN_CONFIGS)
@pytest.mark.parametrize("in_a_file", [True, False])
def test_nor_is_it_within_a_config_of_every_run(tmp_path, capsys, option, content, setting, instead, in_a_file):
    config = tmp_path / "mine.yaml"
    config.write_text(content)
    given = str(config) if in_a_file else content
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit) as ended:
        sweep.main(words(runs, "--epochs", "2", option, given), commands := Commands())
    assert (ended.value.code, commands.calls) == (2, [])
    told = f"{setting} in {option} {given} is set by the sweep for each of its runs; {instead} of the sweep in its"
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not runs.exists()


def test_nor_within_a_group_of_settings(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sweep.main(words(tmp_path, "--data", "{batch_size: 8, dataset: fish}"), Commands())
    assert "data.dataset in --data " in capsys.readouterr().err


def test_a_config_of_every_run_may_set_what_the_sweep_does_not(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("data: {batch_size: 8}\ntrainer: {limit_train_batches: 2}\n")
    jobs = sweep.parse(words(tmp_path / "runs", "--config", str(config)))[0].jobs()
    assert all(job.arguments[-2:] == ("--config", str(config)) for job in jobs)


def test_every_option_that_a_run_of_a_sweep_is_given_is_refused_behind_it(tmp_path):
    """Whatever the sweep sets: an option of every run goes over it."""
    options = ["--epochs", "1", "--data-dir", "d", "--budget", "1/20"]
    jobs = sweep.parse(words(tmp_path, *options))[0].jobs()
    given = {word for job in jobs for word in dashed(job.arguments) if word.startswith("--")} - {
        "--config",
        "--runs-dir",
    }  # the latter is the sweep's own
    assert {"--seed-everything", "--model.layers", "--model.budget.run", "--trainer.max-epochs"} <= given
    for option in given:
        with pytest.raises(SystemExit):
            sweep.parse(words(tmp_path, *options, f"{option}=1"))


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("methods", "model: {method: 'a", "is no YAML: "),
        ("methods", "x: 1", "has no settings of `model`"),
        ("methods", "model: {x: 1}", "has no settings of `model.method`"),
        ("models", "[1, 2", "is no YAML: "),
        ("models", "", "has no settings of `model`"),
    ],
)
def test_a_config_of_ones_own_that_is_none_is_named(tmp_path, monkeypatch, capsys, kind, content, message):
    shutil.copytree(plans.CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(plans, "CONFIGS", tmp_path / "configs")
    path = tmp_path / "configs" / kind / "mine_of_test.yaml"
    path.write_text(content)
    option = ["--methods", "mine_of_test"] if kind == "methods" else ["--model", "mine_of_test"]
    with pytest.raises(SystemExit) as ended:
        sweep.main(words(tmp_path / "runs", *option), Commands())
    assert ended.value.code == 2
    assert f"config {path} {message}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


DRY = pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["sweep", "dry run"])


@DRY
def test_more_layers_than_the_network_has_begin_nothing(tmp_path, capsys, dry):
    commands = Commands()
    with pytest.raises(SystemExit) as ended:
        sweep.main(words(tmp_path, "--layers", "2", "50-51", *dry), commands)
    assert (ended.value.code, commands.calls) == (2, [])
    assert "51 trailing conv layers asked of MCUNet, which has 42; allowed: 1 to 42" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@DRY
def test_a_shallow_network_of_ones_own_is_looked_at_too(tmp_path, monkeypatch, capsys, dry):
    shutil.copytree(plans.CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(plans, "CONFIGS", tmp_path / "configs")
    monkeypatch.setitem(backbone.entries, "flat_of_test", lambda classes, pretrained: MCUNet(classes).stem)
    (tmp_path / "configs" / "models" / "flat_of_test.yaml").write_text("model: {backbone: flat_of_test}")
    commands = Commands()
    with pytest.raises(SystemExit) as ended:
        sweep.main(words(tmp_path / "runs", "--model", "flat_of_test", "--layers", "1", "2", *dry), commands)
    assert (ended.value.code, commands.calls) == (2, [])
    assert "2 trailing conv layers asked of Sequential, which has 1; allowed: 1 to 1" in capsys.readouterr().err


@pytest.mark.slow
def test_networks_that_are_not_looked_at_have_the_layers():
    assert set(plans.names("models")) >= plans.DEEP
    for name in plans.DEEP:
        settings = {"part": "all", "kind": "conv", **plans._model_settings("models", name), "layers": 4}
        require_layers({"model": settings})
