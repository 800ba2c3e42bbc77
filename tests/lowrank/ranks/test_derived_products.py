"""Ranks chosen where inputs follow by as many products as a table was measured with, and settings that are none."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from derived_cases import Sine, loss_of
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, PerplexityTable, Rounded, SettingError, TableError, select_ranks

ENERGIES, MODE_ENERGIES = (0.4, 0.8), (0.3, 0.9)


def dear():
    """A network whose last input follows by 288 products for each of its numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 3, 3))
    return model.double(), random_tensor(4, 3, 9, 8)


@pytest.mark.parametrize("derive", [True, 300])
def test_a_plan_brings_the_number_of_products_that_its_table_was_measured_with(tmp_path, derive):
    model, x = dear()
    options = {"mode_energies": MODE_ENERGIES, "storages": ("int8",), "derive": 300}
    measured = lowrank.measure_perplexity(model, ["2", "4"], loss_of, x, **options)
    measured.save(tmp_path / "table.json")
    table = PerplexityTable.load(tmp_path / "table.json")
    assert table == measured
    assert table.derives == 300
    plan = select_ranks(table, 7000, storages=("int8",), derive=derive)
    assert (plan.derived, plan.reach) == ({"4": "2"}, 300)
    for method in (ASI(plan), ASI(plan, derive=True), ASI(plan, derive=300)):
        assert method.for_layer("2").derive == method.for_layer("4").derive == 300
        trained = lowrank.convert(copy.deepcopy(model), ["2", "4"], method, everywhere=True)
        loss_of(trained, x).backward()
        kept = {layer._lowrank.name: layer._lowrank.kept_bytes for layer in lowrank.converted_layers(trained)}
        assert kept == {"2": plan.nbytes, "4": 0}
    assert ASI(plan).tag == "asi_int8_derived_300"


class Smaller(nn.Module):
    """A residual block whose shortcut has the input of its first convolution, to half the size."""

    def __init__(self, inside, outside):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, 2, 1)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1)
        self.short = nn.Conv2d(inside, outside, 1, 2)

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.short(x))


@pytest.mark.parametrize("inside", [16, 32, 160])
def test_a_plan_lets_inputs_follow_over_shortcuts_that_share_what_is_kept(inside, recwarn):
    """Such a shortcut derives nothing itself. Of the layers behind the block all derive that the plan says."""
    torch.manual_seed(0)
    blocks = nn.Sequential(Smaller(inside, 2 * inside), nn.Conv2d(2 * inside, 6, 3, 1, 1), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, inside, 3), Sine(), blocks, nn.Conv2d(6, 2, 1)).double()
    x, names = random_tensor(4, 3, 9, 8), ["2.0.conv1", "2.0.conv2", "2.0.short", "2.1"]
    table = lowrank.measure_perplexity(model, names, loss_of, x, ENERGIES, storages=("int8",), derive=20_000)
    found = table.stored_as(("int8",))
    least = sum(min(found[name].nbytes) for name in ("2.0.conv1", "2.0.short"))
    for budget in (least, 1e9):
        plan = select_ranks(table, budget, storages=("int8",), derive=20_000)
        trained = lowrank.convert(copy.deepcopy(model), names, ASI(plan), everywhere=True)
        loss_of(trained, x).backward()
        states = {layer._lowrank.name: layer._lowrank for layer in lowrank.converted_layers(trained)}
        assert {name: state.derived for name, state in states.items() if state.derived} == plan.derived
        assert sum(state.kept_bytes for state in states.values()) <= plan.nbytes
        if budget == least:
            assert plan.derived == dict.fromkeys(["2.0.conv2", "2.1"], "2.0.conv1")
    assert not [str(warning.message) for warning in recwarn if "keeps its whole input" in str(warning.message)]


