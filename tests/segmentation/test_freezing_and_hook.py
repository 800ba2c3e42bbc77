"""Freeze lists, and every setting of the hook."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import MODEL_WRAPPERS
from segmentors import narrow_config
from torch import nn

import lowrank
from experiment import ExperimentError
from experiment.method import build_method
from segmentation.compose import hook_settings
from segmentation.freezing import apply_freeze_list, freeze_statistics, switch_off_dropout
from segmentation.history import History
from segmentation.hook import LowRankHook
from segmentation.loss import RecomputedLoss


def network() -> nn.Sequential:
    inner = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Dropout2d(0.5))
    return nn.Sequential(nn.Conv2d(3, 2, 1), inner, nn.Conv2d(2, 1, 1))


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_freeze_list_is_applied_in_its_order():
    model = network()
    apply_freeze_list(model, ["1", "~1.1", "2"])
    assert trained(model) == {"0.weight", "0.bias", "1.1.weight", "1.1.bias"}
    apply_freeze_list(model, ["~1.1", "1"])
    assert trained(model) == {"0.weight", "0.bias"}


def test_an_unknown_path_is_named_with_its_likes_and_nothing_changes():
    model = nn.ModuleDict({"backbone": nn.Linear(1, 1)})
    with pytest.raises(ExperimentError, match=r"names 'backbon', .* did you mean 'backbone'"):
        apply_freeze_list(model, ["backbone", "~backbon"])
    assert len(trained(model)) == 2


def test_statistics_and_dropout():
    model = network().train()
    freeze_statistics(model)
    switch_off_dropout(model)
    assert (model.training, model[1][1].training, model[1][2].p) == (True, False, 0.0)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"type": "HOSV", "energy": 0.8},
            "'HOSV'; allowed: ASI, WASI, FixedBases, Vanilla, GradientFilter, SVD, HOSVD, WSI, Rounded, or",
        ),
        ({"type": "HOSVD", "enrgy": 0.8}, "HOSVD: .*enrgy"),
        ({"type": "HOSVD", "energy": 2}, "energy"),
    ],
)
def test_a_wrong_method_is_refused(method, message):
    with pytest.raises((ExperimentError, lowrank.LowRankError), match=message):
        build_method(method)


def test_asi_without_ranks_is_refused_and_takes_them_from_a_budget(build):
    config = narrow_config("pspnet", "asi")
    settings = hook_settings(config)
    with pytest.raises(ExperimentError, match="ASI needs ranks"):
        LowRankHook(**settings).prepare(build(config))


def test_vanilla_is_ordinary_training_and_the_others_keep_less(build):
    config = narrow_config("pspnet")
    stock, model = build(config), build(config)
    LowRankHook(**hook_settings(config)).prepare(model)
    changed = {name for name, m in model.named_modules() if type(m) is not type(stock.get_submodule(name))}
    assert changed == set(hook_settings(config)["layers"])
    fused = build(config)
    LowRankHook(**{**hook_settings(config), "fuse": True}).prepare(fused)
    assert isinstance(fused.decode_head, RecomputedLoss)
    kept_exact = build(config)
    LowRankHook(**{**hook_settings(config), "fuse": True, "recompute_loss": False}).prepare(kept_exact)
    assert not isinstance(kept_exact.decode_head, RecomputedLoss)


def test_a_loss_that_is_not_finite_stops_the_run():
    hook = LowRankHook(method={"type": "Vanilla"}, layers=[])

    class Runner:
        iter = 7

    hook.after_train_iter(Runner, 7, outputs={"loss": torch.tensor(1.0)})
    with pytest.raises(lowrank.NonFiniteError, match="nan at iteration 7"):
        hook.after_train_iter(Runner, 7, outputs={"loss": torch.tensor(float("nan"))})


@pytest.mark.slow
def test_a_checkpoint_has_the_stock_names_and_the_state_beside_them(build, batch):
    from segmentation.batches import segmentation_loss, training_mode

    config = narrow_config("pspnet")
    settings = {**hook_settings(config), "method": {"type": "ASI", "ranks": 2}}
    stock, model, hook = build(config), build(config), LowRankHook(**settings)
    hook.prepare(model)
    segmentation_loss(training_mode(model), batch).backward()
    runner = Runner(model)
    checkpoint = {"state_dict": model.state_dict()}
    hook.before_save_checkpoint(runner, checkpoint)
    stock.load_state_dict(checkpoint["state_dict"], strict=True)
    state = dict(checkpoint["lowrank"])
    assert len(state) > len(settings["layers"])
    other, runner = LowRankHook(**settings), Runner(build(config))
    other.after_load_checkpoint(runner, checkpoint)
    assert "lowrank" not in checkpoint
    other.before_train(runner)
    loaded = lowrank.training_state(runner.model)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


class Runner:
    """What the hook sees of MMEngine's."""

    iter, _load_from = 5, "iter_4.pth"

    def __init__(self, model):
        self.model = model


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"state_dict": {}, "lowrank_state": {"conv.lowrank_state_0": torch.ones(1)}},
        {"state_dict": {"conv.lowrank_state_0": torch.ones(1)}},
        {"mlp.lowrank_left": torch.ones(1)},
    ],
)
def test_what_an_earlier_version_saved_is_refused(checkpoint):
    hook = LowRankHook(method={"type": "Vanilla"}, layers=[])
    with pytest.raises(
        ExperimentError, match=r"^checkpoint iter_4\.pth is of an earlier version .*start afresh[^\n]*$"
    ):
        hook.after_load_checkpoint(Runner(None), checkpoint)


def test_a_model_whose_parameters_are_taken_apart_is_refused():
    class Sharded(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = network()

    MODEL_WRAPPERS.register_module(module=Sharded)
    try:
        with pytest.raises(ExperimentError, match=r"wrapped in Sharded; .* works in MMDistributedDataParallel"):
            LowRankHook(method={"type": "Vanilla"}, layers=["0"]).before_train(Runner(Sharded()))
    finally:
        MODEL_WRAPPERS.module_dict.pop("Sharded")


def test_weights_that_the_last_step_spoils_are_an_error(tmp_path):
    hook, model = History(tmp_path), nn.Linear(3, 2)
    hook.history.step_end(model, 0.5)
    model.weight.data[0] = float("nan")
    with pytest.raises(lowrank.NonFiniteError, match="diverged"):
        hook.after_val_epoch(SimpleNamespace(model=model, iter=3), {"mIoU": 50.0, "mAcc": 60.0})
