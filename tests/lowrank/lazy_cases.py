"""A convolution whose output is lazy, beside the stock one, and what the tests of its readers compare."""

import copy

import torch
from networks import frozen_statistics, with_statistics
from references import random_tensor
from torch import nn

import lowrank
from lowrank import HOSVD

SHAPE = (2, 3, 8, 7)


def pair(method=HOSVD(1.0), freeze=(), channels_last=False, **options):  # noqa: B008
    """Stock and converted: a convolution, a normalisation with running statistics, ReLU."""
    stock = nn.Sequential(nn.Conv2d(3, 4, 3, stride=(1, 2), **options), nn.BatchNorm2d(4), nn.ReLU())
    stock = frozen_statistics(with_statistics(stock)).double()
    for name in freeze:
        stock.get_parameter(name).requires_grad_(False)
    if channels_last:
        stock = stock.to(memory_format=torch.channels_last)
    return stock, lowrank.convert(copy.deepcopy(stock), ["0"], method)


def strides(tensor):
    """Where entries lie; of dimensions of size one nothing."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def run(model, use, x):
    """What `use(model, x)` gives, one tensor or several, and every gradient of them for random upstream gradients."""
    model.zero_grad()
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(True)
    torch.manual_seed(0)
    found = use(model, leaf * 1)
    found = list(found) if isinstance(found, list | tuple) else [found]
    for seed, tensor in enumerate(tensor for tensor in found if tensor.requires_grad):
        upstream = random_tensor(tensor.numel(), seed=seed, dtype=tensor.dtype).view(tensor.shape)
        tensor.backward(upstream, retain_graph=True)
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return {
        **{f"output {i}": tensor.detach() for i, tensor in enumerate(found)},
        "strides": [strides(tensor) for tensor in found],
        "tracked": [tensor.requires_grad for tensor in found],
        "input": leaf.grad,
        **gradients,
    }


def assert_the_same(use, x=None, tolerance=1e-10, **options):
    """A use gives the same with the stock and the converted model."""
    x = random_tensor(*SHAPE) if x is None else x
    expected, found = (run(model, use, x) for model in pair(**options))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")
