"""Settings of a segmentation run that cannot work are refused in one line before anything is written."""

import re

import pytest
from segmentors import TINY, files

from segmentation.cli import main

OPTIONS = {
    "seed": (["--seed", "-1"], [], r"randomness\.seed is -1"),
    "seed too large": (["--seed", str(2**40)], [], "0 to 4294967295"),
    "length": (["--iterations", "-3"], [], "--iterations is -3"),
    "batch": ([], ["train_dataloader.batch_size=0"], r"train_dataloader\.batch_size is 0"),
    "workers": ([], ["train_dataloader.num_workers=-1"], "num_workers is -1"),
    "more workers than a machine bears": (
        [],
        ["val_dataloader.num_workers=9999"],
        "num_workers=9999 asks for 9999 proc",
    ),
    "a folder for the run": (
        [],
        ["work_dir=x"],
        "work_dir is 'x', which the suite sets .*; give --runs-dir or --work-dir",
    ),
    "another run to resume": ([], ["resume=True"], "resume is True, .* goes on by itself"),
    "schedule": ([], ["param_scheduler=5"], "param_scheduler is '5'; allowed are settings by their names"),
    "measures": ([], ["val_evaluator=[a,b]"], "val_evaluator is .*; allowed are settings"),
    "batch to validate": ([], ["val_dataloader.batch_size=1.5"], r"val_dataloader\.batch_size is 1\.5"),
    "validations": ([], ["train_cfg.val_interval=-2"], "val_interval is -2"),
    "no validation": ([], ["train_cfg.val_interval=0"], "val_interval is 0"),
    "learning rate": ([], ["optim_wrapper.optimizer.lr=-1"], r"optimizer\.lr is -1; allowed are finite"),
    "learning rate in words": ([], ["optim_wrapper.optimizer.lr=abc"], "lr is 'abc'"),
    "infinite": ([], ["optim_wrapper.optimizer.lr=1e999"], "lr is"),
    "weight decay": ([], ["optim_wrapper.optimizer.weight_decay=-1"], "weight_decay is -1"),
    "clipping": ([], ["optim_wrapper.clip_grad.max_norm=-1"], r"clip_grad\.max_norm is -1; allowed are finite"),
    "no checkpoints": ([], ["default_hooks.checkpoint.interval=0"], r"checkpoint\.interval is 0; allowed are whole"),
    "half a batch": ([], ["optim_wrapper.accumulative_counts=1.5"], "counts is 1.5; allowed are whole numbers from 1"),
    "no log": ([], ["default_hooks.logger.interval=0"], r"logger\.interval is 0; allowed are whole"),
    "layers of the method": ([], ["lowrank.layers=[a]"], r"lowrank\.layers would have no effect, as --layers says"),
    "crop": ([], ["crop_size=(0,32)"], r"crop_size is \(0, 32\)"),
    "crop and padding": (
        [],
        ["crop_size=(48,48)"],
        r"crop_size is \(48, 48\), .*preprocessor\.size is \(32, 32\); set",
    ),
    "crop and cuts": (
        [],
        ["crop_size=(48,48)", "model.data_preprocessor.size=(48,48)"],
        r"crop_size is \(48, 48\), .* and train_dataloader\.dataset\.dataset\.pipeline\.3\.crop_size is \(32, 32\)",
    ),
    "weights of a sweep": ([], ["weights=x.pth"], "sets 'weights', which would have no effect; give --weights to a sw"),
    "a test": ([], ["test_evaluator.iou_metrics=[mDice]"], r"no effect; a run is validated, by val_evaluator"),
    "a variable": ([], ["scenes.img_suffix=.jpg"], "sets 'scenes.img_suffix', a variable .* would have no effect"),
    "classes": ([], ["model.decode_head.num_classes=-1"], "num_classes is -1"),
    "hooks": ([], ["custom_hooks.0.type=X"], "custom_hooks is .*allowed is a list"),
    "no hooks": ([], ["custom_hooks=[]"], "sets custom_hooks, which .* follows from --layers and the method; give"),
    "depth": ([], ["layers=5"], "sets layers, which in the suite's own configs follows from --layers"),
    "words for numbers": ([], ["train_cfg.max_iters=abc"], "max_iters is 'abc'"),
    "less than no images": (["--limit", "-1"], [], r"--limit is -1\.0; allowed are whole numbers from 1, or a share"),
    "more images than there are": (["--limit", "999"], [], r"the limit is 999, 999 of 12 training samples; allowed"),
    "ranks": ([], ["lowrank.method.type=ASI"], r"ASI needs ranks: give its own, or a budget"),
    "typo": ([], ["trian_cfg.val_interval=2"], "nothing is called 'trian_cfg'"),
}


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize("name", OPTIONS)
def test_what_cannot_work_is_refused(name, dry, data_dir, tmp_path, capsys):
    options, settings, message = OPTIONS[name]
    composed = map(str, files("pspnet_small", "digit_scenes", "finetune", "vanilla"))
    where = ["--layers", "10", "--data-dir", str(data_dir), "--runs-dir", str(tmp_path / "runs")]
    length = [] if "--iterations" in options else ["--iterations", "2"]
    assert main(["train", *composed, *where, *length, *dry, *options, *TINY, *settings]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "OneDL" not in line]
    assert len(said) == 1
    assert re.search(f"^error: .*{message}", said[0])
    assert not (tmp_path / "runs").exists()


