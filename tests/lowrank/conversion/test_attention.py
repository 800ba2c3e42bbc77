"""Opened attention against PyTorch's and torchvision's own; what it refuses, and how it is undone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from references import TOLERANCE, random_tensor
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.swin_transformer import PatchMergingV2, ShiftedWindowAttention, SwinTransformerBlockV2

import lowrank
from lowrank import ASI, HOSVD, SVD, WASI, ConversionError, SettingError, Vanilla
from lowrank.layers.attention import IN_PROJECTION

METHODS = [Vanilla(), HOSVD(1.0), SVD(1.0), ASI(999)]
EVERYWHERE = pytest.mark.parametrize("lean", [False, True])


def random_vectors(model):
    """Scales, shifts and biases that are not the ones and zeros of the start."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return model.double().train()


def vit():
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 12, "mlp_dim": 20}
    return random_vectors(VisionTransformer(**sizes, num_classes=5))


def swin(window=(5, 3)):
    """Windows that are not square, that do not divide the map, and larger than the map in the second stage."""
    torch.manual_seed(0)
    sizes = {"patch_size": [2, 2], "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": list(window)}
    return random_vectors(SwinTransformer(**sizes, stochastic_depth_prob=0.0, num_classes=5))


def swin_of_whole_windows():
    """Maps of 8 x 8 and 4 x 4 that need no padding, as those of Swin-T at 224 x 224."""
    return swin((4, 2))


NETWORKS = {"vit": vit, "swin": swin, "swin of whole windows": swin_of_whole_windows}


def batch():
    return random_tensor(3, 3, 16, 16, seed=1), torch.arange(3)


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def gradients(model):
    model.zero_grad()
    loss_of(model, batch()).backward()
    return {name.replace(f"{IN_PROJECTION}.", "in_proj_"): p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.tag)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("fuse", [False, True])
def test_whole_transformers_at_full_rank_have_autograds_gradients(network, method, fuse):
    stock = NETWORKS[network]()
    model = copy.deepcopy(stock)
    lowrank.open_attention(model)
    names = lowrank.trailing_layers(model, "all", "linear")
    lowrank.convert(model, names, method, fuse)
    torch.testing.assert_close(gradients(model), gradients(stock), rtol=1e-9, atol=1e-9)
    assert all(layer._lowrank.formula_bytes for layer in lowrank.converted_layers(model)), "every layer was called"


@pytest.mark.parametrize("network", NETWORKS)
def test_names_keys_and_parameters_stay_and_revert_gives_the_stock_classes(network):
    stock = NETWORKS[network]()
    model = copy.deepcopy(stock)
    parameters = [*model.parameters()]
    lowrank.convert(model, lowrank.trailing_layers(model, 2, "linear", "mlp"), HOSVD(0.8))
    assert list(model.state_dict()) == list(stock.state_dict())
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    loaded = NETWORKS[network]()
    torch.nn.init.zeros_(next(loaded.parameters()))
    lowrank.open_attention(loaded)
    loaded.load_state_dict(stock.state_dict())
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in loaded.state_dict().items())
    for opened in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(gradients(opened), gradients(model), **TOLERANCE)
    lowrank.revert(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in stock.named_parameters()]
    assert [vars(module).keys() for module in model.modules()] == [vars(module).keys() for module in stock.modules()]
    torch.testing.assert_close(gradients(model), gradients(stock), **TOLERANCE)


def test_parts_of_a_transformer_are_chosen_by_name():
    for network, attention in (("vit", 2 * 2), ("swin", 4 * 2)):
        model = NETWORKS[network]()
        with pytest.raises(SettingError, match="open_attention"):
            lowrank.trailing_layers(model, "all", "linear", "attention")
        mlp = lowrank.trailing_layers(model, "all", "linear", "mlp")
        others = lowrank.trailing_layers(model, "all", "linear")
        lowrank.open_attention(model)
        opened = lowrank.trailing_layers(model, "all", "linear", "attention")
        assert len(opened) == attention
        assert set(others) | set(opened) == set(lowrank.trailing_layers(model, "all", "linear"))
        assert len(mlp) == len(opened) == len(lowrank.trailing_layers(model, "all", "linear", "mlp"))
    with pytest.raises(SettingError, match="part is 'head'; allowed: all, mlp, attention"):
        lowrank.trailing_layers(model, 1, "linear", "head")


