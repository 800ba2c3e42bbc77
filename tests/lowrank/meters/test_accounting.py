from decimal import ROUND_HALF_UP, Decimal

import pytest
import torch
import torchvision
from references import TwoConvolutions, cross_entropy, labelled_batch, random_tensor
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import lowrank
from lowrank import ASI, HOSVD, SVD, ConversionError, GradientFilter, LayerCost, Vanilla

NAMES = ["first", "second", "head"]


def mebibytes(nbytes):
    """Two decimals, a five rounded up: 30.625 is published as 30.63."""
    return float((Decimal(nbytes) / 2**20).quantize(Decimal("0.01"), ROUND_HALF_UP))


def mobilenet(method=None, count="all"):
    """Layers of torchvision's MobileNetV2 at batch 128 and 224 x 224, where nothing is computed."""
    with torch.device("meta"):
        model, x = torchvision.models.mobilenet_v2(weights=None), torch.empty(128, 3, 224, 224)
    names = lowrank.trailing_layers(model, count)
    if method is not None:
        lowrank.convert(model, names, method)
    return lowrank.account(model, names, x)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "published"), [(2, 30.63), (4, 57.42), ("all", 3303.67)])
def test_vanilla_memory_of_mobilenet_is_the_published_one(count, published):
    assert mebibytes(mobilenet(count=count).total.activation_bytes) == published


@pytest.mark.slow
@pytest.mark.parametrize(("patch", "count", "published"), [(2, 2, 10.00), (2, 4, 18.75), (7, 2, 0.63), (7, 4, 1.17)])
def test_gradient_filter_memory_of_mobilenet_is_the_published_one(patch, count, published):
    assert mebibytes(mobilenet(GradientFilter(patch), count).total.activation_bytes) == published


def test_the_convolutions_of_mobilenet_take_the_published_number_of_multiplications():
    with torch.device("meta"):
        model, x = torchvision.models.mobilenet_v2(weights=None), torch.empty(1, 3, 224, 224)
    names = lowrank.trailing_layers(model, "all") + lowrank.trailing_layers(model, "all", kind="linear")
    model.requires_grad_(False)  # then the forward pass is all there is
    assert lowrank.account(model, names, x).total.flops == 2 * 300_774_272


def counted_flops(model, batch):
    with FlopCounterMode(display=False) as counter:
        cross_entropy(model, batch).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("frozen", [[], ["first"], ["first", "second"]])
def test_vanilla_flops_are_those_that_pytorch_counts(frozen, convert):
    model, batch = TwoConvolutions(), labelled_batch()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    expected = counted_flops(model, batch)
    if convert:
        lowrank.convert(model, NAMES, Vanilla())
    assert lowrank.account(model, NAMES, batch).total.flops == expected


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 2, 3, 6)])
def test_linear_flops_are_those_that_pytorch_counts(shape):
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 7))
    x = random_tensor(*shape, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(x).square().sum().backward()
    assert lowrank.account(model, ["0", "2"], x).total.flops == counter.get_total_flops()


def test_grouped_flops_are_those_that_pytorch_counts_where_it_counts_groups():
    # PyTorch's formula leaves groups out of the weight gradient, which therefore is frozen here.
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 3, groups=2))
    model.requires_grad_(False)
    x = random_tensor(2, 4, 9, 9, dtype=torch.float32).requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        model(x).square().sum().backward()
    assert lowrank.account(model, ["0", "1", "2"], x).total.flops == counter.get_total_flops()


def test_a_weight_gradient_takes_as_many_flops_as_the_forward_pass():
    model = nn.Sequential(nn.Conv2d(6, 12, 3, groups=6, stride=2))
    x = torch.randn(2, 6, 9, 8)
    per_pass = 2 * (2 * 12 * 4 * 3) * 9
    assert lowrank.account(model, ["0"], x).total.flops == 2 * per_pass
    assert lowrank.account(model, ["0"], x.requires_grad_(True)).total.flops == 3 * per_pass


