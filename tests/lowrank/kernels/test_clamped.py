"""A clamp and the first step of a compression in one pass, against one after the other: the same to the last bit."""

import ctypes
import math

import pytest
import torch
from references import random_tensor

from lowrank import kernels
from lowrank.kernels import clamped, iterations, library, passes
from lowrank.kernels.clamped import clamp_and_begin
from lowrank.kernels.iterations import Iteration

pytestmark = [
    pytest.mark.cpu_only("compiled kernels work in its memory"),
    pytest.mark.skipif(not kernels.status().active, reason=str(kernels.status())),
]
# Shapes, mode, columns and share: planes of whole vectors and not, and a number of them that is none of whole bytes.
CASES = [
    ((16, 20, 28, 28), 2, 4, 8),
    ((16, 12, 17, 24), 2, 3, 4),
    ((9, 7, 33, 35), 2, 4, 3),
    ((6, 8, 33, 35), 2, 8, 3),
    ((8, 6, 20, 19), 2, 1, 2),
    ((6, 40, 31), 1, 5, 2),
]
GATES = {"above": (0.0, math.inf), "between": (-0.5, 0.75)}


@pytest.fixture(params=[4, 8, 16])
def width(request):
    """As on a processor whose vectors have at most so many numbers."""
    library.library().set_width(request.param)
    yield
    library.library().set_width(16)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def given(shape, mode, rank, share, turn=0):
    x = random_tensor(*shape, seed=4).float()
    x.view(-1)[::97] = -0.0
    return x, Iteration(mode, random_tensor(shape[mode], rank, seed=5).float(), share, turn)


def bits_of(x, filled=0):
    return torch.full((-(-x.numel() // 8),), filled, dtype=torch.uint8)


def one_after_the_other(x, gate, low, high, step):
    x, bits = x.clone(), bits_of(x)
    assert passes.clamp(x.view(-1), gate, low, high, bits, x.view(-1))
    left, (basis,) = iterations.subspace(x, [step])
    return x, bits, left, basis


def in_one(x, gate, low, high, step):
    x, bits = x.clone(), bits_of(x, 255)
    found = clamp_and_begin(x, gate, low, high, bits, step)
    return None if found is None else (x, bits, *found)


def same(one, other):
    return all(
        torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("shape", "mode", "rank", "share"), CASES)
def test_it_is_one_after_the_other(width, threads, shape, mode, rank, share, gate):
    for turn in range(share):
        x, step = given(shape, mode, rank, share, turn)
        found = in_one(x, gate, *GATES[gate], step)
        assert found is not None
        assert same(found, one_after_the_other(x, gate, *GATES[gate], step))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("gate", GATES)
def test_of_numbers_that_are_none_too(width, bad, gate):
    x, step = given(*CASES[0])
    x[3, 5, 7, 9] = x[8, 8] = bad
    found, wanted = in_one(x, gate, *GATES[gate], step), one_after_the_other(x, gate, *GATES[gate], step)
    assert torch.equal(found[1], wanted[1])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("gate", GATES)
def test_of_a_tensor_that_it_makes_zero(width, gate):
    x, step = given(*CASES[1])
    x = x * 0 - 9.0
    assert same(in_one(x, gate, *GATES[gate], step), one_after_the_other(x, gate, *GATES[gate], step))


@pytest.mark.parametrize(
    ("shape", "mode", "rank", "share"),
    [
        ((16, 20, 28, 28), 2, 4, 1),  # on all of it
        ((16, 20, 28, 28), 2, 4, iterations.HELD),
        ((8, 40, 14, 14), 1, 8, -4),  # on columns
        ((16, 4, 300, 500), 2, 4, 2),  # planes that are cut
        ((8, 20, 28, 3), 2, 4, 2),  # rows that are copied
        ((4, 3, 101, 401), 2, 4, 2),  # planes that begin within a byte of bits
        ((8, 20, 28, 28), 3, 4, 2),
        ((8, 20, 28, 28), 2, 200, 2),  # more columns than it takes
    ],
)
def test_of_others_nothing_is_done(width, shape, mode, rank, share):
    x, step = given(shape, mode, rank, share)
    if rank < 200:
        assert iterations.subspace(x, [step]) is not None
    before, bits = x.clone(), bits_of(x, 7)
    assert clamp_and_begin(x, "above", 0.0, math.inf, bits, step) is None
    assert torch.equal(x, before)
    assert (bits == 7).all()


def test_nor_of_tensors_of_another_kind():
    x, step = given(*CASES[0])
    last, bits = x.contiguous(memory_format=torch.channels_last), bits_of(x)
    for tensor in (x.double(), last, x[..., ::2], x.to(torch.bfloat16)):
        assert clamp_and_begin(tensor, "above", 0.0, math.inf, bits, step) is None
    assert clamp_and_begin(x, "above", 0.0, math.inf, bits.repeat_interleave(2)[::2], step) is None
    with library.plain():
        assert clamp_and_begin(x, "above", 0.0, math.inf, bits, step) is None


def test_no_more_scratch_is_written_than_was_asked_for(width, monkeypatch):
    own, rooms, beyond = clamped.kernel_and_room, [], 64

    def guarded(name, *tensors, **options):
        kernel, room_of = own(name, *tensors, **options)

        def run(plan, memory, *numbers):
            guard = (ctypes.c_float * beyond).from_address(memory[2] + 4 * rooms[-1])
            guard[:] = [7.0] * beyond
            kernel(plan, memory, *numbers)
            assert guard[:] == [7.0] * beyond

        return run, lambda plan: rooms.append(room_of(plan)) or rooms[-1] + beyond

    monkeypatch.setattr(clamped, "kernel_and_room", guarded)
    for case in CASES:
        x, step = given(*case)
        assert in_one(x, "above", 0.0, math.inf, step) is not None
    assert len(rooms) == len(CASES)
