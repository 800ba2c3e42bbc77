"""The first two modes of a tensor the other way round, by a compiled copy, to the last bit."""

import pytest
import torch
from references import random_tensor

from lowrank import kernels
from lowrank.kernels import library, passes

pytestmark = [
    pytest.mark.cpu_only("compiled kernels work in its memory"),
    pytest.mark.skipif(not kernels.status().active, reason=str(kernels.status())),
]
# Rows of each length that a vector has, and one more; fewer of `left` than come next to each other, and a rest of them.
SHAPES = [
    (1, 40, 9),
    (7, 33, 5),
    (8, 64, 4),
    (16, 50, 9),
    (17, 21, 3),
    (64, 70, 16),
    (9, 16, 2),
    (130, 8, 7),
    (70, 90, 12),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[4, 8, 16])
def width(request):
    """As on a processor whose vectors have at most so many numbers."""
    library.library().set_width(request.param)
    yield
    library.library().set_width(16)


def taken(monkeypatch):
    """Whether the compiled copy was there for each call from here on."""
    answers, own = [], passes.kernel_for
    monkeypatch.setattr(passes, "kernel_for", lambda *args: answers.append(own(*args)) or answers[-1])
    return answers


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_transpose(width, shape, dtype, monkeypatch):
    x = random_tensor(*shape).to(dtype)
    x.view(-1)[::11] = float("nan")
    answers = taken(monkeypatch)
    room = torch.full((2 + x.numel(),), 7.0, dtype=dtype)  # nothing around it is written to
    out = room[1:-1].view(shape[1], shape[0], shape[2])
    for found in (passes.swapped(x), passes.swapped(x, out)):
        assert found.is_contiguous()
        torch.testing.assert_close(found, x.transpose(0, 1), rtol=0, atol=0, equal_nan=True)
    assert room[0] == 7
    assert room[-1] == 7
    assert len(answers) == 2 or shape[2] * x.itemsize < 5
    assert all(answers)


@pytest.mark.parametrize(
    "x",
    [
        random_tensor(6, 30, 5),
        random_tensor(6, 30, 40).float(),
        random_tensor(6, 30, 1).float(),
        random_tensor(6, 2, 5).float(),
        random_tensor(0, 30, 5).float(),
        random_tensor(6, 0, 5).float(),
        random_tensor(30, 6, 5).float().transpose(0, 1),
        random_tensor(1, 30, 5).float().expand(6, -1, -1),
    ],
    ids=["double", "long rows", "single numbers", "few rows", "empty", "no rows", "out of order", "expanded"],
)
def test_others_are_pytorchs(x):
    found, out = passes.swapped(x), x.new_empty(x.shape[1], x.shape[0], x.shape[2])
    assert found.is_contiguous()
    assert torch.equal(found, x.transpose(0, 1))
    assert torch.equal(passes.swapped(x, out), x.transpose(0, 1))


def test_it_is_the_same_with_any_number_of_threads():
    x, before = random_tensor(203, 700, 9).float(), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(passes.swapped(x), x.transpose(0, 1))
    finally:
        torch.set_num_threads(before)
