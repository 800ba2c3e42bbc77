"""A method from its config, whether it needs ranks, and the tag of a run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank
from experiment import ExperimentError
from experiment.method import (
    build_method,
    derives,
    fuses,
    leaves_ranks,
    method_tag,
    needs_ranks,
    table_tag,
    with_ranks,
)
from experiment.ranks import Budget

CONFIGS = [
    {"type": "Vanilla"},
    {"type": "GradientFilter", "patch": 2},
    {"type": "SVD", "energy": 0.8},
    {"type": "HOSVD", "energy": 0.8},
    {"type": "ASI"},
    {"type": "ASI", "ranks": 3},
    {"type": "ASI", "refresh": 10},
    {"type": "ASI", "storage": "int8"},
    {"type": "ASI", "storage": "int8", "derive": True},
    {"type": "HOSVD", "energy": 0.8, "derive": True},
    {"type": "ASI", "derive": "slopes"},
    {"type": "ASI", "derive": 20000},
    {"type": "FixedBases"},
    {"type": "Rounded", "storage": "int8"},
    {"type": "FixedBases", "ranks": 3},
    {"type": "WSI", "energy": 0.9},
    {"type": "WASI", "energy": 0.9},
    {"type": "WASI", "energy": 0.9, "ranks": 3},
]


@pytest.fixture
def own(monkeypatch):
    """Path of a module with methods of a user's own, which can be imported."""
    monkeypatch.syspath_prepend(str(__import__("pathlib").Path(__file__).parent))
    return "own_methods"


def as_class_path(config):
    settings = dict(config)
    return {"class_path": f"lowrank.{settings.pop('type')}", "init_args": settings}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_both_ways_to_write_a_config_are_the_same_method(config):
    settings = dict(config)
    expected = getattr(lowrank, settings.pop("type"))(**settings)
    assert build_method(config) == build_method(as_class_path(config)) == expected


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_config_leaves_ranks_to_a_budget_where_its_layers_cannot_do_without(config):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3) if "W" in config["type"] else nn.Conv2d(4, 3, 1)

    model = Both()
    refused = bool(lowrank.check(model, ["layer"], build_method(config)))
    assert leaves_ranks(config) == leaves_ranks(as_class_path(config)) == needs_ranks(build_method(config)) == refused


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_config_says_whether_its_table_is_measured_with_derive(config):
    derive = config.get("derive", False)
    expected = derive if derive == 20000 else bool(derive)
    assert derives(config) == derives(as_class_path(config)) == expected
    assert type(derives(config)) is type(expected)
    assert build_method(config).derive == derive
    if derive:
        with pytest.raises(ExperimentError, match=rf"fuse is off with \w+\(derive={derive!r}\): .*; leave fuse out"):
            fuses(build_method(config), False)
        assert fuses(build_method(config), None)


def test_the_folder_of_a_table_is_told_by_a_number_that_can_be_measured_with():
    assert [table_tag(derive) for derive in (False, True)] == ["perplexity", "perplexity_derived"]
    assert table_tag(20000) == "perplexity_derived_20000"
    for derive in (0, 1, 256, -5, 1 << 24):
        with pytest.raises(ExperimentError, match=f"of the perplexity table derive is {derive}; allowed: "):
            table_tag(derive)


def test_every_method_of_the_library_is_known_without_importing_it():
    public = [getattr(lowrank, name) for name in lowrank.__all__]
    methods = {kind.__name__ for kind in public if isinstance(kind, type) and issubclass(kind, lowrank.Method)}
    assert methods - {"Method"} == {config["type"] for config in CONFIGS}


def test_no_config_is_vanilla():
    assert build_method(None) == lowrank.Vanilla()


def test_a_method_of_ones_own_is_found_by_its_path_and_by_its_name(own):
    with pytest.raises(ExperimentError, match=r"allowed: ASI, .* or the path of a class of your own"):
        build_method({"type": "NoSuch"})
    by_path = build_method({"class_path": f"{own}.Halved", "init_args": {"scale": 2.0}})
    assert (
        by_path == build_method({"type": "Halved", "scale": 2.0}) == build_method({"type": f"{own}.Halved", "scale": 2})
    )
    assert method_tag(by_path) == "halved_2"
    assert fuses(by_path, None)
    assert not leaves_ranks({"type": f"{own}.Halved"})
    assert leaves_ranks({"type": f"{own}.FirstChannels"})
    assert not derives({"type": f"{own}.FirstChannels"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "method type is None"),
        ({"type": "convert"}, "method type is 'convert'"),
        ({"type": "nowhere.to.be.Found"}, "no module 'nowhere' to import"),
        ({"type": "torch.nn.Linear"}, "method type is 'torch.nn.Linear'"),
        ({"type": "HOSVD", "enrgy": 1}, "method HOSVD: .*enrgy"),
    ],
)
def test_what_is_no_method_is_refused(config, message):
    with pytest.raises(ExperimentError, match=message):
        build_method(config)


@pytest.mark.parametrize(
    ("config", "fuse", "choice", "mib", "tag"),
    [
        ({"type": "ASI"}, None, "perplexity", 0.5, "asi_0.5mib"),
        ({"type": "ASI"}, None, "random", 0.5, "asi_random_0.5mib"),
        ({"type": "ASI"}, False, "perplexity", 0.5, "asi_unfused_0.5mib"),
        ({"type": "ASI", "refresh": 10}, None, "perplexity", 0.5, "asi_every10_0.5mib"),
        ({"type": "ASI", "storage": "int8", "derive": True}, None, "perplexity", 0.5, "asi_int8_derived_0.5mib"),
        ({"type": "ASI", "ranks": 3}, None, "random", 0.5, "asi_rank3"),
        ({"type": "HOSVD", "energy": 0.8}, None, "random", 0.5, "hosvd_0.8"),
        ({"type": "Vanilla"}, True, "perplexity", None, "vanilla_fused"),
    ],
)
def test_a_tag_says_what_is_not_as_usual_and_the_budget_where_it_is_used(config, fuse, choice, mib, tag):
    budget = mib and Budget("table.json", mib=mib)
    assert method_tag(build_method(config), fuse, choice, budget) == tag


def test_ranks_of_a_budget_go_to_whatever_method_needs_them(own, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3))
    table = lowrank.measure_perplexity(
        model, ["0", "1"], lambda net, batch: net(batch).square().mean(), torch.randn(4, 3, 8, 8)
    )
    table.save(tmp_path / "table.json")
    budget = Budget(str(tmp_path / "table.json"), mib=max(layer.nbytes[-1] for layer in table.layers) * 2 / 2**20)
    plan = lowrank.select_ranks(table, budget.nbytes)
    for name in (f"{own}.FirstChannels", "ASI"):
        method = with_ranks(build_method({"type": name}), budget, ["0", "1"])
        assert method.for_layer("1").ranks == plan.ranks["1"]
        with pytest.raises(ExperimentError, match=f"{name.rpartition('.')[2]} needs ranks"):
            with_ranks(build_method({"type": name}), None, ["0"])
