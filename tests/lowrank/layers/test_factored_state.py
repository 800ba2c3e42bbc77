"""State of a layer whose weight is two factors: a stock state dict, and copies and reloads that train on."""

import copy
import io
import pickle

import pytest
import torch
from factored_cases import FULL, METHODS, NAMES, assert_same_weights, data, loss_of, network, product, train
from references import DEVICE
from torch import nn

import lowrank
from lowrank import WASI, WSI
from lowrank.layers.factor_pair import factor_pairs
from lowrank.layers.training_state import is_basis

LOW = WASI(energy=0.7, ranks=[2, 2, 3])


def converted(seed=1, method=LOW, **options):
    return lowrank.convert(network(seed=seed, **options), NAMES, method)


def test_the_state_dict_is_the_stock_one():
    stock, model = network(), converted(method=WSI(energy=1))
    for prefix in ("", "encoder."):
        ours, expected = model.state_dict(prefix=prefix), stock.state_dict(prefix=prefix)
        assert list(ours) == list(expected)
        assert ours._metadata == expected._metadata
        assert [(t.shape, t.dtype, t.requires_grad, type(t)) for t in ours.values()] == [
            (t.shape, t.dtype, t.requires_grad, type(t)) for t in expected.values()
        ]
    assert_same_weights(model, stock)
    assert list(model[0].state_dict()) == ["weight", "bias"]
    assert model.state_dict(keep_vars=True)["0.weight"].requires_grad


def test_the_stock_model_loads_it_and_computes_the_same():
    model, stock = converted(), network(seed=3)
    stock.load_state_dict(model.state_dict())
    x, _ = data((4, 5, 6))
    torch.testing.assert_close(stock(x), model(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loading_its_own_state_dict_loses_nothing(dtype, assign):
    model, other = converted(), converted().to(dtype)
    train(model, lowrank.SGD(model.parameters(), 0.5), (4, 5, 6), 3).to(dtype)
    before = [*other.parameters()]
    ranks = [model[0].rank, model[2].rank]
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    assert str(other.load_state_dict(saved, assign=assign)) == "<All keys matched successfully>"
    assert [other[0].rank, other[2].rank] == ranks
    assert_same_weights(other, model, 20 * torch.finfo(dtype).eps)
    assert [a is b for a, b in zip(before, other.parameters(), strict=True)] == [not assign] * len(before)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in other.parameters())


def test_a_weight_of_higher_rank_is_taken_apart_at_the_methods_energy():
    model, stock = converted(), network(seed=3)
    parameters = [*model.parameters()]
    loss_of(model, *data((4, 5, 6))).backward()
    model.load_state_dict(stock.state_dict())
    assert_same_weights(model, converted(seed=3), 1e-12)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    train(model, lowrank.SGD(model.parameters(), 0.05), (4, 5, 6), 2)


@pytest.mark.parametrize("assign", [False, True])
def test_factors_of_any_rank_are_loaded_as_they_are(assign):
    model, small = converted(), converted(seed=2, method=WSI(energy=0.3))
    assert small[0].rank < model[0].rank
    loss_of(model, *data((4, 5, 6))).backward()
    saved = {key: value.clone() for key, value in small.state_dict().items() if key != "0.weight"}
    saved |= {f"0.{name}": getattr(small[0], name).detach().clone() for name in ("left", "right")}
    model.load_state_dict(saved, assign=assign)
    assert torch.equal(model[0].left, small[0].left)
    assert torch.equal(model[0].right, small[0].right)
    assert model[0].left.grad is None or model[0].left.grad.shape == model[0].left.shape
    train(model, lowrank.SGD(model.parameters(), 0.05), (4, 5, 6), 2)


def test_what_does_not_fit_is_reported_as_ever_and_changes_no_weight():
    model, untouched = converted(), converted()
    stock = network(inputs=5)
    with pytest.raises(RuntimeError) as ours:
        model.load_state_dict(stock.state_dict())
    with pytest.raises(RuntimeError) as expected:
        network().load_state_dict(stock.state_dict())
    assert str(ours.value) == str(expected.value)
    torch.testing.assert_close(product(model[0]), product(untouched[0]), rtol=0, atol=0)

    given = network().state_dict()
    del given["0.weight"], given["2.weight"]
    given["0.other"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as ours:
        model.load_state_dict(given)
    with pytest.raises(RuntimeError) as expected:
        network().load_state_dict(given)
    assert str(ours.value) == str(expected.value)
    found = model.load_state_dict(given, strict=False)
    assert found.missing_keys == ["0.weight", "2.weight"]
    assert found.unexpected_keys == ["0.other"]
    torch.testing.assert_close(product(model[0]), product(untouched[0]), rtol=0, atol=0)


def test_a_weight_that_is_not_finite_is_reported():
    model, given = converted(), network().state_dict()
    given["2.weight"][0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r'"2.weight".*NaN'):
        model.load_state_dict(given)


def test_hooks_see_the_dense_weight():
    model, seen = converted(), []

    def rename(module, state_dict, prefix, *_):
        seen.append([key for key in state_dict if key.startswith(prefix)])
        state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel")

    model[0].register_load_state_dict_pre_hook(rename)
    given = {key.replace("0.weight", "0.kernel"): value for key, value in network(seed=3).state_dict().items()}
    model.load_state_dict(given)
    assert seen == [["0.kernel", "0.bias"]]
    assert_same_weights(model, converted(seed=3), 1e-12)


@pytest.mark.parametrize("method", [WASI(energy=0.7, ranks=[2, 2, 3]), WSI(energy=0.7)], ids=lambda m: m.tag)
def test_a_run_that_is_saved_and_loaded_goes_on_as_if_it_had_not_been(method):
    def start():
        model = converted(method=method)
        return model, lowrank.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)

    model, optimizer = start()
    train(model, optimizer, (4, 5, 6), 3)
    file = io.BytesIO()
    bases = lowrank.training_state(model)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "bases": bases}, file)
    train(model, optimizer, (4, 5, 6), 3, start=3)
    for exactly in (True, False):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other, other_optimizer = start()
        other.load_state_dict(saved["model"])
        other_optimizer.load_state_dict(saved["optimizer"])
        factors = ("left", "right") if not exactly else ()
        kept = {key: value for key, value in saved["bases"].items() if key.rpartition(".")[2] not in factors}
        lowrank.load_training_state(other, kept)
        train(other, other_optimizer, (4, 5, 6), 3, start=3)
        assert_same_weights(model, other, 0 if exactly else 1e-12)


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_assigning(model):
    other = copy.deepcopy(model)
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    return other


