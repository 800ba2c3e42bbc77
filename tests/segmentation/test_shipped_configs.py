"""Every shipped config: it builds, its layers exist, and its stages and methods can be used."""

from __future__ import annotations

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from mmseg.registry import MODELS
from segmentors import NETWORKS, files, narrow

import lowrank
from experiment import ExperimentError
from experiment.method import build_method
from segmentation.compose import CONFIGS, choose_depth, hook_settings, load_config, rescale
from segmentation.hook import LowRankHook
from segmentation.sweep import published_budget

ALL_NETWORKS = sorted(path.stem for path in (CONFIGS / "networks").glob("*.py"))
DATA = sorted(path.stem for path in (CONFIGS / "data").glob("*.py"))
METHODS = sorted(path.stem for path in (CONFIGS / "methods").glob("*.py"))
STAGES = sorted(path.stem for path in (CONFIGS / "stages").glob("*.py"))
COUNTS = {  # compressed convolutions at 5 and 10 nominal layers (ASI's segmentation configs)
    **{"deeplabv3": (5, 9), "deeplabv3_mbv2": (5, 9), "fcn": (5, 10)},
    **{"pspnet": (1, 5), "pspnet_mbv2": (1, 6), "upernet": (5, 8)},
}


@pytest.mark.slow
@pytest.mark.parametrize("network", ALL_NETWORKS)
def test_every_network_builds_for_every_data_set_and_every_depth_converts(network):
    for data in DATA:
        config = load_config(files(network, data, "finetune", "gradient_filter"))
        assert config.network == network
        assert config.dataset == data
        with torch.device("meta"):
            model = MODELS.build(config.model)
        assert model.decode_head.conv_seg.out_channels == model.num_classes
    counts = []
    for layers in (5, 10):
        chosen = load_config(files(network, DATA[0], "finetune", "gradient_filter"))
        choose_depth(chosen, layers)
        with torch.device("meta"):
            model = MODELS.build(chosen.model)
        names = LowRankHook(**hook_settings(chosen), fuse=False).prepare(model)
        counts.append(len(names))
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {f"{name}.weight" for name in names} <= trained
        assert "decode_head.conv_seg.weight" in trained
        assert not any(name.startswith("backbone.stem") or ".layer1." in name for name in trained)
    assert tuple(counts) == COUNTS[network.removesuffix("_small")]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_one_of_the_library(method):
    config = load_config(files("fcn", "voc12aug", "finetune", method))
    choose_depth(config, 10)
    settings = hook_settings(config)
    assert build_method(settings["method"]).tag == method.removesuffix("_fused")
    assert LowRankHook(**settings).fuse == (method != "vanilla")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_an_optimizer_and_a_schedule(stage):
    base = stage.split("_")[0]
    config = load_config([*files("upernet", "voc12aug", base, "vanilla"), CONFIGS / "stages" / f"{stage}.py"])
    config.merge_from_dict(narrow("upernet"))
    assert config.stage == base
    rescale(config, 10)
    wrapper = build_optim_wrapper(MODELS.build(config.model), config.optim_wrapper)
    rates = []
    schedulers = [PARAM_SCHEDULERS.build({**s, "optimizer": wrapper}) for s in config.param_scheduler]
    for _ in range(10):
        rates.append(wrapper.param_groups[0]["lr"])
        for scheduler in schedulers:
            scheduler.step()
    assert max(rates) > rates[-1] > 0
    assert config.default_hooks.checkpoint.interval == config.train_cfg.val_interval <= 10


def test_calibration_trains_the_classifier_or_with_mobilenet_the_head():
    for network, wanted in (("pspnet", "decode_head.conv_seg."), ("pspnet_mbv2", "decode_head.")):
        config = load_config(files(network, "voc12aug", "calibrate", "vanilla"))
        choose_depth(config, None)
        with torch.device("meta"):
            model = MODELS.build(config.model)
        LowRankHook(**hook_settings(config)).prepare(model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, _ in model.named_parameters() if name.startswith(wanted)}


def test_a_depth_that_a_network_does_not_have_is_refused():
    config = load_config(files("pspnet", "voc12aug", "finetune", "asi"))
    with pytest.raises(ExperimentError, match="--layers is 7; pspnet has 5, 10 and all"):
        choose_depth(config, 7)


def test_the_published_table_gives_ranks_within_the_published_budgets():
    table = lowrank.PerplexityTable.load(CONFIGS.parent / "published" / "deeplabv3_mbv2_perplexity.json")
    config = load_config(files("deeplabv3_mbv2", "voc12aug", "finetune", "asi"))
    for layers in (5, 10):
        chosen = load_config(files("deeplabv3_mbv2", "voc12aug", "finetune", "asi"))
        choose_depth(chosen, layers)
        budget = published_budget("deeplabv3_mbv2", "voc12aug", str(layers)) * 2**20
        plan = lowrank.select_ranks(table, budget, hook_settings(chosen)["layers"])
        assert 0.95 * budget < plan.nbytes <= budget
    assert config.network == table.model


def test_every_network_has_published_budgets_on_the_data_set_of_the_papers():
    for network in NETWORKS:
        assert all(published_budget(network, "voc12aug", layers) > 0 for layers in ("5", "10"))
        nowhere = [("voc12aug", "7"), ("voc12aug", "all"), ("cityscapes", "5")]
        assert not any(published_budget(network, *place) for place in nowhere)
