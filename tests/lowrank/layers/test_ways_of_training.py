"""Converted layers in every way that PyTorch offers to train: autocast, checkpointing, data parallel, own loops."""

import copy
import os

import pytest
import torch
import torch.nn.functional as F
from layer_cases import BOTH, EVERY_CONV, EXACT, bases_of, conv_model, converted, step
from references import (
    DEVICE,
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
from torch.nn.utils import prune
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
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = candidate(x)
        y.backward(random_tensor(*y.shape, dtype=torch.float32).to(y.dtype))
        results.append((y, candidate[0].weight.grad, candidate[0].bias.grad))
    assert results[1][0].dtype == torch.bfloat16
    assert [gradient.dtype for gradient in results[1][1:]] == [torch.float32, torch.float32]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=0)
    assert torch.linalg.vector_norm(results[1][1] - results[0][1]) < 0.02 * torch.linalg.vector_norm(results[0][1])
    torch.testing.assert_close(results[1][2], results[0][2], rtol=0.02, atol=0.05)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        model(x)
    if isinstance(method, Vanilla):
        assert model[0]._lowrank.kept_bytes == 2 * x.numel()


def test_autocast_off_inside_computes_in_float32():
    model, x = converted(nn.Linear(6, 5), HOSVD(0.8)), random_tensor(4, 6, dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16), torch.autocast(DEVICE, enabled=False):
        assert model(x).dtype == torch.float32


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6).eval(), nn.GroupNorm(2, 6)])
def test_a_backward_pass_alone_within_autocast(norm):
    """What is computed again was computed without."""
    layers = (nn.Conv2d(4, 6, 3), norm, nn.GELU(), nn.Conv2d(6, 6, 3, groups=6), nn.GroupNorm(2, 6), nn.Conv2d(6, 2, 1))
    stock, x = nn.Sequential(*copy.deepcopy(layers)), random_tensor(3, 4, 8, 8, dtype=torch.float32)
    expected = step(stock, x)
    model = lowrank.convert(copy.deepcopy(stock), ["0", "3", "5"], Vanilla())
    y = model(x)
    model.zero_grad()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y.backward(random_tensor(*y.shape, dtype=torch.float32))
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, expected, rtol=0.03, atol=0.03)


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
        _compare_with_data_parallel(conv_model(ASI(2)))
    finally:
        torch.distributed.barrier()  # its threads are done with every gradient then, and can be joined
        torch.distributed.destroy_process_group()


def _compare_with_data_parallel(model):
    twin, parallel = copy.deepcopy(model), nn.parallel.DistributedDataParallel(model)
    for seed in range(3):
        x = random_tensor(5, 4, 7, 6, seed=seed)
        expected = step(twin, x)
        result = step(parallel, x)
        torch.testing.assert_close(list(result.values()), list(expected.values()), **TOLERANCE)


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


def test_parameters_stepped_within_the_backward_pass():
    """As an optimizer does that is fused into it: a parameter moves as soon as its gradient is there."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 2, 2), nn.BatchNorm2d(8).eval()
            self.first_norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.second_norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            x = F.relu(self.norm(self.conv(x))).flatten(2).mT
            h = self.first_norm(x)
            x = x + self.attention(h, h, h, need_weights=False)[0]
            return x + self.down(F.gelu(self.up(self.second_norm(x))))

    stock = Block().double()
    model = lowrank.convert(copy.deepcopy(stock), ["conv", "up", "down"], Vanilla())
    x, grad = random_tensor(2, 3, 6, 6), random_tensor(2, 9, 8, seed=1)

    @torch.no_grad()
    def step_now(parameter):
        parameter -= 0.1 * parameter.grad
        parameter.grad = None

    for network in (stock, model):
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(step_now)
        for _ in range(3):
            network(x).backward(grad)
    torch.testing.assert_close(dict(model.state_dict()), dict(stock.state_dict()), **TOLERANCE)


@pytest.mark.parametrize("names", [["first"], ["second"], ["first", "second"]])
def test_settings_and_kernels_changed_after_construction(names):
    """As encoders of segmentation networks are dilated, and kernels padded or merged, before or after conversion."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4).eval()
            self.second = nn.Conv2d(4, 5, 1)

        def forward(self, x):
            return self.second(self.norm(self.first(x)))

    def change(network):
        torch.manual_seed(1)
        network.first.stride, network.first.dilation, network.first.padding = (1, 1), (2, 2), (2, 3)
        network.second.weight = nn.Parameter(torch.randn(5, 4, 3, 2, dtype=torch.float64))

    x = random_tensor(2, 3, 9, 8)
    for when in ("before", "after"):
        stock = Net().double()
        model = copy.deepcopy(stock)
        change(stock)
        if when == "before":
            change(model)
        lowrank.convert(model, names, HOSVD(1.0))
        if when == "after":
            change(model)
        grad = random_tensor(*stock(x).shape, seed=2)
        for result, expected in zip(autograd(model, x, grad), autograd(stock, x, grad), strict=True):
            torch.testing.assert_close(result, expected, **TOLERANCE)


