import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from references import TwoConvolutions, cross_entropy, labelled_batch, random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, GradientFilter, Vanilla

FLOAT = 4


class Branches(nn.Module):
    """Two layers on the same input."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.left(x) + self.right(x)


def square(model, x):
    return model(x).square().sum()


def total(model, x):
    """A loss whose own backward pass keeps nothing."""
    return model(x).sum()


def buffered():
    model = nn.Sequential(nn.Linear(3, 2))
    model.register_buffer("scale", torch.ones(4, 2))
    return model


X = (4, 3)
SAVED = {
    "input of a linear layer": (lambda: nn.Linear(3, 2), total, X, 12),
    "and the output for a square": (lambda: nn.Linear(3, 2), square, X, 12 + 8),
    "a shared input counts once": (Branches, total, X, 12),
    "output of ReLU, which the next layer shares": (
        lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 5)),
        total,
        X,
        12 + 8,
    ),
    "input and output of GELU": (lambda: nn.Sequential(nn.Linear(3, 2), nn.GELU(), nn.Linear(2, 5)), total, X, 12 + 16),
    "parameters and buffers do not count": (buffered, lambda m, x: (m(x) * m.scale).sum(), X, 12),
    "a constant does": (buffered, lambda m, x: (m(x) * torch.ones(4, 2)).sum(), X, 12 + 8),
    "a view counts its whole storage": (
        lambda: nn.Linear(3, 2),
        lambda m, x: m(x[:, :1].expand(-1, 3)).sum(),
        (4, 5),
        20,
    ),
    "nothing without parameters": (nn.Identity, total, X, 0),
}


@pytest.mark.parametrize("case", SAVED)
def test_saved_bytes_equal_a_count_by_hand(case):
    make, loss, shape, floats = SAVED[case]
    assert lowrank.saved_bytes(make(), loss, random_tensor(*shape, dtype=torch.float32)) == FLOAT * floats


def test_a_whole_network_equals_a_count_by_hand():
    # batch, first output (in place: one storage for ReLU and the next layer), second output, mean, log-softmax,
    # total weight of the loss; labels are int64
    floats = 4 * 3 * 8 * 8 + 4 * 4 * 8 * 8 + 4 * 6 * 4 * 4 + 4 * 6 + 4 * 5 + 1
    assert lowrank.saved_bytes(TwoConvolutions(), cross_entropy, labelled_batch()) == FLOAT * floats + 8 * 4


def test_a_frozen_start_keeps_nothing():
    model = TwoConvolutions()
    lowrank.freeze_before(model, ["head"])
    floats = 4 * 6 + 4 * 5 + 1
    assert lowrank.saved_bytes(model, cross_entropy, labelled_batch()) == FLOAT * floats + 8 * 4


def tucker_floats(shape, ranks):
    core = 1
    for rank in ranks:
        core *= rank
    return core + sum(n * r for n, r in zip(shape, ranks, strict=True))


@pytest.mark.parametrize(("shape", "ranks"), [((6, 5), (2, 2)), ((6, 4, 5), (2, 3, 2))])
def test_a_converted_layer_keeps_core_and_factors_in_place_of_the_input(shape, ranks):
    model = lowrank.convert(nn.Sequential(nn.Linear(5, 2)), ["0"], ASI(ranks))
    x = random_tensor(*shape, dtype=torch.float32)
    expected = FLOAT * tucker_floats(shape, ranks)
    assert lowrank.saved_bytes(model, total, x) == expected
    assert model[0]._lowrank.kept_bytes == 0, "a measurement leaves no trace"
    model(x)
    assert model[0]._lowrank.kept_bytes == expected


@pytest.mark.parametrize("method", [Vanilla(), SVD(0.3), SVD(0.8), HOSVD(0.3), HOSVD(0.8), ASI(1), ASI(2)])
def test_what_is_measured_is_what_the_layer_says_it_keeps(method):
    model = lowrank.convert(nn.Sequential(nn.Conv2d(6, 2, 3)), ["0"], method)
    for x in (torch.ones(5, 6, 7, 8), random_tensor(5, 6, 7, 8, dtype=torch.float32)):
        model(x)
        assert lowrank.saved_bytes(model, total, x) == model[0]._lowrank.kept_bytes


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_state_of_earlier_steps_does_not_count(steps):
    model = lowrank.convert(nn.Sequential(nn.Linear(5, 2)), ["0"], ASI((2, 2)))
    for seed in range(steps):
        model(random_tensor(6, 5, seed=seed, dtype=torch.float32))
    x = random_tensor(6, 5, dtype=torch.float32)
    assert lowrank.saved_bytes(model, total, x) == FLOAT * tucker_floats((6, 5), (2, 2))


@pytest.mark.parametrize("given", [None, 0.5, [], "loss"], ids=repr)
@pytest.mark.parametrize("meter", [lowrank.saved_bytes, lowrank.peak_bytes, lowrank.explain], ids=lambda m: m.__name__)
def test_a_loss_that_is_not_returned_is_told_and_never_measured_as_nothing(meter, given):
    with pytest.raises(lowrank.SettingError, match=f"loss_fn gave a {type(given).__name__}"):
        meter(TwoConvolutions(), lambda model, batch: (cross_entropy(model, batch), given)[1], labelled_batch())


def test_vanilla_conversion_keeps_what_the_stock_layer_keeps():
    model, batch = TwoConvolutions(), labelled_batch()
    stock = lowrank.saved_bytes(model, cross_entropy, batch)
    lowrank.convert(model, ["first", "second", "head"], Vanilla(), fuse=False)
    assert lowrank.saved_bytes(model, cross_entropy, batch) == stock


def test_the_first_layers_input_is_no_longer_kept():
    model, batch = TwoConvolutions(), labelled_batch()
    stock = lowrank.saved_bytes(model, cross_entropy, batch)
    lowrank.convert(model, ["first"], ASI(1), fuse=False)
    saved = stock - FLOAT * 4 * 3 * 8 * 8 + FLOAT * tucker_floats((4, 3, 8, 8), (1, 1, 1, 1))
    assert lowrank.saved_bytes(model, cross_entropy, batch) == saved


# Peak


def weighted(model, batch):
    x, weights = batch
    return (model(x) * weights).sum()


@pytest.mark.cpu_only("a GPU's allocator gives whole blocks")
def test_peak_bytes_equal_a_count_by_hand():
    model = nn.Linear(30, 2, bias=False)
    batch = random_tensor(4, 30, dtype=torch.float32), random_tensor(4, 2, dtype=torch.float32)
    present = FLOAT * (30 * 2 + 4 * 30 + 4 * 2)
    # Largest moment: the weight gradient is formed from the gradient of the output. Loss and its gradient: 1 each.
    backward = FLOAT * (4 * 2 + 30 * 2)
    assert present + backward <= lowrank.peak_bytes(model, weighted, batch) <= present + backward + 2 * FLOAT


@pytest.mark.cpu_only("a GPU's allocator gives whole blocks")
def test_peak_bytes_of_inference_equal_a_count_by_hand():
    model = nn.Linear(30, 2, bias=False)
    batch = random_tensor(4, 30, dtype=torch.float32), random_tensor(4, 2, dtype=torch.float32)
    present = FLOAT * (30 * 2 + 4 * 30 + 4 * 2)
    forward = FLOAT * (4 * 2 + 4 * 2)  # the output and its product with the weights
    assert lowrank.peak_bytes(model, weighted, batch, backward=False) == present + forward


@pytest.mark.cpu_only("a GPU's allocator gives whole blocks")
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_peak_grows_by_one_activation_a_layer_in_training_and_not_at_all_in_inference(depth):
    model, x = nn.Sequential(*[nn.ReLU() for _ in range(depth)]), random_tensor(64, 64, dtype=torch.float32)
    model.append(nn.Linear(64, 1, bias=False))
    model.insert(0, nn.Linear(64, 64, bias=False))
    activation, weights = FLOAT * 64 * 64, FLOAT * (64 * 64 + 64)
    peaks = [lowrank.peak_bytes(model, total, x, backward=backward) for backward in (False, True)]
    # Inference: input and output of one layer beside the batch. Training: also every ReLU's result, and with the
    # first layer's weight gradient (one activation in size) the gradient that it is formed from.
    assert peaks[0] == weights + activation + 2 * activation
    assert peaks[1] >= weights + activation + (depth + 1) * activation
    if depth > 1:
        shorter = lowrank.peak_bytes(model[1:], total, x)
        assert peaks[1] > shorter


@pytest.mark.cpu_only("a GPU's QR and eigenvectors take work space of megabytes")
@pytest.mark.parametrize("method", [ASI(2), ASI(2, algorithm="published"), HOSVD(0.3)])
def test_conversion_lowers_the_peak_of_a_deep_network(method):
    model = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(8)])
    x = (random_tensor(512, 1) @ random_tensor(1, 16, seed=1)).float()  # of rank one, so that little must be kept
    stock = lowrank.peak_bytes(model, total, x)
    lowrank.convert(model, [str(index) for index in range(8)], method)
    # Seven hidden activations are no longer kept; the decomposition's own work space may take some of it back.
    assert lowrank.peak_bytes(model, total, x) < stock - 3 * FLOAT * 512 * 16


# The model stays as it was


class Restless(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.last, self.head = nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(F.relu(self.last(self.drop(self.norm(self.conv(x))))).mean((2, 3)))


def failing(model, batch):
    model(batch[0]).sum().backward()
    raise KeyError("labels")


def saved(model, loss, batch):
    lowrank.saved_bytes(model, loss, batch)


def peak(model, loss, batch):
    lowrank.peak_bytes(model, loss, batch)


@pytest.mark.parametrize("measure", [saved, peak])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", [None, ASI(2), GradientFilter(2)])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_measurement_leaves_the_model_as_it_was(measure, fails, method, stepped):
    model, batch = Restless(), labelled_batch()
    model.norm.weight.requires_grad_(False)
    if method is not None:
        lowrank.convert(model, ["conv", "last"], method)
    if stepped:
        cross_entropy(model, batch).backward()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    grads = [(p, p.grad, None if p.grad is None else p.grad.clone(), p.requires_grad) for p in model.parameters()]
    random_state = torch.get_rng_state()
    if fails:
        with pytest.raises(KeyError):
            measure(model, failing, batch)
    else:
        measure(model, cross_entropy, batch)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    for parameter, grad, value, flag in grads:
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, value)
        assert parameter.requires_grad == flag
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("measure", [lowrank.saved_bytes, lowrank.peak_bytes])
def test_measuring_twice_gives_the_same(measure):
    model, batch = lowrank.convert(TwoConvolutions(), ["first", "second"], ASI(2)), labelled_batch()
    assert measure(model, cross_entropy, batch) == measure(model, cross_entropy, batch)


def test_measuring_without_gradients_in_force_measures_training():
    model, batch = TwoConvolutions(), labelled_batch()
    expected = lowrank.saved_bytes(model, cross_entropy, batch)
    with torch.no_grad():
        assert lowrank.saved_bytes(model, cross_entropy, batch) == expected
        assert not torch.is_grad_enabled()


RESIDENT = """
import ctypes, gc, sys, torch
import lowrank
from torch import nn

