"""Subspace iterations in one compiled call against PyTorch's operators in double precision."""

import pytest
import torch
from references import fibres_by_definition, random_tensor, same_span, subspace_step

from lowrank import kernels
from lowrank.kernels import iterations, library
from lowrank.tensors.decompose import subspace_iteration

pytestmark = [
    pytest.mark.cpu_only("compiled kernels work in its memory"),
    pytest.mark.skipif(not kernels.status().active, reason=str(kernels.status())),
]
# Rows that lie behind each other and rows within others; as long as vectors, longer and shorter; several pieces.
CASES = [
    ((3, 40, 7, 7), (2, 5, 3, 2)),
    ((2, 33, 5, 5), (1, 8, 4, 4)),
    ((9, 4, 16, 3), (9, 3, 4, 1)),
    ((1, 6, 40, 40), (1, 4, 9, 7)),
    ((5, 3, 2, 2), (2, 2, 2, 1)),
    ((4, 50, 37), (2, 7, 6)),
    ((70, 300), (11, 11)),
    ((2, 3, 4, 5, 6), (2, 2, 3, 2, 3)),
    ((300, 9, 7), (300, 3, 7)),
    ((16, 200, 14, 14), (4, 8, 3, 3)),
    ((600, 260), (600, 8)),
    ((90, 24, 17), (90, 8, 17)),
    ((24, 9000), (3, 9000)),
]
# Large enough that the first mode is iterated on a part of its fibres: of planes, and of columns, with the share.
SAMPLED = [
    ((32, 27, 24, 20), (4, 8, 3, 3), 8),  # of rows that no vector fills
    ((32, 20, 30, 28), (4, 8, 3, 3), 8),
    ((8, 44, 34, 28), (4, 8, 3, 3), 4),
    ((40, 200, 9, 13), (4, 8, 3, 3), -4),
    ((2, 22, 83, 76), (2, 8, 4, 4), -4),
    ((3, 16, 64, 100), (3, 8, 2, 4), -4),
    ((33, 140, 88), (33, 140, 8), 4),
    ((32, 60, 150), (4, 2, 150), -8),
    ((40, 60, 30, 5), (40, 60, 5, 5), 8),
    ((2, 60, 30, 80), (2, 60, 5, 80), -4),
    ((32, 32, 24, 20), (4, 8, 3, 3), 16),
    ((48, 40, 20, 24), (4, 8, 3, 3), 16),
    ((64, 40, 14, 14), (4, 8, 3, 3), -12),
    ((65, 90, 7, 7), (65, 8, 7, 7), -3),  # the last turns have fewer images
]


@pytest.fixture(params=[4, 8, 16])
def width(request):
    """As on a processor whose vectors have at most so many numbers."""
    library.library().set_width(request.param)
    yield
    library.library().set_width(16)


def starts_for(shape, ranks, seed=0):
    return [
        None if r == n else random_tensor(n, r, seed=seed + mode).float()
        for mode, (n, r) in enumerate(zip(shape, ranks, strict=True))
    ]


def double(starts):
    return [None if start is None else start.double() for start in starts]


def in_one_call(monkeypatch):
    """What the compiled function answers from here on."""
    answers, own = [], iterations.subspace
    monkeypatch.setattr(iterations, "subspace", lambda *args: answers.append(own(*args)) or answers[-1])
    return answers


@pytest.mark.parametrize(("shape", "ranks"), [*CASES, *((shape, ranks) for shape, ranks, _ in SAMPLED)])
@pytest.mark.parametrize("held", [(), (1, 2)])
def test_core_and_bases_are_those_of_the_operators(width, shape, ranks, held, monkeypatch):
    x, starts = random_tensor(*shape, seed=9).float(), starts_for(shape, ranks)
    answers = in_one_call(monkeypatch)
    tucker, bases = subspace_iteration(x, starts, held=held)
    assert answers[-1] is not None
    exact, exact_bases = subspace_iteration(x.double(), double(starts), held=held)
    scale = exact.core.abs().max()
    torch.testing.assert_close(tucker.core.double(), exact.core, rtol=0, atol=2e-5 * scale.item())
    for mode, (found, wanted) in enumerate(zip(bases, exact_bases, strict=True)):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert found.is_contiguous()
            assert mode not in held or torch.equal(found, starts[mode])
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("shape", "ranks"), CASES[:4])
def test_bases_span_what_one_iteration_by_definition_spans(width, shape, ranks):
    x, starts = random_tensor(*shape, seed=3), starts_for(shape, ranks)
    _, bases = subspace_iteration(x.float(), starts)
    named = {mode: start.double() for mode, start in enumerate(starts) if start is not None}
    for mode, basis in subspace_step(x, named, sequential=True).items():
        assert same_span(bases[mode].double(), basis, 1e-4)


@pytest.mark.parametrize(("shape", "ranks", "share"), SAMPLED)
def test_of_a_large_tensor_a_mode_is_iterated_on_the_fibres_that_are_named(width, shape, ranks, share, monkeypatch):
    x, starts = random_tensor(*shape, seed=3), starts_for(shape, ranks)
    steps, own = [], iterations.subspace
    monkeypatch.setattr(iterations, "subspace", lambda x, asked, *begun: steps.extend(asked) or own(x, asked, *begun))
    _, bases = subspace_iteration(x.float(), starts)
    mode, start, named, *_ = steps[0]
    assert named == share
    a = fibres_by_definition(x, mode, share)
    assert same_span(bases[mode].double(), torch.linalg.qr(a @ (a.mT @ start.double()))[0], 1e-4)