def by_emptying(model):
    other = copy.deepcopy(model).to("meta").to_empty(device=DEVICE)
    with torch.no_grad():
        for own, value in zip(other.parameters(), model.parameters(), strict=True):
            own.copy_(value)
    return other


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
    "assign": by_assigning,
    "to_empty": by_emptying,
}


@pytest.mark.parametrize("duplicate", WAYS.values(), ids=WAYS)
def test_a_copy_steps_its_own_weights_as_the_original_does(duplicate):
    model = converted(method=WSI(energy=0.7))
    twin, untouched = duplicate(model), copy.deepcopy(model)
    # Ahead of any forward pass, as where gradients are copied in from a replica.
    pairs = factor_pairs([*twin.parameters()])
    assert [(pair.left, pair.right) for pair in pairs] == [(twin[int(n)].left, twin[int(n)].right) for n in NAMES]
    train(twin, lowrank.SGD(twin.parameters(), 0.05, momentum=0.9), (4, 5, 6), 3)
    assert_same_weights(model, untouched, 0)
    train(model, lowrank.SGD(model.parameters(), 0.05, momentum=0.9), (4, 5, 6), 3)
    assert_same_weights(model, twin, 1e-12)


def test_parameters_that_are_set_by_hand_are_factors_from_the_next_forward_pass_on():
    model, twin = converted(), converted()
    for name in ("left", "right"):
        setattr(model[0], name, nn.Parameter(getattr(model[0], name).detach().clone()))
    for one in (model, twin):
        train(one, lowrank.SGD(one.parameters(), 0.05), (4, 5, 6), 2)
    assert_same_weights(model, twin, 0)


def test_parameters_load_with_weights_only():
    file = io.BytesIO()
    torch.save([*converted().parameters()], file)
    file.seek(0)
    assert len(torch.load(file, weights_only=True)) == len([*converted().parameters()])


