"""Compiled models, parts and losses: one graph where that can be, and the gradients of the model itself."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from elsewhere_cases import images, pair
from layer_cases import converted, step
from networks import frozen_statistics
from references import random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, WASI, GradientFilter, Vanilla


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "fuse"),
    [
        (ASI(2), True),
        (ASI(2, algorithm="published"), False),
        (ASI(2, refresh=2), True),
        (ASI(2, refresh="energy"), True),
        (ASI(2, storage="int8"), True),
        (ASI(2, storage="int8", refresh=2), True),
        (GradientFilter(2), True),
    ],
)
def test_a_compiled_model_is_one_graph_and_trains_as_the_model_itself(method, fuse):
    torch._dynamo.reset()
    body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4).eval(), nn.ReLU6())
    model = lowrank.convert(nn.Sequential(body, nn.Flatten(), nn.Linear(4 * 36, 3)), ["0.0"], method, fuse)
    twin, batches = copy.deepcopy(model), [random_tensor(4, 3, 6, 6, seed=s, dtype=torch.float32) for s in range(3)]
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    for number, batch in enumerate(batches):
        # The first step has no basis to start from; from the second on it is always the same graph.
        settled = torch._dynamo.config.patch(error_on_recompile=True) if number > 1 else nullcontext()
        for network, forward in ((twin, twin), (model, fast)):
            network.zero_grad()
            with settled:
                F.cross_entropy(forward(batch), torch.tensor([0, 1, 2, 0])).backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    if parameter.requires_grad:
                        parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lowrank.training_state(model), lowrank.training_state(twin), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_methods_that_choose_ranks_by_the_data_compile_with_breaks_in_the_graph():
    torch._dynamo.reset()
    model = converted(nn.Conv2d(3, 4, 3), HOSVD(0.8))
    x = random_tensor(4, 3, 6, 6, dtype=torch.float32)
    expected = step(copy.deepcopy(model), x)
    y = torch.compile(model, backend="aot_eager")(x)
    y.backward(random_tensor(*y.shape, dtype=y.dtype))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", [SVD(0.5), HOSVD(0.5)])
@pytest.mark.parametrize("fuse", [False, True])
def test_methods_that_choose_ranks_by_the_data_keep_as_little_of_any_number_of_layers_and_shapes(method, fuse):
    """Each was compiled for itself, up to PyTorch's limit of recompilations; from there on inputs were kept whole."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    widths = range(3, 15)
    convs = [nn.Conv2d(c, c + 1, 3, padding=1) for c in widths]
    model = nn.Sequential(*(nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()) for conv in convs))
    lowrank.convert(frozen_statistics(model), [f"{at}.0" for at in range(len(convs))], method, fuse=fuse)
    x, kept, found = random_tensor(4, 3, 8, 8, dtype=torch.float32), [], []
    for network in (copy.deepcopy(model), torch.compile(model, backend="aot_eager")):
        network(x).square().mean().backward()
        found.append([parameter.grad for parameter in network.parameters()])
        kept.append([layer._lowrank.kept_bytes for layer in lowrank.converted_layers(network)])
    assert kept[0] == kept[1]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


