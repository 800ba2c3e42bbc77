"""Compiled kernels against PyTorch's operators; skipped where there is no compiler."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import lowrank
from lowrank import kernels
from lowrank.exact import bits
from lowrank.exact.activations import dropout, hardsigmoid, hardtanh, leaky_relu, relu, relu6
from lowrank.kernels import build, library, passes

pytestmark = pytest.mark.cpu_only("compiled kernels work in its memory")
needs_kernels = pytest.mark.skipif(not kernels.status().active, reason=str(kernels.status()))
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 6.0, -3.0, 3.0, 1e-45, -1e-45, 1e38, -1e38]
GATES = [bits.Gate("above"), bits.Gate("between", 0, 6), bits.Gate("strictly above"), bits.Gate("not zero")]
SLOPES = [bits.Slopes(), bits.Slopes(1 / 6), bits.Slopes(outer=0.01), bits.Slopes(1 / 0.7, 0.0)]


def values(count, dtype):
    x = 4 * torch.randn(count, dtype=dtype, generator=torch.Generator().manual_seed(count))
    places = torch.randperm(count, generator=torch.Generator().manual_seed(1))[: len(SPECIAL)]
    x[places] = torch.tensor(SPECIAL, dtype=dtype)[: len(places)]
    return x


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1001, 3 * 65536 + 5])
def test_bits_are_those_of_the_rule_and_gradients_those_of_the_operators(count, dtype):
    """Of NaN a rule says what it becomes: PyTorch's Hardtanh has it in two ways, by the place in memory."""
    x, grad = values(count, dtype), values(count, dtype).flip(0)
    rules = [~(x <= 0), (x > 0) & (x < 6), x > 0, x != 0]
    for gate, rule in zip(GATES, rules, strict=True):
        packed, place = bits.pack(x, gate)
        assert torch.equal(bits.spread(packed)[:count], rule), gate
        assert not bits.spread(packed)[count:].any()
        for slopes in SLOPES:
            found = bits.masked(grad, packed, place, slopes)
            with library.plain():
                plain = bits.masked(grad, packed, place, slopes)
            torch.testing.assert_close(found, plain, rtol=0, atol=0, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("first", [0, 1, 4])  # where it is written to: vectors lie across lines of the cache, or not
@pytest.mark.parametrize("slopes", SLOPES)
def test_a_gradient_that_leaves_the_cache_is_written_past_it(slopes, first, threads):
    count = 2**22 + 3
    grad, packed = values(count, torch.float32), torch.arange(-(-count // 8)).to(torch.uint8)
    with library.plain():
        wanted = bits.masked(grad, packed, [0], slopes)
    out = torch.full((first + count + 8,), 7.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert passes.apply(grad, packed, slopes.inner, slopes.outer, out[first : first + count])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out[first : first + count], wanted, rtol=0, atol=0, equal_nan=True)
    assert (out[:first] == 7).all()
    assert (out[first + count :] == 7).all()


@needs_kernels
def test_the_operators_pack_the_same_bits():
    x = values(1001, torch.float32).nan_to_num(6)
    for gate in GATES:
        with library.plain():
            expected, _ = bits.pack(x, gate)
        assert torch.equal(bits.pack(x, gate)[0], expected), gate


@needs_kernels
@pytest.mark.parametrize("layout", ["dense", "channels last", "transposed", "gaps", "expanded"])
def test_strides(layout):
    x = torch.randn(3, 8, 5, 6)
    x = {
        "dense": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3),
        "gaps": x[..., ::2],
        "expanded": x[:, :1].expand(3, 8, 5, 6),
    }[layout]
    grad = torch.randn(x.shape)
    packed = bits.pack(x, bits.Gate("above"))
    assert torch.equal(bits.masked(grad, *packed, bits.Slopes()), torch.where(x > 0, grad, 0))


@needs_kernels
@pytest.mark.parametrize("threads", [2, 3])
def test_several_threads_do_what_one_does(threads):
    x, a, b = torch.randn(5 * 65536 + 3), torch.randn(70, 4099), torch.randn(70, 4099)
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            packed, place = bits.pack(x, GATES[1])
            found.append((packed, bits.masked(x, packed, place, SLOPES[1]), passes.row_products(a, b)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 16), (64, 577), (2, 70000), (0, 4), (4, 0)])
def test_products_of_rows(shape):
    a, b = torch.randn(shape), torch.randn(shape)
    wanted = (a.double() * b.double()).sum(1).float()
    torch.testing.assert_close(passes.row_products(a, b), wanted, rtol=1e-5, atol=1e-4)
    scales = torch.randn(len(a))
    scaled, before = b * scales[:, None], a.clone()
    torch.testing.assert_close(passes.row_products(a, b, scales), wanted, rtol=1e-5, atol=1e-4)
    assert torch.equal(b, scaled)
    assert torch.equal(a, before)
    assert passes.row_products(a, b, scales.double()) is None


@needs_kernels
@pytest.mark.parametrize(
    ("own", "stock"),
    [
        (relu, F.relu),
        (relu6, F.relu6),
        (lambda x: hardtanh(x, -0.5, 2), lambda x: F.hardtanh(x, -0.5, 2)),
        (hardsigmoid, F.hardsigmoid),
        (lambda x: leaky_relu(x, 0.2), lambda x: F.leaky_relu(x, 0.2)),
        (lambda x: dropout(x, 0.3), lambda x: F.dropout(x, 0.3)),
    ],
    ids=["relu", "relu6", "hardtanh", "hardsigmoid", "leaky_relu", "dropout"],
)
def test_functions_have_the_gradients_of_pytorch(own, stock):
    grad, found = torch.randn(33, 65), []
    for function in (own, stock):
        x = torch.randn(33, 65, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(5)
        function(x).backward(grad)
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


class Own(torch.Tensor):
    """A class of somebody's code."""


@needs_kernels
def test_what_is_not_plain_memory_is_left_alone():
    """Fake, meta and batched tensors, half precision, views with gaps, and all under a dispatch mode."""
    ones, out = torch.ones(8), torch.empty(1, dtype=torch.uint8)

    def takes(x, bits=out):
        return passes.pack(x, "above", 0.0, 0.0, bits)

    assert takes(ones)
    with torch._subclasses.FakeTensorMode() as mode:
        assert not takes(torch.ones(8))
        assert not takes(mode.from_tensor(ones))
    with FlopCounterMode(display=False):
        assert not takes(ones)
    assert not any(map(takes, (ones.half(), ones.to("meta"), torch.ones(16)[::2], torch._efficientzerotensor(8))))
    assert not takes(ones, out.to("meta"))
    assert not takes(ones.as_subclass(Own))
    taken = []
    torch.func.vmap(lambda x: taken.append(takes(x)) or x)(torch.ones(2, 8))
    assert taken == [False]
    with torch.inference_mode():
        assert takes(torch.ones(8))


TRAINED = """
import torch
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
import lowrank
from lowrank import kernels
from lowrank.exact.activations import hardsigmoid, relu
torch.set_default_device("cpu")
x = torch.zeros(1, requires_grad=True)
own, stock = (torch.autograd.grad(f(x), x)[0] for f in (hardsigmoid, torch.nn.functional.hardsigmoid))
assert own == stock  # whatever the defaults were
torch.set_default_dtype(torch.float32)
x = torch.arange(-8.0, 8).requires_grad_()
relu(x).backward(torch.ones(16))
assert torch.equal(x.grad, (x.detach() > 0).float())
print(kernels.status())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "said"),
    [({"LOWRANK_KERNELS": "off"}, "LOWRANK_KERNELS is off"), ({"CC": "/bin/false"}, "/bin/false failed")],
)
def test_without_a_library_training_is_silent_and_the_status_says_why(tmp_path, environment, said):
    environment = {**os.environ, "LOWRANK_CACHE": str(tmp_path), "LOWRANK_KERNELS": "auto", **environment}
    done = subprocess.run([sys.executable, "-c", TRAINED], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("no compiled kernels")
    assert said in done.stdout
    assert not done.stderr
    assert not list(tmp_path.iterdir())


def test_another_word_for_the_switch_is_refused(monkeypatch):
    monkeypatch.setenv("LOWRANK_KERNELS", "of")
    for ask in (kernels.wanted, library._loaded.__wrapped__, library._loaded_gpu.__wrapped__):
        with pytest.raises(lowrank.SettingError, match="LOWRANK_KERNELS is 'of'; allowed: auto, off, or leave it out"):
            ask()


def test_a_missing_compiler_and_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(build.Unavailable, match="no C compiler: CC names 'no-such-compiler'"):
        build.built()
    monkeypatch.setenv("CC", "cc '")
    with pytest.raises(build.Unavailable, match="no command"):
        build.built()
    monkeypatch.setenv("CC", sys.executable)
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.Unavailable, match="LOWRANK_CACHE names a folder"):
        build.built()


@pytest.mark.slow
@needs_kernels
def test_what_builds_at_once_leaves_one_library_and_a_damaged_one_is_built_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWRANK_CACHE", "new")
    monkeypatch.setattr(build, "OPTIONS", ("-O0", *build.OPTIONS[1:]))  # built three times, and never loaded
    with ThreadPoolExecutor(2) as pool:
        paths = set(pool.map(lambda _: build.built(), range(2)))
    assert paths == set((tmp_path / "new").iterdir())
    assert len(paths) == 1
    (path,) = paths
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])  # to load this one would end the process
    assert build.built().read_bytes() == whole


@needs_kernels
def test_a_switch_within_the_process():
    with library.plain():
        assert not kernels.status().active
        assert passes.row_products(torch.ones(2, 2), torch.ones(2, 2)) is None
    assert kernels.status().active


CLAMPS = {
    "relu": (relu, F.relu),
    "relu6": (relu6, F.relu6),
    "hardtanh": (lambda x, inplace: hardtanh(x, -2.5, 0.25, inplace), lambda x, i: F.hardtanh(x, -2.5, 0.25, i)),
}


LAYOUTS = {
    "dense": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3),
    "one image": lambda x: x[:1, :, :1].contiguous(memory_format=torch.channels_last),
    "one row": lambda x: x[:1, :, :1].to(memory_format=torch.channels_last),
    "odd strides": lambda x: torch.empty_strided((1, 16, 1, 53), (999, 1, 777, 16)).copy_(x[:1, :, :1]),
    "gaps": lambda x: x[..., ::2],
    "nothing": lambda x: x[:0],
}


def clamped(function, x, inplace):
    """What a function makes of a tensor laid out as `x`, its gradient where that is no NaN, and strides."""
    leaf = torch.empty_strided(x.shape, x.stride()).copy_(x).requires_grad_()
    y = function(leaf.as_strided(x.shape, x.stride()) * 1 if inplace else leaf, inplace)
    (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return y.detach(), grad[~x.isnan()], y.stride()


@needs_kernels
@pytest.mark.parametrize("name", CLAMPS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("threads", [1, 3])
def test_values_and_bits_of_a_clamp_are_made_in_one_pass(name, inplace, layout, threads, monkeypatch):
    x = LAYOUTS[layout](values(3 * 16 * 61 * 53, torch.float32).view(3, 16, 61, 53))
    once, made = passes.clamp, []
    monkeypatch.setattr(passes, "clamp", lambda *given: made.append(once(*given)) or made[-1])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, grad, strides = clamped(CLAMPS[name][0], x, inplace)
        wanted, wanted_grad, wanted_strides = clamped(CLAMPS[name][1], x, inplace)
    finally:
        torch.set_num_threads(before)
    if layout not in ("gaps", "nothing"):  # of the first a product is dense, of the second there is none
        assert made == [True]
    numbers = ~wanted.isnan()
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y[numbers], wanted[numbers])
    if F.relu(torch.full((33,), -0.0)).signbit().unique().numel() == 1:  # on Arm they are of two kinds
        assert torch.equal(y[numbers].signbit(), wanted[numbers].signbit())
    assert torch.equal(grad, wanted_grad)
    assert strides == wanted_strides


@needs_kernels
def test_a_clamp_in_place_is_told_to_who_keeps_the_tensor():
    x = torch.randn(4, 5, requires_grad=True)
    y = x * 1
    square = y * y  # keeps y
    relu(y, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()