@pytest.mark.parametrize("method", EXACT)
def test_a_weight_that_is_computed(method):
    """A hypernetwork sets it in every pass; pruning and parametrization compute it from parameters of their own."""

    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.make, self.conv, self.head = nn.Linear(3, 54), nn.Conv2d(3, 2, 3, bias=False), nn.Linear(2, 2)
            del self.conv.weight
            self.conv.weight = torch.zeros(2, 3, 3, 3)

        def forward(self, x):
            self.conv.weight = self.make(x.mean((0, 2, 3))).view(2, 3, 3, 3)
            return self.head(self.conv(x).mean((2, 3)))

    stock = Hyper().double()
    stock.conv.weight = stock.conv.weight.double()
    model = lowrank.convert(copy.deepcopy(stock), ["conv", "head", "make"], method)
    prune.l1_unstructured(stock.head, "weight", 0.5)
    prune.l1_unstructured(model.head, "weight", 0.5)
    x, grad = random_tensor(2, 3, 6, 5), random_tensor(2, 2, seed=1)
    for network in (stock, model):
        network(x).backward(grad)
    for (name, found), (_, expected) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, msg=lambda m, n=name: f"{n}: {m}", **TOLERANCE)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_without_parameters_of_its_own(bias, method):
    """Its weight is a tensor with a graph, as flat parameters and generated weights are."""
    gradients = []
    for method_ in (None, method):
        model = nn.Sequential(nn.Linear(3, 4, bias=bias, dtype=torch.float64))
        if method_ is not None:
            lowrank.convert(model, ["0"], method_)
        flat = nn.Parameter(random_tensor(16))
        del model[0].weight
        model[0].weight = 2 * flat[:12].view(4, 3)
        if bias:
            del model[0].bias
            model[0].bias = flat[12:]
        model(random_tensor(5, 3, seed=1)).backward(random_tensor(5, 4, seed=2))
        gradients.append(flat.grad)
    torch.testing.assert_close(gradients[1], gradients[0], **TOLERANCE)


def test_two_backward_passes_with_a_step_in_between():
    """PyTorch allows it where a parameter is not needed any more; what cannot be computed again is an error by name."""
    stock = nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    stock, x, outcomes = stock.double(), random_tensor(3, 5, 6), []
    for network in (stock, lowrank.convert(copy.deepcopy(stock), ["1", "3"], HOSVD(1.0))):
        y = network(x)
        (grad,) = torch.autograd.grad(y.sum(), network[1].weight, retain_graph=True)
        with torch.no_grad():
            network[1].weight -= 0.1 * grad
        try:
            y.square().sum().backward()
            outcomes.append([p.grad for p in network.parameters()])
        except lowrank.ChangedError:
            outcomes.append(None)
    assert outcomes[0] is not None
    if outcomes[1] is not None:
        torch.testing.assert_close(outcomes[1], outcomes[0])


@pytest.mark.slow
@pytest.mark.cpu_only("gloo")
def test_distributed_data_parallel_with_images_of_another_size_on_each_rank(tmp_path):
    """What ASI carries is of another size on each; nothing of it is broadcast."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("this build of PyTorch has no gloo")
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_train_on, args=(rank, str(tmp_path / "store"))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]


def _train_on(rank, path):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.FileStore(path, 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = lowrank.convert(nn.Sequential(*layers, nn.Linear(4, 2)), ["0", "3"], ASI(2))
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(3):
        side = 16 if rank == 0 else 12
        parallel(torch.randn(4, 3, side, side)).square().mean().backward()
    gradient = model[0].weight.grad.clone()
    torch.distributed.all_reduce(gradient)
    assert torch.allclose(gradient, 2 * model[0].weight.grad)
    assert len(lowrank.training_state(model)) > 0
    torch.distributed.barrier()
    os._exit(0)  # PyTorch's file store may wait for ever when it is taken down, of a stock model too


@pytest.mark.parametrize("training", [True, False])
def test_a_weight_that_is_computed_is_computed_once_per_call(training):
    """As in the stock layer: spectral norm takes a step of its power iteration each time."""
    layers = {False: nn.Conv2d(3, 4, 3, dtype=torch.float64), True: nn.Linear(5, 2, dtype=torch.float64)}
    for single, layer in layers.items():
        results = []
        for convert in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(copy.deepcopy(layer))
            if convert:
                lowrank.convert(model, ["0"], lowrank.Vanilla())
            nn.utils.parametrizations.spectral_norm(model[0])
            x = random_tensor(6, 5) if single else random_tensor(2, 3, 6, 5)
            with torch.set_grad_enabled(training):
                ys = [model(x) for _ in range(3)]
            if training:
                ys[-1].square().sum().backward()
            results.append(
                [*(y.detach() for y in ys), *model.state_dict().values(), *(p.grad for p in model.parameters())]
            )
        torch.testing.assert_close(results[1], results[0])
