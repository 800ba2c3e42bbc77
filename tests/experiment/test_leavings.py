"""What a run leaves beside its record: the ranks and the energy that its layers keep, and curves."""

from __future__ import annotations

import copy
import json
import math

import pytest
import tensorly
import torch
from matplotlib.figure import Figure
from tensorly.decomposition import tucker
from torch import nn

import lowrank
from experiment.leavings import as_text, curves, memory_of, ranks_of


def _loss(network, x):
    return network(x).square().mean()


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)), torch.randn(4, 3, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("method", [lowrank.HOSVD(0.8), lowrank.ASI(ranks=(2, 3, 4, 4), algorithm="published")])
def test_ranks_and_energy_are_those_of_the_reference(method):
    network, x = _network()
    inputs = network[:2](x).detach()
    lowrank.convert(network, ["2"], method)
    for _ in range(400):  # until the bases of ASI are the subspaces
        _loss(network, x).backward()
    costs = lowrank.account(network, ["2"], x)
    (layer,) = ranks_of(network, _loss, x, costs, method)["layers"]
    assert layer["shape"] == list(inputs.shape)
    assert layer["energy"] == (0.8 if isinstance(method, lowrank.HOSVD) else None)
    core, factors = tucker(inputs.double().numpy(), rank=layer["ranks"], init="svd", n_iter_max=0)
    rest = inputs.double().numpy() - tensorly.tucker_to_tensor((core, factors))
    best = 1 - (rest**2).sum() / inputs.double().square().sum().item()
    assert layer["captured"] == pytest.approx(best, abs=0.005)
    if isinstance(method, lowrank.ASI):
        assert layer["ranks"] == [2, 3, 4, 4]
    assert layer["activation_bytes"] == costs["2"].activation_bytes


def test_energies_are_those_that_a_budget_chose():
    network, x = _network()
    table = lowrank.measure_perplexity(network, ["0", "2"], _loss, x)
    plan = lowrank.select_ranks(table, max(map(sum, zip(*(layer.nbytes for layer in table.layers), strict=True))))
    method = lowrank.ASI(ranks=plan)
    lowrank.convert(network, ["0", "2"], method)
    layers = ranks_of(network, _loss, x, lowrank.account(network, ["0", "2"], x), method)["layers"]
    assert {layer["name"]: layer["energy"] for layer in layers} == plan.energies


def test_memory_is_told_by_module_and_what_is_no_number_is_null():
    network, x = _network()
    content = memory_of(lowrank.explain(network, _loss, x))
    assert content["kept_bytes"] == lowrank.saved_bytes(network, _loss, x)
    assert json.loads(as_text(content)) == json.loads(json.dumps(content))
    assert json.loads(as_text({"rows": [{"share": math.nan}, [1, "a"]]})) == {"rows": [{"share": None}, [1, "a"]]}


def test_a_layer_whose_input_follows_from_anothers_has_no_ranks_but_that_ones_name():
    torch.manual_seed(0)
    wide = [nn.Conv2d(4, 24, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.ReLU()]
    network, x = nn.Sequential(nn.Conv2d(3, 4, 3), *wide, nn.Conv2d(24, 4, 1)), torch.randn(4, 3, 8, 8)
    names = ["1", "3", "5"]
    table = lowrank.measure_perplexity(network, names, _loss, x, derive=True)
    budget = next(row for row in table.layers if row.name == "1").nbytes[2]
    method = lowrank.ASI(ranks=lowrank.select_ranks(table, budget, derive=True), derive=True)
    lowrank.freeze_before(network, names)
    lowrank.convert(network, names, method, everywhere=True)
    _loss(network, x).backward()
    ahead, *behind = ranks_of(network, _loss, x, lowrank.account(network, names, x), method)["layers"]
    assert ahead["ranks"] is not None
    assert "derived" not in ahead
    for layer in behind:
        assert (layer["derived"], layer["activation_bytes"]) == ("1", 0)
        assert {layer[key] for key in ("ranks", "energy", "captured", "storage")} == {None}


def test_inputs_given_by_keyword_are_told_as_those_given_by_place():
    class Named(nn.Sequential):
        def forward(self, x):
            for layer in self:
                x = layer(input=x)
            return x

    network, x = _network()
    told = []
    for one in (network, Named(*copy.deepcopy(network))):
        lowrank.convert(one, ["2"], lowrank.HOSVD(0.8))
        told.append(ranks_of(one, _loss, x, lowrank.account(one, ["2"], x)))
    assert told[0] == told[1]


@pytest.mark.parametrize("shares", [[1.0], [0.0], [0.0, 1.0]])
def test_no_curve_of_shares_has_an_axis_far_beyond_what_they_can_be(shares, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *words, **options: drawn.append(figure))
    beside = {"val_loss": 0.1, "activation_bytes": 1}
    rows = [{"epoch": place, "miou": share, **beside} for place, share in enumerate(shares)]
    curves(rows, "a run")
    low, high = drawn[0].axes[1].get_ylim()
    assert -2 <= low < 100 * min(shares) <= 100 * max(shares) < high <= 102