def test_a_frozen_layer_keeps_nothing():
    model, batch = TwoConvolutions(), labelled_batch()
    lowrank.freeze_before(model, ["second"])
    cost = lowrank.account(model, NAMES, batch)
    assert [cost[name].activation_bytes > 0 for name in NAMES] == [False, True, True]
    assert cost["first"].flops == 2 * (4 * 4 * 8 * 8) * 3 * 9  # forward only: the batch needs no gradient


def test_the_total_is_the_sum_over_the_layers():
    cost = lowrank.account(TwoConvolutions(), NAMES, labelled_batch())
    assert list(cost) == NAMES
    assert len(cost) == 3
    for field in ("activation_bytes", "flops_paper", "flops"):
        assert getattr(cost.total, field) == sum(getattr(cost[name], field) for name in NAMES)
    assert cost["first"] != cost["second"]


@pytest.mark.parametrize("method", [SVD(0.8), HOSVD(0.8), ASI(2), GradientFilter(2)])
def test_after_conversion_the_bytes_are_those_that_the_layers_keep(method):
    """A mode that is left whole has no factor, so none is counted, as the published formula would."""
    model, batch = TwoConvolutions(), labelled_batch()
    lowrank.convert(model, NAMES[:2], method)
    cost = lowrank.account(model, NAMES[:2], batch)
    cross_entropy(model, batch)
    for name in NAMES[:2]:
        assert cost[name].activation_bytes == model.get_submodule(name)._lowrank.kept_bytes > 0


@pytest.mark.parametrize("method", [None, ASI(2), HOSVD(0.8)])
def test_accounting_leaves_the_model_as_it_was(method):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 3))
    if method is not None:
        lowrank.convert(model, ["0", "3"], method)
    batch = labelled_batch()[0]
    model(batch).square().sum().backward()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    grads = [parameter.grad for parameter in model.parameters()]
    random_state = torch.get_rng_state()
    lowrank.account(model, ["0", "3"], batch)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_is_called_twice_costs_twice():
    shared = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    once = lowrank.account(nn.Sequential(shared), ["0"], x).total
    twice = lowrank.account(nn.Sequential(shared, nn.Sequential(shared)), ["0"], x).total
    assert twice.activation_bytes == 2 * once.activation_bytes
    assert twice.flops_paper == 2 * once.flops_paper


def test_an_input_without_a_batch_is_a_batch_of_one():
    for layer, x in ((nn.Conv2d(3, 4, 3), torch.randn(3, 8, 8)), (nn.Linear(8, 4), torch.randn(8))):
        model = nn.Sequential(layer)
        assert lowrank.account(model, ["0"], x) == lowrank.account(model, ["0"], x[None])


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2, 3, 8, 8),
        (torch.ones(2, 3, 8, 8), torch.ones(2)),
        [torch.ones(2, 3, 8, 8)],
        {"x": torch.ones(2, 3, 8, 8)},
    ],
    ids=["tensor", "tuple", "list", "mapping"],
)
def test_a_batch_is_a_tensor_a_sequence_or_keywords(batch):
    assert lowrank.account(TwoConvolutions(), ["first"], batch).total.activation_bytes == 4 * 2 * 3 * 8 * 8


def test_the_call_of_the_model_can_be_given():
    model = TwoConvolutions()
    cost = lowrank.account(model, ["first"], {"image": [torch.ones(2, 3, 8, 8)]}, lambda m, b: m(b["image"][0]))
    assert cost.total.activation_bytes == 4 * 2 * 3 * 8 * 8


@pytest.mark.parametrize(
    ("names", "message"), [(["frist"], "did you mean 'first'"), ([""], "TwoConvolutions"), ([], "no layer")]
)
def test_a_layer_that_cannot_be_accounted_for_is_named(names, message):
    with pytest.raises(ConversionError, match=message):
        lowrank.account(TwoConvolutions(), names, labelled_batch())


