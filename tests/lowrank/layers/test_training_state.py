"""What methods carry from step to step: saved beside a stock state dict, loaded, copied, refused if damaged."""

import copy
import io
import pickle

import pytest
import torch
from layer_cases import BOTH, EVERY_CONV, assert_equal_states, conv_model, step, whole_state
from references import DEVICE, TwoConvolutions, labelled_batch, random_tensor
from torch import nn
from torch.optim.swa_utils import AveragedModel

import lowrank
from lowrank import ASI, HOSVD, StateError


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@BOTH
@pytest.mark.parametrize(
    "ranks",
    [(2, 2, 2, 2), (99, 2, 2, 2), (2, 99, 2, 2), (2, 2, 2, 99), (2, 2, 99, 99), (99, 2, 99, 99), (99, 99, 99, 99)],
)
def test_a_resumed_run_goes_on_bit_for_bit(algorithm, ranks):
    method = ASI(ranks, algorithm=algorithm)
    model, x = conv_model(method), [random_tensor(5, 4, 7, 6, seed=seed) for seed in range(4)]
    step(model, x[0])
    step(model, x[1])
    saved = through_a_file({"model": model.state_dict(), "lowrank": lowrank.training_state(model)})
    resumed = conv_model(method)
    resumed.load_state_dict(saved["model"], strict=True)
    lowrank.load_training_state(resumed, saved["lowrank"])
    for batch in x[2:]:
        torch.testing.assert_close(step(resumed, batch), step(model, batch), rtol=0, atol=0)
    assert_equal_states(whole_state(resumed), whole_state(model))


@BOTH
def test_it_is_that_of_the_latest_step_by_layer_and_mode(algorithm):
    model, x = conv_model(ASI(2, algorithm=algorithm)), random_tensor(5, 4, 7, 6)
    assert lowrank.training_state(model) == {}
    step(model, x)
    first = lowrank.training_state(model)
    assert {key: tuple(basis.shape) for key, basis in first.items()} == {
        "0.bases.0": (5, 2),
        "0.bases.1": (4, 2),
        "0.bases.2": (7, 2),
        "0.bases.3": (6, 2),
    }
    step(model, random_tensor(5, 4, 7, 6, seed=1))
    second = lowrank.training_state(model)
    assert second.keys() == first.keys()
    assert not any(torch.equal(value, first[key]) for key, value in second.items())


@pytest.mark.parametrize("method", EVERY_CONV)
def test_the_state_dict_is_the_stock_one_at_any_time(method):
    """Keys, order, metadata and the very tensors; buffers and their number too."""
    stock, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        torch.randn(5, 3, 9, 9),
    )
    model = copy.deepcopy(stock)
    parameters = {id(parameter) for parameter in model.parameters()}
    for change in (lambda: lowrank.convert(model, ["0", "3"], method), lambda: model(x).sum().backward()):
        change()
        found, expected = model.state_dict(), stock.state_dict()
        assert list(found) == list(expected)
        assert found._metadata == expected._metadata
        assert {id(parameter) for parameter in model.parameters()} == parameters
        assert [name for name, _ in model.named_buffers()] == [name for name, _ in stock.named_buffers()]
        stock.load_state_dict(found, strict=True)


def test_a_stock_checkpoint_loads_strictly_and_leaves_the_bases_alone():
    stock, x = TwoConvolutions(), labelled_batch()[0]
    model = lowrank.convert(TwoConvolutions(), ["first", "second"], ASI(2))
    step(model, x)
    before = lowrank.training_state(model)
    assert model.load_state_dict(stock.state_dict(), strict=True).missing_keys == []
    assert_equal_states(lowrank.training_state(model), before)
    assert_equal_states(model.state_dict(), stock.state_dict())


