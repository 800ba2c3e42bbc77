"""Runs of segmentation are begun, ended and named as those of classification are."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmseg.registry import DATASETS
from segmentors import TINY, files

from experiment import ExperimentError, Record, Run
from experiment.sweep import SEED
from lowrank import MODE_ENERGIES, PerplexityTable
from segmentation import sweep, training
from segmentation.cli import main
from segmentation.compose import load_config
from segmentation.identity import MEASURED, identity_of, perplexity_settings

ROOT = Path(__file__).parents[2]
OWN = ROOT / "tests" / "experiment" / "own_methods.py"


def arguments(command: str, method: str, data: Path, runs: Path, *extra: str) -> list[str]:
    composed = map(str, files("pspnet_small", "digit_scenes", "finetune", method))
    where = ["--layers", "10", "--data-dir", str(data), "--runs-dir", str(runs)]
    tiny = [*TINY, "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2"]
    return [command, *composed, *where, *([] if command == "measure" else ["--iterations", "4"]), *extra, *tiny]


def folder(runs: Path, method: str) -> Path:
    return Run("segmentation", "finetune", "pspnet_small", "digit_scenes", method, 10, SEED).folder(runs)


@pytest.fixture(scope="module")
def table(data_dir, tmp_path_factory):
    """A perplexity table of the network."""
    runs = tmp_path_factory.mktemp("table")
    assert main([*arguments("measure", "vanilla", data_dir, runs), "perplexity.energies=[0.5,0.8,0.9]"]) == 0
    return folder(runs, "perplexity") / "perplexity.json"


def budget_of(table: Path) -> tuple[tuple[str, ...], str]:
    """A budget between the least and the most that the table asks for, as arguments; and its tag."""
    rows = PerplexityTable.load(table).layers
    mib = sum(row.nbytes[1] for row in rows) / 2**20
    return ("--budget-table", str(table), "--budget-mib", str(mib)), f"{mib:g}mib"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "tag"),
    [('{"type":"ASI","refresh":10}', "asi_every10"), ('{"type":"own_methods.FirstChannels"}', "first_channels")],
)
def test_any_method_that_needs_ranks_takes_them_from_a_budget(method, tag, table, data_dir, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(OWN.parent))
    config = tmp_path / "method.py"
    config.write_text(f"lowrank = dict(method={method})\n")
    words = arguments("train", "vanilla", data_dir, tmp_path / "runs")
    words[words.index(next(word for word in words if word.endswith("methods/vanilla.py")))] = str(config)
    assert main(words) == 2
    budget, budget_tag = budget_of(table)
    place = words.index("--cfg-options")
    assert main([*words[:place], *budget, *words[place:]]) == 0
    record = Record.load(folder(tmp_path / "runs", f"{tag}_{budget_tag}") / "result.json")
    assert record.run.method == f"{tag}_{budget_tag}"


@pytest.mark.slow
def test_measuring_says_no_more_than_where_the_table_is(data_dir, tmp_path):
    words = arguments("measure", "vanilla", data_dir, tmp_path)
    command = [sys.executable, "-W", "error", "-m", "segmentation", *words, "perplexity.energies=[0.5]"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    (line,) = done.stdout.splitlines()
    assert line == f"perplexity of 5 layers in {folder(tmp_path, 'perplexity') / 'perplexity.json'}"


def test_a_table_of_another_data_set_is_refused(table, data_dir, tmp_path, capsys):
    words = [*arguments("train", "asi", data_dir, tmp_path / "runs"), "dataset=digit_scenes_pretrain"]
    place = words.index("--cfg-options")
    assert main([*words[:place], *budget_of(table)[0], *words[place:]]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.endswith("is of the data set digit_scenes, this run of digit_scenes_pretrain; measure it again")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_table_of_images_that_have_changed_since_is_refused(dry, table, data_dir, tmp_path, capsys):
    shutil.copytree(data_dir, tmp_path / "data")
    words = [*arguments("train", "asi", tmp_path / "data", tmp_path / "runs"), *dry]
    words[words.index("--cfg-options") : words.index("--cfg-options")] = budget_of(table)[0]
    shutil.copy(*sorted((tmp_path / "data" / "digit_scenes" / "JPEGImages").glob("train_*"))[:2])
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "is of other data (fingerprint" in line
    assert not (tmp_path / "runs").exists()


def test_a_sweep_gives_every_method_that_needs_ranks_a_budget(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(OWN.parent))
    own = tmp_path / "own"
    for kind in ("networks", "data", "stages", "_base_"):
        own.mkdir(exist_ok=True)
        (own / kind).symlink_to(sweep.CONFIGS / kind)
    (own / "methods").mkdir()
    for name, method in (
        ("asi_every10", 'dict(type="ASI", refresh=10)'),
        ("asi_rank4", 'dict(type="ASI", ranks=4)'),
        ("first_channels", 'dict(type="own_methods.FirstChannels")'),
        ("vanilla", 'dict(type="Vanilla")'),
    ):
        (own / "methods" / f"{name}.py").write_text(f"lowrank = dict(method={method})\n")
    monkeypatch.setattr(sweep, "CONFIGS", own)
    words = ["--model", "pspnet_small", "--dataset", "digit_scenes", "--layers", "10", "--budget", "1/20", "1/10"]
    jobs = sweep.parse(words)[0].jobs()
    needing = {job.run.method: "--budget-run" in job.arguments for job in jobs if job.run.setup == "finetune"}
    ranked = [f"{name}_1of{part}" for name in ("asi_every10", "first_channels") for part in (20, 10)]
    assert needing == dict.fromkeys(["perplexity", "asi_rank4", "vanilla"], False) | dict.fromkeys(ranked, True)


HALTING = """
custom_imports = dict(imports=["killing"], allow_failed_imports=False)
custom_hooks = [dict(type="Halt")]
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_in_one_line_and_the_same_command_goes_on(number, code, data_dir, tmp_path, capsys):
    config = tmp_path / "halting.py"
    config.write_text(HALTING)
    words = arguments("train", "hosvd_0.8", data_dir, tmp_path, "--iterations", "8")
    words.insert(words.index("--layers"), str(config))
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "HALT": "3"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "segmentation", *words]
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as process:
        assert any(line == "halted\n" for line in process.stdout)
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode == code
    assert re.fullmatch(r"interrupted during pspnet_small on .*hosvd_0.8.*; the same command goes on", said.strip())
    run = folder(tmp_path, "hosvd_0.8")
    assert not (run / "result.json").exists()
    assert main(words) == 0
    assert "resuming: " in capsys.readouterr().out
    with (run / "metrics.csv").open() as file:
        assert [float(row["iteration"]) for row in csv.DictReader(file)] == [2, 4, 6, 8]