def test_a_layer_that_is_not_called_is_named():
    model = TwoConvolutions()
    model.spare = nn.Linear(2, 2)
    with pytest.raises(ConversionError, match="'spare'"):
        lowrank.account(model, ["first", "spare"], labelled_batch())


def test_costs_add_up():
    assert LayerCost(1, 2, 3) + LayerCost(10, 20, 30) == LayerCost(11, 22, 33)


STORED = ("input", "float32", "bfloat16", "int8")


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("method", ["vanilla", "asi", "hosvd", "svd", "fixed bases", "wasi"])
def test_bytes_by_formula_are_those_that_are_kept(method, storage, autocast):
    """Of each layer, in every storage and precision, autocast's too: behind a normalisation, that gives float32."""
    methods = {
        "vanilla": Vanilla,
        "asi": lambda: ASI(3, storage=storage),
        "hosvd": lambda: HOSVD(0.7, storage=storage),
        "svd": lambda: SVD(0.7, storage=storage),
        "fixed bases": lambda: lowrank.FixedBases(3, storage=storage),
        "wasi": lambda: lowrank.WASI(energy=0.9, ranks=3, storage=storage),
    }
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Softplus(), nn.ConvTranspose2d(8, 6, 2, 2), nn.Softplus()]
    layers += [nn.Flatten(2), nn.LayerNorm(256), nn.Linear(256, 6), nn.Softplus(), nn.Linear(6, 5)]
    model = nn.Sequential(*layers)
    names = ["6", "8"] if method == "wasi" else ["0", "2", "6", "8"]
    lowrank.convert(model, names, methods[method](), fuse=False, everywhere=True)
    batch = random_tensor(5, 3, 8, 8, dtype=torch.float32) + 1
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        account = lowrank.account(model, names, batch)
        model(batch)
    kept = [model.get_submodule(name)._lowrank.kept_bytes for name in names]
    assert [account[name].activation_bytes for name in names] == kept


@pytest.mark.parametrize(("within", "around"), [(False, False), (True, False), (False, True)])
def test_ranks_within_a_budget_keep_no_more_in_autocast(within, around):
    def loss_fn(net, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=within or around):
            return net(batch).float().square().mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 16), nn.Softplus(), nn.LayerNorm(16), nn.Linear(16, 8))
    batch, names = random_tensor(6, 20, 24, dtype=torch.float32), ["1", "4"]
    storages = ("input", "int8")
    measured = {"mode_energies": (0.5, 0.8, 0.9), "storages": storages}
    table = lowrank.measure_perplexity(model, names, loss_fn, batch, **measured)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        again = lowrank.measure_perplexity(model, names, loss_fn, batch, **measured)
    assert again == table
    plan = lowrank.select_ranks(table, 4000, storages=storages)
    lowrank.convert(model, names, ASI(plan), fuse=False, everywhere=True)
    loss_fn(model, batch)
    assert plan.nbytes == sum(model.get_submodule(name)._lowrank.kept_bytes for name in names)


COMPUTED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("method", [None, Vanilla(), ASI(2)])
@pytest.mark.parametrize("computed", COMPUTED)
def test_a_layer_whose_weight_is_computed_counts_as_one_whose_weight_is_not(computed, method):
    plain, own = (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)) for _ in range(2))
    COMPUTED[computed](own[2])
    for model in (plain, own):
        if method is not None:
            lowrank.convert(model, ["0", "2"], method)
    x = torch.randn(3, 7, 6)
    counted, wanted = (lowrank.account(model, ["0", "2"], x) for model in (own, plain))
    assert counted["2"] == wanted["2"]
    assert counted["2"].activation_bytes
    for parameter in own[2].parameters():
        parameter.requires_grad_(False)
    assert lowrank.account(own, ["2"], x)["2"].activation_bytes == 0