def test_starting_afresh_gives_the_nearest_weight_of_its_rank():
    model, stock = converted(), nn.Linear(6, 9).double()
    torch.manual_seed(5)
    model[0].reset_parameters()
    torch.manual_seed(5)
    stock.reset_parameters()
    rank = model[0].rank
    u, s, v = torch.linalg.svd(stock.weight.detach(), full_matrices=False)
    torch.testing.assert_close(product(model[0]), u[:, :rank] * s[:rank] @ v[:rank])
    assert torch.equal(model[0].bias, stock.bias)


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda method: method.tag)
def test_revert_gives_the_dense_layers(method):
    model = converted(method=method)
    x, _ = data((4, 5, 6))
    expected = model(x)
    assert lowrank.revert(model) is model
    assert [type(layer) for layer in model] == [type(layer) for layer in network()]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in network().named_parameters()]
    torch.testing.assert_close(model(x), expected)
    assert_same_weights(model, network())
    assert model[0].weight.requires_grad


def test_a_layer_of_full_rank_in_a_model_of_one_layer():
    layer = lowrank.convert(nn.Sequential(nn.Linear(3, 3)), ["0"], WASI(energy=1, ranks=FULL))[0]
    layer.load_state_dict(nn.Linear(3, 3).state_dict())
    assert layer.rank == 3


def test_what_differs_between_processes_is_what_is_no_parameter():
    model = train(converted(), lowrank.SGD(converted().parameters(), 0.05), (4, 5, 6), 1)
    state, parameters = lowrank.training_state(model), dict(model.named_parameters())
    bases = {key for key in state if is_basis(key)}
    assert bases
    assert state.keys() - bases == {key for key in parameters if key.endswith(("left", "right"))}


def averaged_in_place(model, other):
    """As timm's averages do."""
    with torch.no_grad():
        for mean, value in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            mean.lerp_(value, 0.1)


def clamped(model, other):
    with torch.no_grad():
        model[0].weight.clamp_(-0.1, 0.1)


@pytest.mark.parametrize("write", [averaged_in_place, clamped])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_written_into_the_product_is_not_lost_without_a_word(write, training):
    model, other = converted(method=WSI(energy=1)).train(training), converted(seed=2, method=WSI(energy=1))
    x, _ = data((4, 5, 6))
    write(model, other)
    write(model, other)  # what was handed out before counts as well
    model.state_dict()
    with torch.set_grad_enabled(training), pytest.raises(lowrank.ChangedError, match=r"layer '0'.*in place"):
        model(x)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x), other(x))


def test_a_state_dict_that_is_filled_in_place_and_loaded_is_as_ever():
    """As distributed checkpoints do."""
    model, other = converted(method=WSI(energy=1)), converted(seed=2, method=WSI(energy=1))
    state = model.state_dict()
    with torch.no_grad():
        for own, value in zip(state.values(), other.state_dict().values(), strict=True):
            own.copy_(value)
    model.load_state_dict(state)
    x, _ = data((4, 5, 6))
    torch.testing.assert_close(model(x), other(x))
    held = model[0]._lowrank.handed_out
    assert held is None
    model.state_dict()
    assert model[0]._lowrank.handed_out._changes._like.untyped_storage().nbytes() == 0, (
        "nothing is held of what is handed out"
    )


def test_other_data_for_the_product_are_refused_where_they_are_given():
    """As whoever merges adapters into weights gives them."""
    model = converted()
    weight = model[0].weight
    assert isinstance(weight, torch.Tensor)
    assert weight.grad_fn is not None
    assert type(weight * 2) is type(weight.detach()) is torch.Tensor
    torch.testing.assert_close(pickle.loads(pickle.dumps(weight.detach())), product(model[0]), rtol=0, atol=0)
    with pytest.raises(lowrank.ChangedError, match="other data"):
        model[0].weight.data = torch.zeros_like(weight)
    with pytest.raises(lowrank.ChangedError, match="other data"):
        model[0].weight.data += 1
    model[0].load_state_dict(model[0].state_dict())
    model[0].weight.data.mul_(2)
    with pytest.raises(lowrank.ChangedError, match="in place"):
        model(data((4, 5, 6))[0])