@pytest.mark.slow
def test_an_unknown_error_is_one_line_with_the_run_and_its_log(data_dir, tmp_path, capsys, monkeypatch):
    def fails(*words):
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(training, "_record", fails)
    assert main(arguments("train", "vanilla", data_dir, tmp_path)) == 1
    log = folder(tmp_path, "vanilla") / "failure.log"
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(rf"error: pspnet_small on .*: RuntimeError: out of luck \(traceback in {log}\)", error)
    assert "Traceback" in log.read_text()


@pytest.mark.slow
def test_other_data_and_another_runs_record_are_noticed(data_dir, tmp_path, capsys):
    words = arguments("train", "vanilla", data_dir, tmp_path)
    assert main(words) == 0
    result = folder(tmp_path, "vanilla") / "result.json"
    whole = result.read_text()
    result.write_text(whole.replace('"method": "vanilla"', '"method": "asi"'))
    assert main([*words, "--dry-run"]) == 0
    assert "would resume" in capsys.readouterr().out
    result.write_text(whole)
    images = list((data_dir / "digit_scenes" / "JPEGImages").iterdir())
    content = images[0].read_bytes()
    try:
        images[0].write_bytes(content + b"more")
        assert main(words) == 2
        assert "holds a run on other data" in capsys.readouterr().err
    finally:
        images[0].write_bytes(content)


