"""Masks of padding tokens: which one holds, where, and for whom."""

import threading

import pytest
import torch
from references import DEVICE, random_tensor
from torch import nn

import lowrank
from lowrank import ASI, HOSVD, SVD, Vanilla

SHAPE, SHORT, SHORTER = (3, 6, 5), (6, 2, 4), (1, 2, 3)


def mask_of(lengths):
    return torch.arange(SHAPE[1]) < torch.tensor(lengths)[:, None]


def model_of(method):
    return lowrank.convert(nn.Sequential(nn.Linear(5, 4)).double(), ["0"], method)


def gradient(model, x, mask=None):
    """The weight gradient for a gradient that is not zero in the padding, which shows what was kept there."""
    model.zero_grad()
    with lowrank.token_mask(mask):
        y = model(x)
    y.backward(random_tensor(*y.shape, seed=7))
    return model[0].weight.grad.clone()


def expected(x, lengths=None):
    kept = x if lengths is None else x * mask_of(lengths)[..., None]
    return torch.einsum("bno,bni->oi", random_tensor(3, 6, 4, seed=7), kept)


@pytest.mark.parametrize("method", [SVD(1.0), HOSVD(1.0), ASI(99)], ids=lambda method: method.tag)
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float64])
def test_padding_is_left_out_of_what_is_compressed(method, kind):
    model, x = model_of(method), random_tensor(*SHAPE)
    if isinstance(method, ASI):
        x = x[..., :1] * x[:, :1]  # of low rank, so that it is not kept as it is
    torch.testing.assert_close(gradient(model, x, mask_of(SHORT).to(kind)), expected(x, SHORT))
    torch.testing.assert_close(gradient(model, x * 1), expected(x))


def test_the_output_is_that_of_the_whole_input():
    model, x = model_of(HOSVD(0.5)), random_tensor(*SHAPE)
    with lowrank.token_mask(mask_of(SHORT)):
        torch.testing.assert_close(model(x), lowrank.revert(model)(x))


def test_of_several_masks_the_innermost_holds_and_the_outer_one_again_after_it():
    model, x = model_of(HOSVD(1.0)), random_tensor(*SHAPE)
    with lowrank.token_mask(mask_of(SHORT)):
        torch.testing.assert_close(gradient(model, x * 1, mask_of(SHORTER)), expected(x, SHORTER))
        with lowrank.token_mask(None):
            y = model(x * 1)
        y.backward(random_tensor(*y.shape, seed=7))
        torch.testing.assert_close(model[0].weight.grad, expected(x, SHORTER) + expected(x))
        model.zero_grad()
        y = model(x * 1)
        y.backward(random_tensor(*y.shape, seed=7))
        torch.testing.assert_close(model[0].weight.grad, expected(x, SHORT))
    torch.testing.assert_close(gradient(model, x * 1), expected(x))


def test_an_error_within_ends_it():
    model, x = model_of(HOSVD(1.0)), random_tensor(*SHAPE)
    with pytest.raises(KeyError), lowrank.token_mask(mask_of(SHORT)):
        raise KeyError
    torch.testing.assert_close(gradient(model, x), expected(x))


def test_another_thread_has_no_mask():
    model, x, found = model_of(HOSVD(1.0)), random_tensor(*SHAPE), []
    with lowrank.token_mask(mask_of(SHORT)):
        thread = threading.Thread(target=lambda: found.append(gradient(model, x)))
        thread.start()
        thread.join()
    torch.testing.assert_close(found[0], expected(x))


def test_two_threads_have_their_own():
    inside, done, found = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60), {}

    def work(lengths):
        torch.set_default_device(DEVICE)  # of this thread
        model, x = model_of(HOSVD(1.0)), random_tensor(*SHAPE)
        with lowrank.token_mask(mask_of(lengths)):
            inside.wait()  # both are within their masks
            y = model(x)
            done.wait()
        y.backward(random_tensor(*y.shape, seed=7))
        found[lengths] = (model[0].weight.grad, expected(x, lengths))

    threads = [threading.Thread(target=work, args=(lengths,)) for lengths in (SHORT, SHORTER)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for lengths in (SHORT, SHORTER):
        torch.testing.assert_close(*found[lengths])


def test_the_same_input_under_another_mask_is_compressed_anew():
    model, x = model_of(HOSVD(1.0)), random_tensor(*SHAPE)
    with lowrank.token_mask(mask_of(SHORT)):
        first = model(x)
    torch.testing.assert_close(gradient(model, x), expected(x))
    torch.testing.assert_close(gradient(model, x, mask_of(SHORTER)), expected(x, SHORTER))
    del first


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 5), (6, 6, 5), (2, 3, 6, 5)])
def test_inputs_of_other_sizes_are_left_as_they_are(shape):
    model, x = model_of(HOSVD(1.0)), random_tensor(*shape)
    y = model(x)
    grad = random_tensor(*y.shape, seed=7)
    y.backward(grad)
    whole = model[0].weight.grad.clone()
    model.zero_grad()
    with lowrank.token_mask(mask_of(SHORT)):
        model(x * 1).backward(grad)
    torch.testing.assert_close(model[0].weight.grad, whole)


def test_what_is_kept_exactly_keeps_padding_too():
    model, x = model_of(Vanilla()), random_tensor(*SHAPE)
    torch.testing.assert_close(gradient(model, x, mask_of(SHORT)), expected(x))


@pytest.mark.parametrize("method", [HOSVD(1.0), SVD(1.0), ASI(99)], ids=lambda method: method.tag)
def test_channels_are_no_tokens(method):
    """Of a convolution, where there happen to be as many."""
    convolution = nn.Conv1d(SHAPE[1], 4, 3).double()
    model = lowrank.convert(nn.Sequential(convolution), ["0"], method, everywhere=True)
    x = random_tensor(*SHAPE[:2], 9)
    found = [torch.autograd.grad(model(x).square().sum(), convolution.weight)[0]]
    with lowrank.token_mask(mask_of(SHORT)):
        found.append(torch.autograd.grad(model(x).square().sum(), convolution.weight)[0])
    torch.testing.assert_close(*found)
