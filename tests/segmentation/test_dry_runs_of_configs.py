"""A dry run of a config of one's own refuses what the run does, and says what is to be changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger
from own_configs import errors, set_at

from segmentation.cli import main
from segmentation.training import _learning_rate, _recipe


def test_where_two_configs_share_a_folder_the_refusal_says_how_they_are_told_apart(own, capsys):
    content, words = own
    for named, how in (({}, "dataset = 'NAME' and network = 'NAME'"), ({"network": "x"}, "dataset = 'NAME' in")):
        content |= named
        assert main(words("train", "--dry-run")) == 0
        folder = Path(capsys.readouterr().out.rpartition("folder: ")[2].strip())
        folder.mkdir(parents=True)
        (folder / "identity.json").write_text("{}")
        (folder / "latest.pth").touch()
        assert main(words("train", "--dry-run")) == 2
        (line,) = errors(capsys)
        assert "holds a run with other settings" in line
        assert how in line
    content["dataset"] = "own"
    assert main(words("train", "--dry-run")) == 0


def test_it_does_not_tell_of_each_weight_whoever_has_made_a_logger_before(own, capsys, request):
    """As MMEngine does where a network begins, in three lines for each."""
    name = request.node.name
    MMLogger.get_instance(name)  # with this terminal's stream, and the current one from here on
    try:
        assert main(own[1]("train", "--dry-run")) == 0
    finally:
        del MMLogger._instance_dict[name]
    said = capsys.readouterr()
    assert " - INFO - " not in said.out + said.err
    assert len(said.out.splitlines()) < 4


def _loss(**settings):
    return {"type": "CrossEntropyLoss", "use_sigmoid": False, **settings}


def _auxiliary(**settings):
    norm = {"type": "BN", "requires_grad": True}
    head = {"type": "FCNHead", "in_channels": 32, "in_index": 2, "channels": 4, "num_classes": 2, "norm_cfg": norm}
    return head | {"loss_decode": _loss(loss_weight=0.4)} | settings


IMAGE, LABELS, PACKED = ({"type": name} for name in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs"))
FLIPPED, SMALLER = {"type": "RandomFlip", "prob": 0.5}, {"type": "Resize", "scale": (8, 8)}
BACKBONE, HEAD = ("model", "backbone", "init_cfg"), ("model", "decode_head", "loss_decode")
UNFIT = {  # what is changed, and what is said
    "layers": ("train", ("custom_hooks", 0, "layers", ["decode_head.nothing"]), "decode_head.nothing"),
    "layers to measure": ("measure", ("custom_hooks", 0, "layers", ["decode_head.nothing"]), "decode_head.nothing"),
    "parts to freeze": ("train", ("custom_hooks", 0, "freeze", ["backbones"]), "did you mean 'backbone'"),
    "a method of linear layers": ("train", ("custom_hooks", 0, "method", {"type": "WSI", "energy": 0.9}), "WSI"),
    "a hook": ("train", ("custom_hooks", 0, {"type": "Nope"}), "Nope is not in the mmseg::hook registry"),
    "a setting of a hook": (
        "train",
        ("custom_hooks", [{"type": "EMAHook", "nope": 1}]),
        "unexpected keyword argument 'nope'",
    ),
    "a setting of a measure": (
        "train",
        ("val_evaluator", "iou_metric", ["mIoU"]),
        "has the setting 'iou_metric'",
    ),
    "a transform": ("train", ("train_dataloader", "dataset", "pipeline", 2, "type", "Nope"), "Nope is not in the"),
    "a sampler": ("train", ("val_dataloader", "sampler", "nope", 3), "unexpected keyword argument 'nope'"),
    "a data set": ("measure", ("train_dataloader", "dataset", "nope", 3), "unexpected keyword argument 'nope'"),
    "a loop": ("train", ("val_cfg", "type", "Nope"), "Nope is not in the mmseg::loop registry"),
    "a name of what clips": (
        "train",
        ("optim_wrapper", "clip_grad", {"max_nrom": 1}),
        "the setting 'max_nrom'",
    ),
    "a share of no effect": (
        "train",
        ("optim_wrapper", "paramwise_cfg", {"norm_decay": 0.0}),
        "paramwise_cfg has the setting 'norm_decay'; allowed: custom_keys,",
    ),
    "a share of some layers": (
        "train",
        ("optim_wrapper", "paramwise_cfg", {"custom_keys": {"head": {"lr_mul": 10.0}}}),
        "paramwise_cfg.custom_keys['head'] has the setting 'lr_mul'; allowed: lr_mult, decay_mult",
    ),
    "a setting of the process": ("train", ("env_cfg", {"cudnn_benchmrk": True}), "env_cfg has the setting 'cudnn_benc"),
    "how processes start": (
        "train",
        ("env_cfg", {"mp_cfg": {"start": "fork"}}),
        "env_cfg.mp_cfg has the setting 'start'",
    ),
    "a setting of what is random": (
        "train",
        ("randomness", {"sed": 1}),
        "randomness has the setting 'sed'; allowed: seed, diff_rank_seed, deterministic",
    ),
    "how images are validated": (
        "train",
        ("model", "test_cfg", "mode", "slid"),
        "model.test_cfg.mode is 'slid'; allowed: 'whole', 'slide'",
    ),
    "a schedule of after the end": (
        "train",
        ("param_scheduler", [{"type": "PolyLR", "by_epoch": False, "begin": 4, "end": 9}]),
        "param_scheduler.0.begin is 4, and the run ends at iteration 4, so that it would have no effect",
    ),
    "what no head reads": (
        "train",
        ("model", "train_cfg", {"sampler": None, "num_points": 8}),
        "model.train_cfg has the setting 'num_points', which no head of this network reads",
    ),
    "windows without a size": (
        "train",
        ("model", "test_cfg", {"mode": "slide", "stride": (8, 8)}),
        "model.test_cfg.mode is 'slide', which needs crop_size, in pixels",
    ),
    "windows with pixels between them": (
        "train",
        ("model", "test_cfg", {"mode": "slide", "crop_size": (8, 8), "stride": (8, 9)}),
        "model.test_cfg.stride is (8, 9), above its crop_size (8, 8), so that pixels between the windows",
    ),
    "windows that do not move": (
        "train",
        ("model", "test_cfg", {"mode": "slide", "crop_size": (8, 8), "stride": (0, 8)}),
        "model.test_cfg.stride is (0, 8); allowed are two whole numbers from 1",
    ),
    "no word of how images are validated": ("train", ("model", "test_cfg", {}), "model.test_cfg has no mode; allowed"),
    "a misspelt word of it": (
        "train",
        ("model", "test_cfg", {"mode": "whole", "strid": 3}),
        "model.test_cfg has the setting 'strid'; did you mean 'stride'?",
    ),
    "how much is logged": ("train", ("log_level", "DEBUGG"), "log_level is 'DEBUGG'; allowed: "),
    "a schedule without a type": (
        "train",
        ("param_scheduler", {"0": {"power": 1}}),
        "param_scheduler.0.power is 1; allowed are the settings of a scheduler",
    ),
    "a schedule that would never step": (
        "train",
        ("param_scheduler", [{"type": "PolyLR", "power": 0.9}]),
        "param_scheduler.0 counts epochs and train_cfg iterations, so that it would have no effect; set ",
    ),
    "schedules of several optimizers": (
        "train",
        ("param_scheduler", {"head": [{"type": "PolyLR", "by_epoch": False}, {"type": "PolyLR"}]}),
        "param_scheduler.head.1 counts epochs",
    ),
    "checkpoints that would never be saved": (
        "train",
        ("default_hooks", {"checkpoint": {"type": "CheckpointHook", "interval": 1}}),
        "default_hooks.checkpoint.interval counts epochs and train_cfg iterations, so that it would have no effect",
    ),
    "an epoch without an end": (
        "train",
        ("train_cfg", {"type": "EpochBasedTrainLoop", "max_epochs": 2}),
        "train_dataloader.sampler is an InfiniteSampler, whose first epoch has no end; set its type to Def",
    ),
    "a hook without a type": (
        "train",
        ("default_hooks", {"checkpoint": {"interval": 1}}),
        """must contain the key "type", but got {'interval': 1}""",
    ),
    "weights of too many classes": (
        "train",
        (*HEAD, [{"type": "DiceLoss"}, _loss(class_weight=[1.0, 2.0, 3.0])]),
        "model.decode_head.loss_decode.1.class_weight has 3 numbers, and its head 2 classes",
    ),
    "the same where the loss takes them": (
        "train",
        (*HEAD, {"type": "LovaszLoss", "class_weight": [0.1, 0.2, 0.3], "reduction": "none"}),
        "class_weight has 3 numbers",
    ),
    "the same to measure": ("measure", (*HEAD, _loss(class_weight=[1.0])), "class_weight has 1 numbers"),
    "a class to be unlearnt": ("train", (*HEAD, _loss(class_weight=[1.0, -2.0])), "class_weight has -2.0; allowed are"),
    "weights of classes that are a pickle": (
        "train",
        (*HEAD, _loss(class_weight=__file__)),
        "test_dry_runs_of_configs.py; allowed are such that end in .npy or .json",
    ),
    "a loss that is not trained": (
        "train",
        (*HEAD, [_loss(), {"type": "DiceLoss", "loss_name": "dice"}]),
        "model.decode_head.loss_decode.1.loss_name is 'dice', which has no 'loss' in it, so that it would be shown and",
    ),
    "another head of other classes": (
        "train",
        ("model", "auxiliary_head", [_auxiliary(), _auxiliary(num_classes=3)]),
        "model.auxiliary_head.1.num_classes is 3, and the head that predicts has 2",
    ),
    "another head of other channels": (
        "train",
        ("model", "auxiliary_head", _auxiliary(in_channels=33)),
        "model.auxiliary_head does not take what it is given (Given groups=1, weight of size [4, 33, 3, 3]",
    ),
    "a head of other channels, to measure": (
        "measure",
        ("model", "decode_head", "in_channels", 65),
        "model.decode_head does not take what it is given",
    ),
    "classes in another order": (
        "train",
        ("val_dataloader", "dataset", "metainfo", "classes", ("thing", "ground")),
        "img/val has other classes than that to train on: its label 0 is 'thing', there 'ground'; give both the same",
    ),
    "labels that count from another one": (
        "train",
        ("val_dataloader", "dataset", "reduce_zero_label", True),
        "img/val has reduce_zero_label=True, and that to train on False, so that a label stands for another class",
    ),
    "pixels that move and labels that do not": (
        "train",
        ("train_dataloader", "dataset", "pipeline", [IMAGE, FLIPPED, LABELS, PACKED]),
        "pipeline.1 is RandomFlip, ahead of LoadAnnotations, so that it would move pixels and not their labels",
    ),
    "no label maps": (
        "measure",
        ("train_dataloader", "dataset", "pipeline", [IMAGE, PACKED]),
        "train_dataloader.dataset gives images without label maps; have LoadAnnotations in its pipeline",
    ),
    "no label maps to validate on": (
        "train",
        ("val_dataloader", "dataset", "pipeline", [IMAGE, PACKED]),
        "val_dataloader.dataset gives images without label maps",
    ),
    "label maps of another size than what is predicted": (
        "train",
        ("val_dataloader", "dataset", "pipeline", [IMAGE, LABELS, SMALLER, PACKED]),
        "val_dataloader.dataset gives a label map of 8 x 8 pixels, which is compared with 16 x 16; put LoadAnnotations",
    ),
    "how weights begin": ("train", (*BACKBONE, {"type": "Kaimingg", "layer": "Conv2d"}), "Kaimingg is not in the"),
    "layers to begin with": (
        "train",
        (*BACKBONE, [{"type": "Kaiming", "layer": ["Conv2d", "Conv2x"]}]),
        "model.backbone.init_cfg.0.layer names 'Conv2x', of which the network has none",
    ),
    "no layers to begin with": (
        "measure",
        (*BACKBONE, {"type": "Normal", "std": 0.01}),
        "model.backbone.init_cfg of type Normal has no layer, so that it would have no effect",
    ),
    "a part to begin with": (
        "train",
        (*BACKBONE, {"type": "Kaiming", "layer": "Conv2d", "override": {"name": "nope"}}),
        "the network cannot begin as its init_cfg says: module did not have attribute nope",
    ),
    "a network": ("train", ("model", "backbone", "depth", 19), "invalid depth 19 for resnet"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_only_the_built_network_shows_is_refused(name, own, tmp_path, capsys):
    command, change, message = UNFIT[name]
    content, words = own
    set_at(content, *change)
    assert main(words(command, "--dry-run")) == 2
    (line,) = errors(capsys)
    assert message in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_refuses_what_its_dry_run_does_before_anything_is_written(own, tmp_path, capsys):
    content, words = own
    content["model"]["auxiliary_head"] = _auxiliary(in_channels=33)
    assert main(words("train")) == 2
    (line,) = errors(capsys)
    assert "model.auxiliary_head does not take" in line
    assert not (tmp_path / "runs").exists()
    content["model"]["auxiliary_head"] = [_auxiliary(), _auxiliary(loss_decode=_loss(class_weight=[1.0, 2.0]))]
    assert main(words("train", "--dry-run")) == 0


@pytest.mark.parametrize(("counts", "steps"), [(None, 4), (2, 2), (3, 2), (9, 1)])
def test_steps_are_the_optimizers_where_it_has_gradients_of_several_iterations(own, counts, steps):
    content, _ = own
    if counts is not None:
        content["optim_wrapper"]["accumulative_counts"] = counts
    assert _recipe(Config(content))["steps"] == steps


def test_a_rate_that_is_scaled_by_the_batch_is_recorded_so_and_passes_a_dry_run(own):
    content, words = own
    assert _learning_rate(Config(content)) == 0.01
    content["auto_scale_lr"] = {"enable": True, "base_batch_size": 16}
    assert main(words("train", "--dry-run")) == 0
    assert _learning_rate(Config(content | {"processes": 2})) == pytest.approx(0.01 * 2 * 2 / 16)


def test_the_names_of_classes_may_stand_in_a_file(own, tmp_path, capsys):
    content, words = own
    path = tmp_path / "classes.txt"
    path.write_text("ground\nthing\n")
    content["train_dataloader"]["dataset"]["metainfo"] = {"classes": str(path)}
    assert main(words("train", "--dry-run")) == 0
    path.write_text("ground\nthing\nother\n")
    assert main(words("train", "--dry-run")) == 2
    assert "its label 2 is None, there 'other'" in errors(capsys)[0]


def test_a_run_that_counts_iterations_saves_at_each_validation_where_it_does_not_say_when(own, tmp_path):
    content, words = own
    content["train_cfg"] |= {"max_iters": 6}
    assert main(words("train")) == 0
    assert {path.name for path in tmp_path.rglob("*.pth")} == {"iter_4.pth", "iter_6.pth", "final.pth"}


def test_a_file_whose_name_is_none_for_a_folder_has_to_name_its_network(own, tmp_path, capsys):
    _, words = own
    path = Path(words()[1])
    other = str(path.rename(path.with_name("my net.py")))
    command = ["train", other, "--runs-dir", str(tmp_path / "runs"), "--dry-run"]
    assert main(command) == 2
    (line,) = errors(capsys)
    assert "'my net', is none for a folder; set network = 'NAME' in it" in line
    assert main([*command, "--cfg-options", "network=mine"]) == 0