class Partial(nn.Module):
    """Half of the channels go on as they are, half by way of a convolution whose input follows from what is kept."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 1)
        half = channels // 2
        padded = nn.Conv2d(half, half, 3, padding=1, padding_mode="replicate")
        self.part = nn.Sequential(padded, nn.BatchNorm2d(half), nn.ReLU(), nn.Conv2d(half, half, 1), nn.ReLU())
        self.both = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        one, other = F.relu(self.first(x)).chunk(2, 1)
        return F.relu(self.both(torch.cat([one, self.part(other)], 1)))


def test_a_layer_that_a_plan_counts_on_keeps_its_form_even_if_it_could_do_without():
    """Where others keep for themselves that were to derive as they were measured, more may follow than was measured."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Sine(), Partial(8), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 2, 1))
    model, x = model.double().eval(), random_tensor(4, 3, 9, 8)
    names = ["2.both", "3"]
    table = lowrank.measure_perplexity(model, names, loss_of, x, ENERGIES, storages=("int8",), derive=20_000)
    plan = select_ranks(table, min(table.stored_as(("int8",))["2.both"].nbytes), storages=("int8",), derive=True)
    assert plan.derived == {"3": "2.both"}
    ahead = Rounded(derive=20_000)
    lowrank.convert(model, {"2.first": ahead, **dict.fromkeys(names, ASI(plan))}, everywhere=True)
    loss_of(model, x).backward()
    states = {layer._lowrank.name: layer._lowrank for layer in lowrank.converted_layers(model)}
    assert {name: state.derived for name, state in states.items() if state.derived} == plan.derived
    assert sum(states[name].kept_bytes for name in names) == plan.nbytes
    other = lowrank.convert(lowrank.revert(model), ["2.first", *names], ahead, everywhere=True)
    loss_of(other, x).backward()
    assert [layer._lowrank.derived for layer in lowrank.converted_layers(other)] == [None, "2.first", "2.first"]


def test_slopes_with_a_plan_by_a_number_of_products_are_refused():
    """What follows by more than the usual number would be kept, at ranks that are its whole shape."""
    model, x = dear()
    options = {"mode_energies": MODE_ENERGIES, "storages": ("int8",)}
    table = lowrank.measure_perplexity(model, ["2", "4"], loss_of, x, derive=300, **options)
    plan = select_ranks(table, 7000, storages=("int8",), derive=True)
    with pytest.raises(lowrank.LowRankError, match="'slopes', and the ranks were chosen so"):
        lowrank.convert(model, ["2", "4"], ASI(plan, derive="slopes"))
    assert not list(lowrank.converted_layers(model))
    apart = select_ranks(table, 7000, storages=("int8",))
    lowrank.convert(model, ["2", "4"], ASI(apart, derive="slopes"))


def test_a_plan_is_kept_to_where_the_exact_input_of_the_layer_ahead_takes_no_more(recwarn):
    """The first input follows from what is kept; the second one, by dear convolutions, from a form alone."""
    model, x = dear()
    model[1] = nn.Sequential(nn.BatchNorm2d(32), nn.ReLU()).double().eval()
    table = lowrank.measure_perplexity(model, ["2", "4"], loss_of, x, energies=(0.8,), derive=300)
    plan = select_ranks(table, table.layers[0].nbytes[0], derive=True)
    assert plan.derived == {"4": "2"}
    lowrank.convert(model, ["2", "4"], ASI(plan))
    loss_of(model, x).backward()
    kept = {layer._lowrank.name: layer._lowrank.kept_bytes for layer in lowrank.converted_layers(model)}
    assert kept == {"2": plan.nbytes, "4": 0}
    assert not [str(warning.message) for warning in recwarn if "keeps its whole input" in str(warning.message)]


def test_another_number_than_the_table_was_measured_with_is_refused():
    model, x = dear()
    for measured, told in ((300, "by 300"), (True, "by the usual number")):
        table = lowrank.measure_perplexity(model, ["2", "4"], loss_of, x, derive=measured)
        with pytest.raises(
            TableError, match=f"derive is 400, and the perplexity table was measured {told} of products"
        ):
            select_ranks(table, 6000, derive=400)


@pytest.mark.parametrize("derive", [2.5, "far", -1, 256, None, np.int64(300)])
def test_what_is_no_number_of_products_is_refused(derive):
    model, x = dear()
    with pytest.raises(SettingError, match="or a number of products between"):
        lowrank.measure_perplexity(model, ["2", "4"], loss_of, x, derive=derive)
    table = lowrank.measure_perplexity(model, ["2", "4"], loss_of, x, derive=True)
    with pytest.raises(SettingError, match="or a number of products between"):
        select_ranks(table, 10**6, derive=derive)


@pytest.mark.parametrize("derives", [12.5, -1, 256, "slopes", "300", None, [300]])
def test_a_table_of_a_damaged_number_is_refused(tmp_path, derives):
    model, x = dear()
    lowrank.measure_perplexity(model, ["2", "4"], loss_of, x, derive=300).save(tmp_path / "table.json")
    content = json.loads((tmp_path / "table.json").read_text())
    (tmp_path / "table.json").write_text(json.dumps({**content, "derives": derives}))
    with pytest.raises(TableError, match="'derives' must be true, false or a number of products"):
        PerplexityTable.load(tmp_path / "table.json")


def test_nothing_follows_where_nothing_does():
    model, x = dear()
    table = lowrank.measure_perplexity(model, ["2", "4"], loss_of, x, derive=True)  # 288 products for each number
    assert table.derives
    plan, same = (select_ranks(table, 4000, derive=derive) for derive in (True, False))
    assert plan == same