class Shortcut(nn.Module):
    """Its input is read again behind its first layer, and so behind the break that this makes in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.shortcut = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x))) + self.shortcut(x)


@pytest.mark.slow
def test_methods_that_choose_ranks_by_the_data_compile_once_for_all_steps():
    torch._dynamo.reset()
    model = lowrank.convert(Shortcut(), ["conv", "shortcut"], HOSVD(0.8))
    twin, fast = copy.deepcopy(model), torch.compile(model, backend="eager")
    for number in range(3):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            for network in (twin, fast):
                network(random_tensor(4, 3, 6, 6, dtype=torch.float32)).square().sum().backward()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_with_methods_that_keep_the_input(fullgraph):
    torch._dynamo.reset()
    stock, model = pair(Vanilla(), dtype=torch.float32)
    fast, x = torch.compile(model, backend="aot_eager", fullgraph=fullgraph), images(dtype=torch.float32)
    for network in (stock, fast):
        network(x).square().sum().backward()
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["conv", "norm", "act", "last", "layer_norm", "first", "gelu", "second"])
def test_one_compiled_part_among_others(part):
    """It is given whatever the converted layer ahead of it makes."""
    torch._dynamo.reset()
    stock, model = pair(HOSVD(1.0), dtype=torch.float32)
    setattr(model, part, torch.compile(getattr(model, part), backend="aot_eager"))
    outputs = [network(images(dtype=torch.float32)) for network in (stock, model)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    for y in outputs:
        y.square().sum().backward()
    for (_, found), (_, expected) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "method", "smallest"),
    [(nn.Conv2d(3, 4, 3), ASI(99), 0), (nn.Conv2d(3, 4, 3), ASI(2), 2**15), (nn.Linear(6, 5), WASI(2, energy=0.9), 1)],
)
def test_one_graph_where_the_input_is_kept_whole_after_all_and_with_factored_weights(layer, method, smallest):
    torch._dynamo.reset()
    model = lowrank.convert(nn.Sequential(layer, nn.ReLU()), ["0"], method, smallest=smallest)
    x, fast = random_tensor(4, 3, 6, 6, dtype=torch.float32), copy.deepcopy(model)
    expected = step(model, x)
    y = torch.compile(fast, backend="eager", fullgraph=True)(x)
    y.backward(random_tensor(*y.shape, dtype=y.dtype))
    found = {name: parameter.grad for name, parameter in fast.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "smallest"),
    [*((ASI(2), smallest) for smallest in (0, 1, 2**15)), (ASI(2, storage="int8"), 1), (GradientFilter(2), 1)],
    ids=repr,
)
def test_batches_of_any_size_whatever_is_asked_of_their_bytes(method, smallest):
    torch._dynamo.reset()
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model = lowrank.convert(stock, ["0", "2"], method, smallest=smallest)
    twin = copy.deepcopy(model)
    fast = torch.compile(model, backend="aot_eager")
    for size in (4, 3, 5):
        for network in (twin, fast):
            network.zero_grad()
            network(random_tensor(size, 3, 12, 12, dtype=torch.float32)).square().sum().backward()
        for one, two in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_for_any_size_from_the_first_call_on():
    """`dynamic=True`: a compiler takes sizes, and fractions that it meets, for unknowns."""
    torch._dynamo.reset()
    model = lowrank.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), ["0", "2"], ASI(2))
    twin, x = copy.deepcopy(model), random_tensor(4, 3, 8, 8, dtype=torch.float32)
    fast = torch.compile(model, dynamic=True, fullgraph=True, backend="eager")
    for network in (twin, fast):
        network(x).square().sum().backward()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(), nn.Hardsigmoid(), nn.Hardtanh(-0.5, 0.7)], ids=str)
def test_several_activations_compiled_for_any_size(activation):
    """What they have in common are numbers, which a compiler takes for unknowns as well."""
    torch._dynamo.reset()
    layers = [nn.Conv2d(3, 4, 3), activation, nn.Conv2d(4, 2, 3), copy.deepcopy(activation)]
    stock, x = nn.Sequential(*layers).double(), random_tensor(4, 3, 8, 8)
    model = lowrank.convert(copy.deepcopy(stock), ["0", "2"], Vanilla())
    fast = torch.compile(model, dynamic=True, backend="aot_eager")
    for network in (stock, fast):
        network(x).square().sum().backward()
    for one, two in zip(fast.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_a_compiled_loss_of_a_converted_models_output():
    torch._dynamo.reset()
    stock, model = pair(Vanilla(), dtype=torch.float32)
    loss = torch.compile(lambda y: F.relu(y).square().sum(), backend="aot_eager")
    for network in (stock, model):
        loss(network.last(network.norm(network.conv(images(dtype=torch.float32))))).backward()
    torch.testing.assert_close(model.conv.weight.grad, stock.conv.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_conversion_after_a_compiled_run_takes_effect():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    fast, x = torch.compile(model, backend="aot_eager"), random_tensor(4, 3, 8, 8, dtype=torch.float32)
    exact = step(fast, x)["_orig_mod.0.weight"]
    names = lowrank.trailing_layers(fast, 2)
    lowrank.convert(fast, names[:1], ASI([1, 1, 1, 1]))
    truncated = step(copy.deepcopy(model), x)["0.weight"]
    torch.testing.assert_close(step(fast, x)["_orig_mod.0.weight"], truncated, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(truncated, exact, rtol=0.1)


@pytest.mark.slow
def test_a_layer_behind_others_compiles_into_one_graph_for_each_size_of_a_batch():
    torch._dynamo.reset()
    stock = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2))
    model = lowrank.convert(stock, ["2"], ASI(2), smallest=1)  # asked by size, and worth it
    twin = copy.deepcopy(model)
    fast = torch.compile(model, fullgraph=True, backend="eager")
    for size in (4, 3):
        for network, forward in ((twin, twin), (model, fast)):
            network.zero_grad()
            forward(random_tensor(size, 3, 16, 16, dtype=torch.float32)).square().sum().backward()
        assert not lowrank.account(twin, ["2"], random_tensor(size, 3, 16, 16, dtype=torch.float32)).whole
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-4)