def resident():
    _, all, of_files, *_ = map(int, open("/proc/self/statm").read().split())
    return (all - of_files) * 4096  # of files, such as libraries, the system takes back what it likes

torch.set_num_threads(1)
libc = ctypes.CDLL("libc.so.6")
libc.mallopt(-3, 65536)  # every large block is mapped by itself, and unmapped when it is freed
layers = [layer for _ in range(6) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())]
model = nn.Sequential(*layers).eval()
batch = torch.randn(16, 16, 96, 96)
if sys.argv[1] == "asi":
    lowrank.convert(model, lowrank.trailing_layers(model, "all"), lowrank.ASI(ranks=4))
loss = lambda m, b: m(b).mean()
loss(model, batch).backward()  # work space that PyTorch keeps for itself
model.zero_grad()
gc.collect()
libc.malloc_trim(0)
before = resident()
y = loss(model, batch)
libc.malloc_trim(0)
print(resident() - before, lowrank.saved_bytes(model, loss, batch) - batch.nbytes * (sys.argv[1] == "stock"))
"""


@pytest.mark.slow
@pytest.mark.cpu_only("resident memory")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read as Linux shows it")
@pytest.mark.parametrize("kind", ["stock", "asi"])
def test_saved_bytes_are_what_the_process_holds(kind):
    """Seen from outside, in a process of its own, with the graph alive; the batch was there before."""
    printed = subprocess.run([sys.executable, "-c", RESIDENT, kind], capture_output=True, text=True, check=True).stdout
    grown, saved = map(int, printed.split())
    assert grown == pytest.approx(saved, rel=0.05, abs=3 * 2**20)
    assert saved > 80 * 2**20 if kind == "stock" else saved < 6 * 2**20


HIGHEST = """
import ctypes, gc, sys, torch
import lowrank
from torch import nn

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

