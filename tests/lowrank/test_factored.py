"""Weights held as factors: against dense training, against a dense emulation, and that nothing dense exists."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from references import low_rank_tensor, projected, random_tensor, subspace_step
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import ASI, WASI, WSI, ConversionError, LowRankError, SettingError, Vanilla
from lowrank.factored import FactoredLinear
from lowrank.factored_weight import FACTORED
from lowrank.iteration import Factors, factorise, gradient_factors, joined, truncated
from lowrank.iteration import subspace_step as weight_step

NAMES = ["0", "2"]
SHAPES = {"2-D": (20, 6), "3-D": (4, 5, 6), "4-D": (2, 3, 4, 6)}
FULL = 99


def network(inputs=6, hidden=9, seed=1):
    """Two linear layers, one with more outputs than inputs and one with fewer, and a classifier that stays stock."""
    torch.manual_seed(seed)
    layers = (nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, 7, bias=False), nn.LayerNorm(7), nn.Linear(7, 3))
    return nn.Sequential(*layers).double()


def loss_of(model, x, target):
    y = model(x)
    return (y * target).mean() + y.square().mean()


def data(shape, step=0):
    return random_tensor(*shape, seed=10 + step), random_tensor(*shape[:-1], 3, seed=50 + step)


def train(model, optimizer, shape, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, *data(shape, step)).backward()
        optimizer.step()
    return model


def state_of(model):
    return lowrank.stock_state_dict(model.state_dict())


def assert_same_weights(model, other, tolerance=1e-8):
    torch.testing.assert_close(state_of(model), state_of(other), rtol=tolerance, atol=tolerance)


# The update, as a function of matrices.


def moved_matrix(outputs=8, inputs=11, rank=3, gradient_rank=2):
    weight = factorise(low_rank_tensor(outputs, inputs, seed=1, decay=0.7), 1.0)
    weight = Factors(weight.left[:, :rank], weight.right[:rank])
    gradient = Factors(random_tensor(outputs, gradient_rank, seed=2), random_tensor(gradient_rank, inputs, seed=3))
    return weight, gradient


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(8, 11, 3), (11, 8, 3), (8, 8, 1), (6, 11, 6), (11, 6, 6)])
def test_a_subspace_step_is_the_dense_one(outputs, inputs, rank):
    weight, gradient = moved_matrix(outputs, inputs, rank)
    for step in range(5):
        dense = weight.dense() - 0.1 * gradient.dense()
        basis = torch.linalg.qr(dense @ (dense.mT @ weight.left))[0]
        weight = weight_step(weight.left, joined([weight, gradient.scaled(-0.1)]))
        torch.testing.assert_close(weight.dense(), basis @ (basis.mT @ dense), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(weight.left.mT @ weight.left, torch.eye(rank, dtype=torch.float64))
        gradient = Factors(random_tensor(outputs, 2, seed=20 + step), random_tensor(2, inputs, seed=30 + step))


def stale_step(start, matrix):
    """The public code: the right factor is formed with the basis of the step before."""
    dense = matrix.dense()
    right = (dense.mT @ start).mT
    return Factors(torch.linalg.qr(dense @ right.mT)[0], right)


def fresh_step(start, matrix):
    return weight_step(start, matrix)


def drift(step):
    """Relative change of a weight that nothing moves, over three steps: it is of its own rank, so it should stay."""
    weight, _ = moved_matrix()
    before, worst = weight.dense(), 0.0
    for _ in range(3):
        weight = step(weight.left, weight)
        worst = max(worst, float((weight.dense() - before).norm() / before.norm()))
    return worst


def test_a_weight_that_nothing_moves_stays_and_with_a_stale_basis_it_does_not():
    assert drift(fresh_step) < 1e-12
    assert drift(stale_step) > 0.5


def test_training_fails_with_a_stale_basis_and_not_with_ours(monkeypatch):
    stock = train(network(), torch.optim.SGD(network().parameters(), 0.0), SHAPES["3-D"], 0)

    def loss_after(step):
        monkeypatch.setattr("lowrank.optimizer.subspace_step", step)
        model = lowrank.convert(copy.deepcopy(stock), NAMES, WASI(energy=0.9, ranks=FULL))
        train(model, lowrank.SGD(model.parameters(), 1e-4), SHAPES["3-D"], 2)
        reference = lowrank.convert(copy.deepcopy(stock), NAMES, WASI(energy=0.9, ranks=FULL))
        x, _ = data(SHAPES["3-D"])
        return float(((model(x) - reference(x)).norm() / reference(x).norm()).detach())

    assert loss_after(fresh_step) < 0.01
    assert loss_after(stale_step) > 0.1


def test_three_spans_of_the_gradient_are_all_that_a_step_reads():
    weight, _ = moved_matrix(20, 30, 2)
    x, grad = random_tensor(50, 30, seed=4), random_tensor(50, 20, seed=5)
    held = gradient_factors(x, grad, weight)
    assert held.left.shape == (20, 6)
    exact = Factors(grad.mT @ x, torch.eye(30, dtype=torch.float64))
    for step, decay in ((0.01, 0.0), (3.0, 0.0), (0.2, 0.3)):
        results = [
            weight_step(weight.left, joined([weight.scaled(1 - step * decay), gradient.scaled(-step)])).dense()
            for gradient in (held, exact)
        ]
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_the_nearest_matrix_of_a_rank_is_that_of_the_singular_values():
    matrix = joined(moved_matrix())
    u, s, v = torch.linalg.svd(matrix.dense())
    torch.testing.assert_close(truncated(matrix, 3).dense(), u[:, :3] * s[:3] @ v[:3])
    torch.testing.assert_close(truncated(matrix, 99).dense(), matrix.dense())


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_the_rank_is_that_of_the_energy(energy, shape):
    weight = low_rank_tensor(*shape)
    values = torch.linalg.svdvals(weight).square()
    shares = values.cumsum(0) / values.sum()
    rank = int((shares < energy * (1 - 1e-12)).sum()) + 1 if energy < 1 else int((values > 1e-28).sum())
    found = factorise(weight, energy)
    assert found.left.shape[1] == min(rank, *shape)
    torch.testing.assert_close(found.dense(), truncated(Factors(weight, torch.eye(shape[1]).double()), rank).dense())


# Training, against dense training at energy 1.

METHODS = [
    *(WASI(energy=1, ranks=FULL), WSI(energy=1)),
    *(WSI(energy=1, update="svd"), WASI(energy=1, ranks=FULL, update="svd")),
]
SETTINGS = [
    {},
    {"weight_decay": 0.05},
    {"momentum": 0.9, "weight_decay": 0.01},
    {"momentum": 0.8, "dampening": 0.3},
    {"momentum": 0.7, "nesterov": True, "weight_decay": 0.02},
    {"maximize": True},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.tag)
def test_at_energy_1_twenty_steps_equal_dense_training(method, options):
    stock, model = network(), lowrank.convert(network(), NAMES, method)
    rate = 0.001 if "maximize" in options else 0.05  # this loss has no maximum
    train(stock, torch.optim.SGD(stock.parameters(), rate, **options), SHAPES["3-D"], 20)
    train(model, lowrank.SGD(model.parameters(), rate, **options), SHAPES["3-D"], 20)
    assert_same_weights(model, stock)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", METHODS[:2], ids=lambda method: method.tag)
def test_inputs_of_every_number_of_modes(method, shape):
    stock, model = network(), lowrank.convert(network(), NAMES, method)
    train(stock, torch.optim.SGD(stock.parameters(), 0.05), shape, 20)
    train(model, lowrank.SGD(model.parameters(), 0.05), shape, 20)
    assert_same_weights(model, stock)


def emulated(shape, ranks, energy, steps, lr, decay):
    """WASI with dense weights, written from the definitions: the activation projected, the weight W = L R - lr dW."""
    model, bases = network(), {name: {} for name in NAMES}
    layers = {name: model.get_submodule(name) for name in NAMES}
    left = {}
    for name, layer in layers.items():
        u, s, _ = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        share = s.square().cumsum(0) / s.square().sum()
        left[name] = u[:, : int((share < energy).sum()) + 1]
        layer.weight.data = left[name] @ left[name].mT @ layer.weight.data
    inputs = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, x, y, name=name: inputs.update({name: (x[0].detach(), y)}))
    for step in range(steps):
        model.zero_grad()
        loss = loss_of(model, *data(shape, step))
        outputs = [inputs[name][1] for name in NAMES]
        grads = torch.autograd.grad(loss, outputs, retain_graph=True)
        loss.backward()
        with torch.no_grad():
            for name, grad in zip(NAMES, grads, strict=True):
                layer, x = layers[name], inputs[name][0]
                wanted = {mode: rank for mode, rank in enumerate(ranks) if rank < x.shape[mode]}
                fresh = ASI(list(ranks))
                starts = {m: bases[name].get(m, fresh._start(x, m, r, None, name)) for m, r in wanted.items()}
                bases[name] = subspace_step(x, starts, True)
                kept = projected(x, bases[name])
                layer.weight.grad = grad.flatten(0, -2).mT @ kept.flatten(0, -2)
            for p in model.parameters():
                p -= lr * (p.grad + decay * p)
            for name, layer in layers.items():
                weight = layer.weight
                left[name] = torch.linalg.qr(weight @ (weight.mT @ left[name]))[0]
                weight.copy_(left[name] @ (left[name].mT @ weight))
    return model


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize(("shape", "ranks"), [((4, 5, 6), (3, 4, 5)), ((2, 3, 4, 6), (2, 2, 3, 4)), ((20, 6), (9, 4))])
def test_wasi_is_the_dense_emulation_of_the_papers_algorithm(shape, ranks, decay):
    model = lowrank.convert(network(), NAMES, WASI(energy=0.8, ranks=list(ranks)))
    train(model, lowrank.SGD(model.parameters(), 0.05, weight_decay=decay), shape, 8)
    expected = emulated(shape, ranks, 0.8, 8, 0.05, decay)
    torch.testing.assert_close(state_of(model), expected.state_dict(), rtol=1e-8, atol=1e-9)


def test_wsi_at_low_energy_is_exact_although_it_holds_a_projected_gradient():
    expected = emulated((4, 5, 6), (FULL,) * 3, 0.3, 8, 0.05, 0.0)
    model = lowrank.convert(network(), NAMES, WSI(energy=0.3))
    assert all(3 * model.get_submodule(name).factored.rank < 20 for name in NAMES)
    train(model, lowrank.SGD(model.parameters(), 0.05), (4, 5, 6), 8)
    torch.testing.assert_close(state_of(model), expected.state_dict(), rtol=1e-8, atol=1e-9)


def test_the_svd_update_takes_the_nearest_weight_at_every_step():
    model = lowrank.convert(network(), NAMES, WSI(energy=0.7, update="svd"))
    layer = model[2]
    optimizer = lowrank.SGD(model.parameters(), 0.05)
    x, target = data((4, 5, 6))
    before, rank = layer.factored.factors().dense(), layer.factored.rank
    loss_of(model, x, target).backward()
    gradient = joined(layer.factored.gradient).dense()
    optimizer.step()
    u, s, v = torch.linalg.svd(before - 0.05 * gradient, full_matrices=False)
    torch.testing.assert_close(layer.factored.factors().dense(), u[:, :rank] * s[:rank] @ v[:rank])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_factors_have_autograds_gradients(shape):
    model = lowrank.convert(network(), NAMES, WASI(energy=0.8, ranks=FULL))
    x, target = data(shape)
    x.requires_grad_(True)
    loss_of(model, x, target).backward()
    results = {name: p.grad.clone() for name, p in model.named_parameters()} | {"x": x.grad.clone()}

    class Plain(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.lowrank_left, self.lowrank_right, self.bias = layer.lowrank_left, layer.lowrank_right, layer.bias

        def forward(self, x):
            return F.linear(x, self.lowrank_left @ self.lowrank_right, self.bias)

    for name in NAMES:
        model[int(name)] = Plain(model[int(name)])
    model.zero_grad()
    x.grad = None
    loss_of(model, x, target).backward()
    expected = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-10)


# What training loops do around a step.


def test_gradients_of_several_backward_passes_add_up():
    stock, model = network(), lowrank.convert(network(), NAMES, METHODS[0])
    optimizers = torch.optim.SGD(stock.parameters(), 0.05), lowrank.SGD(model.parameters(), 0.05)
    for step in range(4):
        for one, optimizer in zip((stock, model), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            for part in range(3):
                loss_of(one, *data((4, 5, 6), 3 * step + part)).backward()
            optimizer.step()
    assert_same_weights(model, stock)


def test_wsi_refuses_to_add_up_what_it_does_not_hold():
    model = lowrank.convert(network(), NAMES, WSI(energy=0.3))
    loss_of(model, *data((4, 5, 6))).backward()
    with pytest.raises(LowRankError, match="several backward passes"):
        loss_of(model, *data((4, 5, 6), 1)).backward()


def test_a_common_factor_on_the_gradients_reaches_the_weight():
    model = lowrank.convert(network(), NAMES, WASI(energy=0.8, ranks=FULL))
    twin = copy.deepcopy(model)
    optimizer, other = lowrank.SGD(model.parameters(), 0.05), lowrank.SGD(twin.parameters(), 0.05)
    x, target = data((4, 5, 6))
    (8 * loss_of(model, x, target)).backward()
    for parameter in model.parameters():
        parameter.grad.div_(8)
    loss_of(twin, x, target).backward()
    optimizer.step(), other.step()
    assert_same_weights(model, twin, 1e-12)
    x, target = data((4, 5, 6), 1)
    for one in (model, twin):
        one.zero_grad()
        loss_of(one, x, target).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    lowrank.SGD(twin.parameters(), 0.05 * 1e-3 / (float(norm) + 1e-6)).step()
    assert_same_weights(model, twin, 1e-12)


def test_gradients_that_were_dropped_do_not_come_back():
    model = lowrank.convert(network(), NAMES, METHODS[0])
    twin = copy.deepcopy(model)
    for one in (model, twin):
        optimizer = lowrank.SGD(one.parameters(), 0.05)
        if one is model:
            loss_of(one, *data((4, 5, 6), 7)).backward()
            one.zero_grad()
            optimizer.step()
        loss_of(one, *data((4, 5, 6))).backward()
        optimizer.step()
    assert_same_weights(model, twin, 0)


def test_another_optimizer_is_noticed():
    model = lowrank.convert(network(), NAMES, WASI(energy=0.8, ranks=FULL))
    train(model, torch.optim.Adam(model.parameters(), 0.05), (4, 5, 6), 1)
    with pytest.raises(LowRankError, match=r"layer '0'.*lowrank\.SGD"):
        loss_of(model, *data((4, 5, 6))).backward()


def test_half_of_a_weight_is_refused():
    model = lowrank.convert(network(), NAMES, WASI(energy=0.8, ranks=FULL))
    optimizer = lowrank.SGD([model[0].lowrank_left], 0.05)
    with pytest.raises(SettingError, match="both factors"):
        optimizer.step()


def test_a_closure_a_schedule_and_parameter_groups():
    stock, model = network(), lowrank.convert(network(), NAMES, METHODS[0])
    for one, kind in ((stock, torch.optim.SGD), (model, lowrank.SGD)):
        groups = [{"params": one[0].parameters(), "lr": 0.1}, {"params": [*one[2:].parameters()]}]
        optimizer = kind(groups, 0.02)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(5):

            def closure(one=one, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = loss_of(one, *data((4, 5, 6), step))
                loss.backward()
                return loss

            assert optimizer.step(closure) is not None
            schedule.step()
    assert_same_weights(model, stock)


def test_checkpointed_forward_and_a_smaller_last_batch():
    model = lowrank.convert(network(), NAMES, WASI(energy=0.8, ranks=[3, 4, 5], warm_start=False))
    twin = copy.deepcopy(model)
    for one, call in ((model, lambda m, x: m(x)), (twin, lambda m, x: checkpoint(m, x, use_reentrant=False))):
        optimizer = lowrank.SGD(one.parameters(), 0.05)
        for size in (4, 2):
            optimizer.zero_grad()
            call(one, random_tensor(size, 5, 6)).square().mean().backward()
            optimizer.step()
    assert_same_weights(model, twin, 1e-12)


def test_autocast_and_single_precision():
    model = lowrank.convert(network().float(), NAMES, WASI(energy=0.9, ranks=[3, 4, 5]))
    optimizer = lowrank.SGD(model.parameters(), 0.01, momentum=0.9)
    losses = []
    x, target = (tensor.float() for tensor in data((4, 5, 6)))
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, x, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model[0].lowrank_left.dtype == torch.float32


def test_measuring_between_backward_and_step_changes_nothing():
    model = lowrank.convert(network(), NAMES, METHODS[0])
    twin = copy.deepcopy(model)
    for one in (model, twin):
        optimizer = lowrank.SGD(one.parameters(), 0.05)
        loss_of(one, *data((4, 5, 6))).backward()
        if one is model:
            lowrank.peak_bytes(one, lambda m, b: loss_of(m, *b), data((4, 5, 6), 3))
            lowrank.measure_perplexity(one, NAMES, lambda m, b: loss_of(m, *b), data((4, 5, 6), 3))
        optimizer.step()
    assert_same_weights(model, twin, 0)


# Conversion, state and revert.


def test_revert_gives_the_dense_layers():
    model = lowrank.convert(network(), NAMES, METHODS[0])
    x, _ = data((4, 5, 6))
    expected = model(x)
    assert lowrank.revert(model) is model
    assert [type(layer) for layer in model] == [type(layer) for layer in network()]
    assert list(model.state_dict()) == list(network().state_dict())
    torch.testing.assert_close(model(x), expected)
    assert_same_weights(model, network(), 1e-12)
    assert model[0].weight.requires_grad


def test_a_converted_layer_changes_its_method():
    model = lowrank.convert(network(), NAMES, WASI(energy=0.8, ranks=FULL))
    before = model[0].factored.factors().dense()
    lowrank.convert(model, ["0"], Vanilla())
    torch.testing.assert_close(model[0].weight.detach(), before)
    lowrank.convert(model, ["0"], WSI(energy=1))
    torch.testing.assert_close(model[0].factored.factors().dense(), before)


def test_a_frozen_weight_stays_frozen_and_keeps_nothing():
    model = network()
    model[0].requires_grad_(False)
    lowrank.convert(model, NAMES, WASI(energy=0.8, ranks=[2, 2, 2]))
    assert not model[0].lowrank_left.requires_grad
    x, target = data((4, 5, 6))
    x.requires_grad_(True)
    loss_of(model, x, target).backward()
    assert model[0].kept_bytes == 0
    assert not model[0].factored.gradient
    assert x.grad is not None


@pytest.mark.parametrize("method", [WASI(energy=0.7, ranks=[2, 3, 4]), WSI(energy=0.7)])
def test_a_run_that_is_saved_and_loaded_goes_on_as_if_it_had_not_been(method):
    def start():
        model = lowrank.convert(network(), NAMES, method)
        return model, lowrank.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01)

    model, optimizer = start()
    train(model, optimizer, (4, 5, 6), 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, (4, 5, 6), 3, start=3)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, other_optimizer = start()
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    train(other, other_optimizer, (4, 5, 6), 3, start=3)
    assert model.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_factors_of_another_rank_and_dense_weights_are_loaded():
    small = lowrank.convert(network(seed=2), NAMES, WASI(energy=0.3, ranks=FULL))
    model = lowrank.convert(network(), NAMES, WASI(energy=0.9, ranks=FULL))
    parameters = [*model.parameters()]
    model.load_state_dict(small.state_dict())
    assert_same_weights(model, small, 0)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    stock = network(seed=3)
    model.load_state_dict(stock.state_dict())
    expected = lowrank.convert(network(seed=3), NAMES, WASI(energy=0.9, ranks=FULL))
    assert_same_weights(model, expected, 1e-12)
    train(model, lowrank.SGD(model.parameters(), 0.05), (4, 5, 6), 2)


def test_a_state_dict_of_another_size_is_refused():
    model = lowrank.convert(network(), NAMES, WASI(energy=0.9, ranks=FULL))
    other = lowrank.convert(network(inputs=5), NAMES, WASI(energy=0.9, ranks=FULL))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(other.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_train_on_their_own(duplicate):
    model = lowrank.convert(network(), NAMES, METHODS[0])
    twin, untouched = duplicate(model), copy.deepcopy(model)
    train(twin, lowrank.SGD(twin.parameters(), 0.05), (4, 5, 6), 3)
    assert_same_weights(model, untouched, 0)
    train(model, lowrank.SGD(model.parameters(), 0.05), (4, 5, 6), 3)
    assert_same_weights(model, twin, 1e-12)


def test_what_cannot_be_held_as_factors_is_refused_and_nothing_changes():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[1].weight
    for names, reason in ((["0"], "convolutions"), (["1"], "used by another module")):
        with pytest.raises(ConversionError, match=reason):
            lowrank.convert(model, names, WASI(energy=0.9, ranks=2))
    assert type(model[1]) is nn.Linear
    with pytest.raises(ConversionError, match="no ranks yet"):
        lowrank.convert(network(), ["0"], WASI(energy=0.9))
    for wrong in ({"energy": 0}, {"energy": 1.5}, {"update": "qr"}):
        for method in (WSI, WASI):
            with pytest.raises(SettingError):
                method(**wrong)


# Memory.


class LargeTensors(TorchDispatchMode):
    """Notes the shape of every tensor of at least a size that any operator returns."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.found = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in _pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() >= self.numel:
                self.found.append((func, tuple(leaf.shape)))
        return result