@pytest.mark.parametrize("option", [["--runs_dir"], ["--runs-dir"]])
def test_options_are_spelled_either_way(option, data_dir, tmp_path, capsys):
    words = arguments("train", "vanilla", data_dir, tmp_path)
    words[words.index("--runs-dir")] = option[0]
    assert main([*words[:1], "--dry_run", *words[1:]]) == 0
    assert f"folder: {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (["--iteration", "3"], "--iteration"),
        (["--dry-runn"], "--dry-runn"),
        (["--budgets", "1/2"], "--budgets"),
        (["--dry-run", "--limit", "-1"], "--limit is -1.0; allowed"),
        (["--dry-run", "--cfg-options", "train_cfg.val_interval=0"], "train_cfg.val_interval is 0; allowed"),
    ],
    ids=lambda words: words[-1] if isinstance(words, list) else None,
)
def test_a_mistake_never_starts_a_sweep(mistake, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "--model", "pspnet_small", "--dataset", "digit_scenes", "--runs-dir", str(tmp_path), *mistake])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_part_of_a_data_set_is_drawn_by_its_seed_and_is_another_run(data_dir, tmp_path, capsys):
    def images(limit, seed=1):
        dataset = {"type": "PlacedDataset", "limit": limit, "limit_seed": seed}
        inner = {"type": "PascalVOCDataset", "data_root": str(data_dir / "digit_scenes"), "pipeline": []}
        inner |= {"data_prefix": {"img_path": "JPEGImages", "seg_map_path": "SegmentationClass"}, "img_suffix": ".png"}
        built = DATASETS.build({**dataset, "dataset": inner | {"ann_file": "ImageSets/Segmentation/train.txt"}})
        return {built[index]["img_path"] for index in range(len(built))}

    assert (len(images(None)), len(images(5)), len(images(0.25)), len(images(1.0))) == (12, 5, 3, 12)
    assert images(3) == images(0.25) < images(5) < images(None)
    assert images(5) != images(5, seed=2)
    for wrong in (13, 0.01):
        with pytest.raises(ExperimentError, match="of 12 training samples; allowed are whole numbers from 1 to 12"):
            images(wrong)
    for wrong in (0, 2.5, -1, "3", True):
        with pytest.raises(ExperimentError, match=r"the limit is .*; allowed are whole numbers from 1, or a share"):
            images(wrong)
    words = arguments("train", "vanilla", data_dir, tmp_path, "--limit", "6")
    assert main(words) == 0
    assert Record.load(folder(tmp_path, "vanilla") / "result.json").recipe["limit"] == 6
    assert main(arguments("train", "vanilla", data_dir, tmp_path)) == 2
    assert "limit is 6" in capsys.readouterr().err


@pytest.mark.slow
def test_perplexity_is_the_mean_over_batches_and_the_papers_way_is_asked_for(table, data_dir, tmp_path, capsys):
    one = PerplexityTable.load(table)
    words = [*arguments("measure", "vanilla", data_dir, tmp_path), "perplexity.energies=[0.5,0.8,0.9]"]
    assert main([*words[:1], "--batches", "3", *words[1:]]) == 0
    three = PerplexityTable.load(folder(tmp_path, "perplexity") / "perplexity.json")
    assert (one.batches, three.batches) == (1, 3)
    assert [row.ranks for row in one.layers] == [row.ranks for row in three.layers]
    assert [row.perplexity for row in one.layers] != [row.perplexity for row in three.layers]
    assert all(row.gradient_norm >= 0 for row in three.layers)
    assert all(set(row.mixed.storages) == {"int8"} for row in three.layers), "one energy for all modes"
    assert max(row.gradient_norm for row in three.layers) > 0
    assert main(words) == 2, "another table"
    assert "perplexity.batches" in capsys.readouterr().err
    other = [*arguments("measure", "vanilla", data_dir, tmp_path / "other"), "perplexity.mode_energies=[]"]
    assert main([*other[:1], "--batches", "7", *other[1:]]) == 2
    assert "--batches is 7; of 2 of 12 images there are from 1 to 6" in capsys.readouterr().err
    published = load_config(files("pspnet", "voc12aug", "finetune", "vanilla"))
    assert perplexity_settings(published)["mode_energies"] == []
    assert "perplexity" not in identity_of(published, MEASURED), "as before there was a choice"
    assert perplexity_settings(Config())["mode_energies"] == list(MODE_ENERGIES)


@pytest.mark.parametrize(
    "options",
    [
        {"default_hooks.ema": {"type": "EMAHook"}},
        {"default_hooks.param_scheduler": None},
        {"val_cfg.fp16": True},
        {"data_preprocessor": {"type": "SegDataPreProcessor", "mean": [1, 2, 3]}},
        {"custom_hooks": [{"type": "EMAHook"}]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_whatever_mmengine_takes_that_changes_a_run_makes_another_run(options):
    names = files("pspnet", "voc12aug", "finetune", "vanilla")
    usual = identity_of(load_config(names))
    assert not usual.keys() & {"default_hooks", "val_cfg", "data_preprocessor"}, "as before they were looked at"
    assert identity_of(load_config(names, options)) != usual
    watching = {"default_hooks.show": {"type": "SegVisualizationHook"}, "default_hooks.logger.interval": 7}
    assert identity_of(load_config(names, watching)) == usual


def test_a_data_set_that_lacks_a_folder_is_one_line(data_dir, tmp_path, capsys):
    (tmp_path / "digit_scenes").mkdir()
    assert main(arguments("train", "vanilla", tmp_path, tmp_path / "runs")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(rf"error: (the data set in )?{tmp_path}/digit_scenes.* cannot be read", line)
    assert not (tmp_path / "runs").exists()