torch.set_num_threads(1)
libc = ctypes.CDLL("libc.so.6")
libc.mallopt(-3, 65536)  # every large block is mapped by itself, and unmapped when it is freed
model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(128, 128), nn.ReLU())))
batch = torch.randn(128, 256, 128)
if sys.argv[1] == "asi":
    lowrank.convert(model, lowrank.trailing_layers(model, "all", kind="linear"), lowrank.ASI(ranks=4))
loss = lambda m, b: m(b).mean()
loss(model, batch).backward()  # work space that PyTorch keeps for itself
model.zero_grad()
gc.collect()
libc.malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # the highest mark starts anew
before = status("VmRSS")
loss(model, batch).backward()
grown = status("VmHWM") - before
there = batch.nbytes + sum(parameter.nbytes for parameter in model.parameters())
print(grown, lowrank.peak_bytes(model, loss, batch) - there)
"""


@pytest.mark.slow
@pytest.mark.cpu_only("resident memory")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the highest mark is set back as Linux does it")
@pytest.mark.parametrize("kind", ["stock", "asi"])
def test_peak_bytes_are_the_highest_mark_of_the_process(kind):
    """Seen from outside, in a process of its own, over one step; batch and parameters were there before."""
    printed = subprocess.run([sys.executable, "-c", HIGHEST, kind], capture_output=True, text=True, check=True).stdout
    grown, peak = map(int, printed.split())
    assert grown == pytest.approx(peak, rel=0.05, abs=6 * 2**20)
    assert peak > 120 * 2**20 if kind == "stock" else peak < 60 * 2**20