def test_loading_nothing_starts_the_bases_afresh():
    model, x = conv_model(ASI(2)), random_tensor(5, 4, 7, 6)
    fresh = copy.deepcopy(model)
    step(model, random_tensor(5, 4, 7, 6, seed=1))
    lowrank.load_training_state(model, {})
    assert lowrank.training_state(model) == {}
    torch.testing.assert_close(step(model, x), step(fresh, x), rtol=0, atol=0)


def test_a_checkpoint_of_another_batch_size_loads_and_trains():
    model, other = conv_model(ASI(2)), conv_model(ASI(2))
    step(model, random_tensor(8, 4, 7, 6))
    step(other, random_tensor(5, 4, 7, 6))
    lowrank.load_training_state(other, lowrank.training_state(model))
    assert_equal_states(lowrank.training_state(other), lowrank.training_state(model))
    assert torch.isfinite(step(other, random_tensor(5, 4, 7, 6))["0.weight"]).all()


def test_neither_saving_nor_loading_ties_models_together():
    model, other = conv_model(ASI(2)), conv_model(ASI(2))
    step(model, random_tensor(5, 4, 7, 6))
    saved = lowrank.training_state(model)
    before = {key: value.clone() for key, value in saved.items()}
    lowrank.load_training_state(other, saved)
    for carried in (*bases_of_all(model), *bases_of_all(other)):
        carried.mul_(2)  # in place, as no method does
    assert_equal_states(saved, before)


def bases_of_all(model):
    return [basis for layer in lowrank.converted_layers(model) for basis in layer._lowrank.bases if basis is not None]


def test_saved_tensors_are_contiguous_and_need_no_gradient():
    """As safetensors demands; a basis from QR lies in columns."""
    model = conv_model(ASI(2))
    step(model, random_tensor(5, 4, 7, 6))
    state = lowrank.training_state(model)
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)


def test_safetensors_take_both_states(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = lowrank.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), ["0", "1"], ASI(2))
    step(model, torch.randn(4, 3, 9, 9))
    for name, state in (("model", model.state_dict()), ("lowrank", lowrank.training_state(model))):
        safetensors.save_file(state, tmp_path / name)
        assert_equal_states(safetensors.load_file(tmp_path / name, device=DEVICE), dict(state))


@pytest.mark.parametrize("refresh", [3, "energy"])
def test_it_says_when_held_bases_are_due(refresh):
    method = ASI((3, 2, 3, 2), refresh=refresh)
    model, resumed = conv_model(method), conv_model(method)
    batches = [random_tensor(5, 4, 7, 6, seed=s) for s in range(7)]
    for x in batches[:2]:
        step(model, x)
    lowrank.load_training_state(resumed, through_a_file(lowrank.training_state(model)))
    resumed.load_state_dict(model.state_dict())
    for x in batches[2:]:
        torch.testing.assert_close(step(resumed, x), step(model, x), rtol=0, atol=0)
        assert_equal_states(whole_state(resumed), whole_state(model))


def test_of_nested_models_it_names_layers_as_the_state_dict_does():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4)), "head": nn.Linear(4, 2)})
    lowrank.convert(model, ["body.0", "head"], ASI(1))
    model["head"](model["body"](torch.randn(6, 4))).sum().backward()
    names = {key.rpartition(".bases.")[0] for key in lowrank.training_state(model)}
    assert names == {"body.0", "head"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {f"module.{key}": value for key, value in state.items()}, r"'module\.0\.bases\.0'.*another"),
        (lambda state: {**state, "1.bases.0": torch.ones(2, 2)}, r"'1\.bases\.0'"),
        (lambda state: {**state, "0.bases.x": torch.ones(2, 2)}, r"'0\.bases\.x'"),
        (lambda state: {**state, "0.weight": torch.ones(2, 2)}, r"'0\.weight'"),
        (lambda state: {**state, "0.bases.1": [1.0]}, r"'0\.bases\.1' is a list"),
        (lambda state: {**state, 3: torch.ones(2, 2)}, "state 3 is a Tensor; allowed is a tensor by a name"),
    ],
    ids=["another prefix", "another layer", "no number", "a weight", "no tensor", "no name"],
)
def test_a_state_of_another_model_is_refused_and_changes_nothing(change, message):
    model = conv_model(ASI(2))
    step(model, random_tensor(5, 4, 7, 6))
    before = lowrank.training_state(model)
    with pytest.raises(StateError, match=message):
        lowrank.load_training_state(model, change({key: 2 * value for key, value in before.items()}))
    assert_equal_states(lowrank.training_state(model), before)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("method", EVERY_CONV)
