"""Converted layers in every way that PyTorch offers to train: autocast, checkpointing, compiling, data parallel."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from layer_cases import BOTH, EVERY_CONV, EXACT, bases_of, conv_model, converted, state_of, step
from references import (
    TOLERANCE,
    TwoConvolutions,
    autograd,
    cross_entropy,
    labelled_batch,
    left_vectors,
    low_rank_tensor,
    random_tensor,
    same_span,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank
from lowrank import ASI, HOSVD, SVD, GradientFilter, Vanilla


@pytest.mark.parametrize("method", [Vanilla(), SVD(1.0), HOSVD(1.0), ASI(99)])
@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv2d(4, 6, 3), (5, 4, 7, 6)), (nn.Linear(6, 5), (4, 3, 6))])
def test_autocast_computes_and_keeps_in_bfloat16(method, layer, shape):
    x = random_tensor(*shape, dtype=torch.float32)
    stock, model = nn.Sequential(copy.deepcopy(layer)), converted(layer, method)
    results = []
    for candidate in (stock, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = candidate(x)
        y.backward(random_tensor(*y.shape, dtype=torch.float32).to(y.dtype))
        results.append((y, candidate[0].weight.grad, candidate[0].bias.grad))
    assert results[1][0].dtype == torch.bfloat16
    assert [gradient.dtype for gradient in results[1][1:]] == [torch.float32, torch.float32]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=0)
    assert torch.linalg.vector_norm(results[1][1] - results[0][1]) < 0.02 * torch.linalg.vector_norm(results[0][1])
    torch.testing.assert_close(results[1][2], results[0][2], rtol=0.02, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    if isinstance(method, Vanilla):
        assert model[0].kept_bytes == 2 * x.numel()


def test_autocast_off_inside_computes_in_float32():
    model, x = converted(nn.Linear(6, 5), HOSVD(0.8)), random_tensor(4, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert model(x).dtype == torch.float32


@pytest.mark.parametrize("method", EVERY_CONV)
def test_gradients_accumulate_over_steps(method):
    model, x = conv_model(method), [random_tensor(5, 4, 7, 6, seed=seed) for seed in range(2)]
    twin = copy.deepcopy(model)
    apart = [step(twin, batch) for batch in x]
    for batch in x:
        y = model(batch)
        y.backward(random_tensor(*y.shape))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, apart[0][name] + apart[1][name], **TOLERANCE)


@pytest.mark.parametrize("method", EVERY_CONV)
def test_two_forward_passes_before_one_backward_pass(method):
    model, x = conv_model(method), [random_tensor(5, 4, 7, 6, seed=seed) for seed in range(2)]
    twin = copy.deepcopy(model)
    apart = [step(twin, batch) for batch in x]
    outputs = [model(batch) for batch in x]
    torch.autograd.backward(outputs, [random_tensor(*y.shape) for y in outputs])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, apart[0][name] + apart[1][name], **TOLERANCE)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", [Vanilla(), SVD(0.8), HOSVD(0.8), ASI(2, warm_start=False), GradientFilter(2)])
def test_checkpointing_changes_no_gradient(method, reentrant):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3)).double()
    lowrank.convert(model, ["0", "2"], method)
    x, grad = random_tensor(4, 3, 8, 8), random_tensor(4, 6, 4, 4, seed=1)
    _, grad_x, gradients = autograd(model, x, grad)
    x.requires_grad_(True)
    checkpoint(model, x, use_reentrant=reentrant).backward(grad)
    torch.testing.assert_close(x.grad, grad_x, **TOLERANCE)
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, gradients, **TOLERANCE)


@pytest.mark.parametrize("reentrant", [False, True])
@BOTH
def test_checkpointed_asi_trains_over_many_steps(algorithm, reentrant):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3)).double()
    lowrank.convert(model, ["0", "2"], ASI(2, algorithm=algorithm))
    x, grad = low_rank_tensor(8, 3, 8, 8), random_tensor(8, 6, 4, 4, seed=1)
    for _ in range(15):
        model.zero_grad()
        checkpoint(model, x.clone().requires_grad_(True), use_reentrant=reentrant).backward(grad)
    best = {mode: left_vectors(x, mode, 2) for mode in range(4)}
    assert all(same_span(basis, best[mode], 0.05) for mode, basis in bases_of(model[0]).items())


@pytest.mark.parametrize("method", EXACT)
def test_at_full_rank_a_network_trains_as_the_stock_one(method):
    stock, batch = TwoConvolutions().double(), labelled_batch(dtype=torch.float64)
    model = lowrank.convert(copy.deepcopy(stock), ["first", "second", "head"], method)
    for network in (stock, model):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            cross_entropy(network, batch).backward()
            optimizer.step()
    torch.testing.assert_close(dict(model.named_parameters()), dict(stock.named_parameters()), **TOLERANCE)


def test_distributed_data_parallel_in_one_process(tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("this build of PyTorch has no gloo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = conv_model(ASI(2))
        twin, parallel = copy.deepcopy(model), nn.parallel.DistributedDataParallel(model)
        for seed in range(3):
            x = random_tensor(5, 4, 7, 6, seed=seed)
            expected = step(twin, x)
            result = step(parallel, x)
            torch.testing.assert_close(list(result.values()), list(expected.values()), **TOLERANCE)
    finally:
        torch.distributed.destroy_process_group()


def test_a_layer_used_twice_in_a_pass_sums_its_gradients():
    layer = nn.Linear(6, 6, dtype=torch.float64)
    x, grad = random_tensor(4, 6), random_tensor(4, 6, seed=1)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = copy.deepcopy(layer)

        def forward(self, x):
            return self.layer(F.gelu(self.layer(x)))

    stock = autograd(Twice(), x, grad)
    for method in EXACT:
        for result, expected in zip(autograd(lowrank.convert(Twice(), ["layer"], method), x, grad), stock, strict=True):
            torch.testing.assert_close(result, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("method", "fuse"),
    [
        (ASI(2), True),
        (ASI(2, algorithm="published"), False),
        (ASI(2, refresh=2), True),
        (ASI(2, refresh="energy"), True),
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
                    parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state_of(model), state_of(twin), rtol=1e-4, atol=1e-5)


def test_methods_that_choose_ranks_by_the_data_compile_with_breaks_in_the_graph():
    torch._dynamo.reset()
    model = converted(nn.Conv2d(3, 4, 3), HOSVD(0.8))
    x = random_tensor(4, 3, 6, 6, dtype=torch.float32)
    expected = step(copy.deepcopy(model), x)
    y = torch.compile(model, backend="aot_eager")(x)
    y.backward(random_tensor(*y.shape, dtype=y.dtype))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)