@pytest.mark.parametrize("name", ["features.1.0.attn.qkv", "features.1.1.attn.proj"])
def test_a_projection_that_nobody_calls_is_refused(name):
    model = swin()
    with pytest.raises(ConversionError, match=f"{name}.*never calls it.*open_attention"):
        lowrank.convert(model, [name], HOSVD(0.8))
    lowrank.open_attention(model)
    lowrank.convert(model, [name], HOSVD(0.8))


def attention_of(**options):
    torch.manual_seed(0)
    return nn.MultiheadAttention(8, 2, **options).double()


def outputs(layer, x, **options):
    leaf = x.clone().requires_grad_(True)
    y, weights = layer(leaf, leaf, leaf, **options)
    y.backward(random_tensor(*y.shape, seed=4))
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    return y, leaf.grad, weights, *sorted(grads, key=lambda grad: tuple(grad.shape))


BOOLEAN = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]
MASKS = {
    "none": {},
    "causal": {"attn_mask": BOOLEAN},
    "is_causal": {"attn_mask": BOOLEAN, "is_causal": True},
    "added": {"attn_mask": random_tensor(5, 5, seed=8)},
    "per head": {"attn_mask": random_tensor(6, 5, 5, seed=8)},
    "padding": {"key_padding_mask": PADDING},
    "both": {"attn_mask": BOOLEAN, "key_padding_mask": PADDING},
}


@EVERYWHERE
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_layouts_and_attention_weights(mask, batch_first, need_weights, lean):
    stock = attention_of(batch_first=batch_first)
    model = nn.Sequential(copy.deepcopy(stock))
    lowrank.open_attention(model, lean)
    x = random_tensor(3, 5, 8) if batch_first else random_tensor(5, 3, 8)
    options = {**MASKS[mask], "need_weights": need_weights}
    results, expected = outputs(model[0], x, **options), outputs(stock, x, **options)
    torch.testing.assert_close(results, expected, **TOLERANCE)


def test_other_ways_to_call_it_work_as_before_or_are_refused():
    stock = attention_of(batch_first=True)
    model = nn.Sequential(copy.deepcopy(stock))
    lowrank.open_attention(model)
    x, memory = random_tensor(3, 5, 8), random_tensor(3, 4, 8, seed=1)
    torch.testing.assert_close(model[0](x, memory, memory), stock(x, memory, memory), **TOLERANCE)
    torch.testing.assert_close(model[0](x[0], x[0], x[0]), stock(x[0], x[0], x[0]), **TOLERANCE)
    lowrank.convert(model, ["0.out_proj"], HOSVD(0.8))
    with pytest.raises(ConversionError, match="self-attention on batches with need_weights=False"):
        model[0](x, memory, memory)
    model[0](x, x, x, need_weights=False)


@pytest.mark.parametrize("opened", [False, True])
def test_causal_without_a_mask_is_refused_as_in_pytorch(opened):
    model, x = nn.Sequential(attention_of(batch_first=True)), random_tensor(3, 5, 8)
    if opened:
        lowrank.open_attention(model)
    with pytest.raises(RuntimeError, match="is_causal"):
        model[0](x, x, x, need_weights=False, is_causal=True)