def test_a_copy_goes_on_as_the_original_and_apart_from_it(copier, method):
    model, x = conv_model(method), [random_tensor(5, 4, 7, 6, seed=seed) for seed in range(3)]
    step(model, x[0])
    twin = copier(model)
    step(twin, x[2])  # must not move the original
    twin = copier(model)
    torch.testing.assert_close(step(twin, x[1]), step(model, x[1]), rtol=0, atol=0)
    assert_equal_states(whole_state(twin), whole_state(model))


def test_a_new_method_drops_what_the_old_one_carried():
    model = lowrank.convert(TwoConvolutions(), ["first", "second"], ASI(2))
    model(labelled_batch()[0])
    lowrank.convert(model, ["second"], HOSVD(0.8))
    assert {key.partition(".")[0] for key in lowrank.training_state(model)} == {"first"}


@pytest.mark.cpu_only("on a GPU PyTorch's average fails for buffers of integers")
def test_an_average_made_before_the_first_step_is_the_stock_models():
    """Buffers of model and copy are paired by their order."""
    stock = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    model = lowrank.convert(copy.deepcopy(stock), ["0", "3"], ASI(99))
    averages = []
    for network in (stock, model):
        average = AveragedModel(network, use_buffers=True)
        optimizer = torch.optim.SGD(network.parameters(), 0.01)
        for seed in range(2):
            optimizer.zero_grad()
            network(random_tensor(4, 3, 8, 8, seed=seed, dtype=torch.float32)).square().mean().backward()
            optimizer.step()
            average.update_parameters(network)
        averages.append(average.state_dict())
    torch.testing.assert_close(averages[1], averages[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [ASI, lowrank.FixedBases])
@pytest.mark.parametrize("storage", ["input", "int8"])
def test_a_state_of_higher_ranks_is_refused_and_one_of_the_same_ranks_and_a_small_batch_is_not(kind, storage):
    """Training would go on from other bases without a word; a small batch leaves lower ranks than were given."""
    for given, others in (((5, 3, 3, 3), (5, 2, 3, 3)), (3, 2)):
        model = conv_model(kind(given, storage=storage))
        step(model, random_tensor(8, 4, 7, 6))
        step(model, random_tensor(2, 4, 7, 6))
        state = lowrank.training_state(model)
        lowrank.load_training_state(conv_model(kind(given, storage=storage)), state)
        other = conv_model(kind(others, storage=storage))
        with pytest.raises(StateError, match=r"layer '0' is of another method: .*rank 3, and the rank is 2"):
            lowrank.load_training_state(other, state)
        assert not lowrank.training_state(other)


@pytest.mark.parametrize(
    "method", [lowrank.Vanilla(), HOSVD(0.8), lowrank.SVD(0.8), lowrank.GradientFilter(2), lowrank.Rounded()]
)
def test_a_method_that_carries_nothing_refuses_what_another_carried(method):
    model, x = conv_model(ASI(2)), random_tensor(8, 4, 7, 6)
    step(model, x)
    state, other = lowrank.training_state(model), conv_model(method)
    with pytest.raises(StateError, match=rf"layer '0' is of another method: {method.tag} carries nothing"):
        lowrank.load_training_state(other, state)
    step(other, x)
    assert lowrank.training_state(other) == {}
    lowrank.load_training_state(other, {})