@pytest.mark.parametrize("passes", [1, 5, 16, 33])
@pytest.mark.parametrize(("shape", "ranks", "share"), SAMPLED)
def test_in_every_pass_they_are_those_that_the_operators_take(width, shape, ranks, share, passes, monkeypatch):
    x, starts = random_tensor(*shape, seed=3).float(), starts_for(shape, ranks)
    answers = in_one_call(monkeypatch)
    tucker, bases = subspace_iteration(x, starts, passes_before=passes)
    assert answers[-1] is not None
    exact, exact_bases = subspace_iteration(x.double(), double(starts), passes_before=passes)
    torch.testing.assert_close(tucker.core.double(), exact.core, rtol=0, atol=2e-5 * exact.core.abs().max().item())
    for found, wanted in zip(bases, exact_bases, strict=True):
        if found is not None:
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("held", [(), (1, 3), (0, 1, 2, 3)])
def test_memory_order_is_no_matter(width, held):
    x = random_tensor(3, 20, 9, 11, seed=1).float()
    starts = [torch.linalg.qr(start)[0].contiguous() for start in starts_for((3, 20, 9, 11), (2, 5, 3, 4))]
    wanted, _ = subspace_iteration(x.double(), double(starts), held=held)
    for laid_out in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(0, 3).contiguous().transpose(0, 3),
        torch.stack([x, x], 4)[..., 0],
    ):
        by_columns = [start.mT.contiguous().mT for start in starts]
        tucker, _ = subspace_iteration(laid_out, by_columns, held=held)
        torch.testing.assert_close(tucker.dense().double(), wanted.dense(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_and_the_next_step_recovers(width, bad):
    shape, ranks = (3, 20, 7, 7), (2, 5, 3, 2)
    x, starts = random_tensor(*shape, seed=4).float(), starts_for(shape, ranks)
    broken = x.clone()
    broken[1, 4, 2, 6] = bad
    tucker, bases = subspace_iteration(broken, starts)
    assert not tucker.dense().isfinite().any()
    recovered, _ = subspace_iteration(x, bases)
    with library.plain():
        plain, _ = subspace_iteration(x, bases)
    assert recovered.core.norm() > 0.1 * x.norm()
    torch.testing.assert_close(recovered.dense(), plain.dense(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("x", [torch.zeros(4, 9, 5), torch.ones(4, 9, 5), 1e-15 * torch.ones(4, 9, 5)])
def test_of_less_rank_than_asked_for_bases_are_orthonormal_still(width, x):
    tucker, bases = subspace_iteration(x, starts_for((4, 9, 5), (2, 4, 2)))
    torch.testing.assert_close(tucker.dense(), x, rtol=1e-4, atol=1e-20)
    for basis in bases:
        torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)


def test_several_threads_do_what_one_does(width):
    shape, ranks = (16, 64, 28, 28), (4, 8, 3, 3)
    x, starts, before = random_tensor(*shape).float(), starts_for(shape, ranks), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            tucker, bases = subspace_iteration(x, starts)
            found.append((tucker.core, *bases))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_what_it_is_not_made_for_is_left_to_the_operators():
    def takes(x, *ranks):
        starts = starts_for(x.shape, ranks)
        steps = [iterations.Iteration(mode, start, 1) for mode, start in enumerate(starts) if start is not None]
        return iterations.subspace(x, steps) is not None

    ones = torch.ones(4, 5, 6)
    assert takes(ones, 2, 3, 2)
    assert not takes(ones.double(), 2, 3, 2)
    assert not takes(ones.half(), 2, 3, 2)
    assert not takes(ones.transpose(0, 1), 2, 3, 2)
    assert not takes(ones, 4, 5, 6)  # nothing to do
    assert not takes(torch.ones(0, 5, 6), 0, 2, 6)
    assert not takes(torch.ones(200, 200), 129, 200)
    assert not takes(torch.ones(5000, 3), 2, 3)
    assert not takes(torch.ones(400, 1500), 9, 1500)  # which BLAS does faster
    assert not takes(torch.ones(2, *[1] * 7, 2), 1, *[1] * 7, 2)


def test_bases_that_lie_out_of_order_are_read_in_theirs():
    x = random_tensor(3, 40, 7, 9).float()
    for mode, rank in ((1, 5), (2, 3), (3, 2)):
        columns = random_tensor(rank, x.shape[mode], seed=mode).float().mT  # not contiguous
        apart = random_tensor(2 * x.shape[mode], rank, seed=mode).float()[::2]
        for start in (columns, apart):
            for share in (iterations.HELD, 1):
                core, (basis,) = iterations.subspace(x, [iterations.Iteration(mode, start, share)])
                wanted, (other,) = iterations.subspace(x, [iterations.Iteration(mode, start.contiguous(), share)])
                assert torch.equal(core, wanted)
                assert torch.equal(basis, other)
                assert (basis is start) is (share == iterations.HELD)
