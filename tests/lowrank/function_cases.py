"""What the tests of functions that keep less compare: values, gradients, strides, and bytes kept."""

import torch
from references import random_tensor


def compare(stock, own, x):
    """Outputs and input gradients of two functions of the same input, with a random upstream gradient."""
    results = []
    for function in (stock, own):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(True)
        torch.manual_seed(7)
        y = function(leaf * 1)  # a function may not change a leaf in place
        y.backward(random_tensor(*y.shape, seed=3, dtype=y.dtype))
        results.append((y.detach(), leaf.grad))
    (y, grad), (own_y, own_grad) = results
    assert torch.equal(y, own_y)
    assert y.stride() == own_y.stride()
    torch.testing.assert_close(own_grad, grad, rtol=1e-12, atol=1e-12)


def kept(function, x):
    """Bytes of distinct storages saved by a function of an intermediate tensor."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaf = x.clone().requires_grad_(True) * 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(leaf)
    assert y.requires_grad
    return sum(sizes.values())