@pytest.mark.parametrize("batch_first", [True, False])
def test_one_seed_drops_the_same_behind_it(batch_first):
    """Which depends on where the output's entries lie in memory."""
    torch.manual_seed(0)
    stock = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=batch_first).double()
    stock.self_attn.dropout = 0.0
    model, x = lowrank.convert(copy.deepcopy(stock), ["linear1"], Vanilla()), random_tensor(2, 5, 8)
    found = []
    for network in (stock, model):
        y, _ = network.self_attn(x, x, x, need_weights=False)
        torch.manual_seed(0)
        found.append((network(x), y.stride()))
    torch.testing.assert_close(found[1][0], found[0][0], **TOLERANCE)
    assert found[1][1] == found[0][1]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_pytorchs_encoder_infers_with_padding_as_ever(grad, nested):
    """It takes fast ways of its own there, which read the weights, and may nest the tokens that are no padding."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    stock = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    model, x = lowrank.convert(copy.deepcopy(stock), ["layers.0.linear1"], Vanilla()), random_tensor(3, 5, 8)
    with torch.set_grad_enabled(grad):
        found, expected = (network(x, src_key_padding_mask=PADDING) for network in (model, stock))
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_attention_with_inputs_of_several_sizes_stays_as_it_is():
    model = nn.Sequential(
        attention_of(kdim=4, vdim=6), attention_of(add_bias_kv=True), attention_of(add_zero_attn=True)
    )
    model.append(SwinTransformerBlockV2(8, 2, [4, 4], [0, 0]))
    before = [type(module) for module in model.modules()]
    assert lowrank.open_attention(model) == []
    assert [type(module) for module in model.modules()] == before


@EVERYWHERE
def test_dropout_is_drawn_in_training_alone(lean):
    model = nn.Sequential(
        attention_of(dropout=0.5, batch_first=True), ShiftedWindowAttention(8, [3, 3], [1, 1], 2, dropout=0.4)
    )
    lowrank.open_attention(model.double(), lean)
    x = random_tensor(4, 6, 8)
    for layer, call in (
        (model[0], lambda m: m(x, x, x, need_weights=False)[0]),
        (model[1], lambda m: m(x.view(1, 4, 6, 8))),
    ):
        layer.train()
        assert not torch.equal(call(layer), call(layer))
        layer.eval()
        assert torch.equal(call(layer), call(layer))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_pytorchs_encoder_layer_trains_and_infers(activation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=activation, batch_first=True).double()
    stock = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = copy.deepcopy(stock)
    lowrank.open_attention(model)
    names = lowrank.trailing_layers(model, "all", "linear")
    assert len(names) == 2 * 4
    lowrank.convert(model, names, WASI(energy=1, ranks=999))
    x = random_tensor(3, 5, 8)
    torch.testing.assert_close(model(x), stock(x), **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), stock.eval()(x), **TOLERANCE)
    assert list(model.state_dict()) == list(stock.state_dict())


def test_swin_v2_trains_as_ever():
    """Its attention cannot be opened, and its position network works in place on the output of a linear layer."""
    torch.manual_seed(0)
    kinds = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2, "stochastic_depth_prob": 0.0}
    stock = random_vectors(SwinTransformer([4, 4], 8, [2, 2], [2, 4], [2, 2], num_classes=5, **kinds))
    model = lowrank.convert(copy.deepcopy(stock), ["head"], Vanilla())
    found, expected = gradients(model), gradients(stock)
    assert found.keys() == expected.keys()
    trained = [name for name, gradient in expected.items() if gradient is not None]
    assert len(trained) > 50
    for name in trained:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-9)


def test_perplexity_and_ranks_of_every_layer():
    for network in NETWORKS.values():
        model = network()
        lowrank.open_attention(model)
        names = lowrank.trailing_layers(model, "all", "linear")
        table = lowrank.measure_perplexity(model, names, loss_of, batch(), energies=(0.5, 0.9, 1.0))
        assert table.names == names
        assert max(row.perplexity[-1] for row in table.layers) < 1e-9
        budget = sum(row.nbytes[0] for row in table.layers) * 2
        plan = lowrank.select_ranks(table, budget)
        lowrank.convert(model, names, ASI(ranks=plan))
        loss_of(model, batch()).backward()
        kept = sum(layer._lowrank.formula_bytes for layer in lowrank.converted_layers(model))
        assert 0 < kept <= plan.nbytes <= budget  # a rank above what the other modes allow is cut