PARTS = {  # that MMEngine cannot build, and what it says of them
    "model.decode_head.type=Nope": "Nope is not in the mmseg::model registry",
    "model.backbone.nope=3": r"\w+.__init__\(\) got an unexpected keyword argument 'nope'",
    "model.backbone.depth=17": "invalid depth 17 for resnet",
    "default_hooks.logger.type=Nope": "Nope is not in the mmseg::hook registry",
    "train_cfg.nope=3": r"IterBasedTrainLoop.__init__\(\) got an unexpected keyword argument 'nope'",
    "train_dataloader.nope=3": r"DataLoader.__init__\(\) got an unexpected keyword argument 'nope'",
    "optim_wrapper.optimizer.nope=3": r"\w+.__init__\(\) got an unexpected keyword argument 'nope'",
    "default_hooks.logger.nope=3": r"LoggerHook.__init__\(\) got an unexpected keyword argument 'nope'",
    "param_scheduler.0.type=Nope": "Nope is not in the mmseg::parameter scheduler registry",
    "visualizer.type=Nope": "Nope is not in the mmseg::visualizer registry",
    "log_processor.nope=3": r"LogProcessor.__init__\(\) got an unexpected keyword argument 'nope'",
}


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize("setting", PARTS)
def test_a_part_that_cannot_be_built_is_one_line_and_leaves_nothing(setting, dry, data_dir, tmp_path, capsys):
    composed = map(str, files("pspnet_small", "digit_scenes", "finetune", "vanilla"))
    where = ["--layers", "10", "--data-dir", str(data_dir), "--runs-dir", str(tmp_path / "runs")]
    assert main(["train", *composed, *where, "--iterations", "2", *dry, *TINY, setting]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "OneDL" not in line]
    assert len(said) == 1
    assert re.search(f"^error: a part of the config cannot be built: {PARTS[setting]}; mend its type", said[0])
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("option", ["--runs-dir", "--work-dir", "--data-dir"])
def test_a_folder_without_a_name_is_an_error_of_the_command_line(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "x.py", option, ""])
    assert f"argument {option}: it is empty; give a folder" in capsys.readouterr().err


def test_an_option_that_is_no_pair_is_an_error_of_the_command_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "x.py", "--cfg-options", "a=1", "abc"])
    assert "--cfg-options has 'abc'; allowed is KEY=VALUE" in capsys.readouterr().err


CONFIGS = {
    "twice.yaml": (b"stage: a\nstage: b\n", "'stage' twice"),
    "latin.yaml": (b"stage: \xff\n", "no UTF-8"),
    "deep.yaml": (b"a: " + b"[" * 3000 + b"]" * 3000, "nested"),
    "sixty.yaml": (b"seed: 1:30\n", "base of 60"),
    "list.yaml": (b"[1]\n", "no settings"),
    "half.json": (b"{", "JSONDecodeError"),
    "other.toml": (b"a = 1", "type"),
    "exits.py": (b"raise SystemExit(0)", "SystemExit"),
    "latin.py": (b"\xff\xfe", "UnicodeDecodeError"),
    "twice.py": (b"a = dict(b=1, b=2)", "keyword argument repeated"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_no_one_means_is_refused(name, tmp_path, capsys):
    content, message = CONFIGS[name]
    (tmp_path / name).write_bytes(content)
    assert main(["train", str(tmp_path / name), "--runs-dir", str(tmp_path / "runs")]) == 2
    assert re.fullmatch(rf"error: config [^\n]*{message}[^\n]*\n", capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()