@pytest.mark.parametrize("method", [WASI(energy=0.5, ranks=[3, 3, 3]), WSI(energy=0.5)])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}], ids=str)
def test_no_tensor_of_the_weights_size_exists_after_conversion(method, options):
    outputs, inputs = 60, 70
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, outputs), nn.Tanh(), nn.Linear(outputs, inputs))
    for layer in (model[1], model[3]):
        layer.weight.data = low_rank_tensor(*layer.weight.shape, decay=0.6).float()
    lowrank.convert(model, ["1", "3"], method)
    dense = outputs * inputs
    optimizer = lowrank.SGD(model.parameters(), 0.01, **options)
    held = [*model.parameters(), *model.buffers()]

    def keep(tensor):
        held.append(tensor)
        return tensor

    with LargeTensors(dense) as large:
        for step in range(3):
            optimizer.zero_grad()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = model(random_tensor(2, 5, inputs, seed=step, dtype=torch.float32)).square().mean()
            loss.backward()
            held += [p.grad for p in model.parameters()]
            held += [part for layer in (model[1], model[3]) for term in layer.factored.gradient for part in term]
            optimizer.step()
            held += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        model.eval()(random_tensor(2, 5, inputs, dtype=torch.float32))
    assert large.found == []
    assert len(held) > 50
    assert max(tensor.untyped_storage().nbytes() for tensor in held) < dense * 4


