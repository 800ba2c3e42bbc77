"""The product of a matrix of few columns and each of many small matrices, by a compiled kernel."""

import pytest
import torch
from references import random_tensor

from lowrank import kernels
from lowrank.kernels import contractions, library
from lowrank.tensors.tucker import mode_product

pytestmark = [
    pytest.mark.cpu_only("compiled kernels work in its memory"),
    pytest.mark.skipif(not kernels.status().active, reason=str(kernels.status())),
]
# (left, n, right, m): whole and cut stretches, rests of those that are made together, one column and the most.
SHAPES = [(512, 8, 9, 32), (97, 16, 9, 257), (131, 1, 3, 400), (2048, 5, 2, 33), (75, 12, 7, 300), (7, 1, 9, 20011)]
AT_MOST = 2e-5


@pytest.fixture(params=[4, 8, 16])
def width(request):
    """As on a processor whose vectors have at most so many numbers."""
    library.library().set_width(request.param)
    yield
    library.library().set_width(16)


def given(left, n, right, m):
    return random_tensor(left, n, right).float(), random_tensor(m, n, seed=1).float()


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_product(width, shape):
    x, matrix = given(*shape)
    found = contractions.expand(x, matrix)
    wanted = torch.einsum("lnr,mn->lmr", x.double(), matrix.double())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=AT_MOST)
    turned = matrix.mT.contiguous().mT
    assert torch.equal(contractions.expand(x, turned), found)
    assert torch.equal(mode_product(x, matrix, 1), found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_place(width, bad):
    x, matrix = given(65, 8, 9, 300)
    x[3, 2, 4], matrix[7, 5] = bad, bad
    found = contractions.expand(x, matrix)
    wanted = torch.einsum("lnr,mn->lmr", x.double(), matrix.double()).float()
    torch.testing.assert_close(found, wanted, rtol=0, atol=AT_MOST, equal_nan=True)
    assert found.isfinite().logical_not().sum() == 300 + 65 * 9 - 1


def test_it_is_the_same_with_any_number_of_threads():
    x, matrix = given(1001, 8, 9, 64)
    wanted, before = contractions.expand(x, matrix), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(contractions.expand(x, matrix), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "shape", [(512, 17, 9, 64), (512, 8, 10, 64), (512, 8, 1, 640), (9000, 8, 9, 31), (64, 8, 9, 64), (47, 8, 9, 640)]
)
def test_others_are_left_to_the_operators(shape):
    x, matrix = given(*shape)
    assert contractions.expand(x, matrix) is None
    wanted = torch.einsum("lnr,mn->lmr", x.double(), matrix.double())
    torch.testing.assert_close(mode_product(x, matrix, 1).double(), wanted, rtol=0, atol=AT_MOST)


def test_so_are_other_layouts_and_precisions():
    x, matrix = given(512, 8, 9, 64)
    assert contractions.expand(x.double(), matrix.double()) is None
    assert contractions.expand(x.movedim(1, 2).contiguous().movedim(2, 1), matrix) is None
    with library.plain():
        assert contractions.expand(x, matrix) is None