def test_the_dense_weight_is_freed():
    layer = nn.Linear(6, 9)
    model = nn.Sequential(layer)
    lowrank.convert(model, ["0"], WSI(energy=0.5))
    assert isinstance(layer, FactoredLinear)
    assert not hasattr(layer, "weight")
    assert [name for name, _ in layer.named_parameters()] == ["lowrank_left", "lowrank_right", "bias"]
    assert layer.lowrank_left in FACTORED


def test_weights_are_accounted_for_before_and_after():
    model, x = network().float(), torch.randn(4, 5, 6)
    before = lowrank.account(model, NAMES, x)
    assert before.total.weight_bytes == (6 * 9 + 9 * 7) * 4
    method = WASI(energy=0.5, ranks=[2, 3, 4])
    lowrank.convert(model, NAMES, method)
    after, layer = lowrank.account(model, NAMES, x), model[0]
    rank = layer.factored.rank
    assert after["0"].weight_bytes == rank * (6 + 9) * 4
    assert after["0"].activation_bytes == (2 * 3 * 4 + 4 * 2 + 5 * 3 + 6 * 4) * 4
    # The formulas of the paper (A7.3), written out; without the input's gradient, as in every column of this suite.
    iteration = [n * r * (2 * m - 1) + m * r * (2 * n - 1) + 2 * max(n, r) * min(n, r) ** 2
                 for n, m, r in ((4, 30, 2), (5, 24, 3), (6, 20, 4), (9, 6, rank))]  # fmt: skip
    forward = 20 * rank * (2 * 6 - 1) + 20 * 9 * (2 * rank - 1)
    gradient = 20 * 9 * 2 + 2 * 3 * 4 * 5 + 2 * 4 * 6 * 5 + 6 * 9 * 5 * 2
    assert after["0"].flops_paper == sum(iteration) + forward + gradient
    assert after["0"].flops > 0
    lowrank.convert(lowrank.revert(model), NAMES, WSI(energy=0.999999))
    exact = lowrank.account(model, NAMES, x)["0"]
    assert layer.factored.rank == rank
    assert exact.activation_bytes == 4 * 5 * 6 * 4
    assert exact.flops_paper == iteration[-1] + forward + 9 * 6 * (2 * 20 - 1)
