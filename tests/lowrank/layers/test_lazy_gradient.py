"""Gradients with respect to a convolution's output that nobody has read: by hooks, in parts, kept, and with a graph."""

import pytest
import torch
from lazy_cases import assert_the_same
from references import random_tensor


def hooked(hook):
    def use(model, x):
        y = model[0](x)
        y.register_hook(hook)
        return model[1](y)

    return use


@torch.inference_mode()
def measured(grad):
    assert grad.sum().is_inference()


def transformed(grad):
    assert torch.func.grad(lambda scale: (grad.detach() * scale).sum())(grad.new_ones(())).isfinite()


HOOKS = {
    **{"replaced": lambda grad: grad * 2, "changed": lambda grad: grad.mul_(2), "looked at": lambda grad: None},
    **{"measured in inference mode": measured, "within a transform": transformed},
}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_on_the_output(hook):
    assert_the_same(hooked(HOOKS[hook]))


def test_a_hook_on_the_output_sees_the_stock_gradient():
    seen = []
    assert_the_same(hooked(lambda grad: seen.append(grad.detach().clone())))
    torch.testing.assert_close(seen[1], seen[0])


def test_retain_grad():
    kept = []

    def use(model, x):
        y = model[0](x)
        y.retain_grad()
        z = model[1](y)
        z.backward(random_tensor(*z.shape, seed=3), retain_graph=True)
        kept.append(y.grad)
        return [z, y.grad.clone()]

    assert_the_same(use)
    assert all(isinstance(grad, torch.Tensor) and grad.shape == kept[0].shape for grad in kept)


@pytest.mark.parametrize("again", [False, True])
def test_the_gradient_with_respect_to_it(again):
    def use(model, x):
        y = model[0](x)
        z = model[1](y)
        (grad,) = torch.autograd.grad(z.square().sum(), y, create_graph=again, retain_graph=True)
        return [z, grad]

    assert_the_same(use)


def test_a_gradient_that_is_kept_stays_as_it_is():
    def use(model, x):
        y = model[0](x)
        z = model[1](y)
        grad = torch.ones_like(z)
        (found,) = torch.autograd.grad(z, y, grad, retain_graph=True)
        grad.zero_()
        return [z, found]

    assert_the_same(use)


def test_a_gradient_that_a_hook_hands_to_another_call():
    def use(model, x):
        seen, other, y = [], model[0](x.flip(3)), model[0](x)
        y.register_hook(seen.append)
        other.register_hook(lambda grad: seen[0])
        return model[1](other).cos() + model[1](y)

    assert_the_same(use)


def test_it_becomes_a_leaf_behind_a_frozen_start():
    """Features whose gradient is asked for, as attribution does."""

    def use(model, x):
        with torch.no_grad():
            x = x.detach()
        y = model[0](x).requires_grad_()
        z = model[1](y)
        z.backward(random_tensor(*z.shape, seed=3), retain_graph=True)
        return [z, y.grad]

    assert_the_same(use, freeze=["0.weight", "0.bias"])


def test_full_backward_hooks_of_modules():
    seen = {}

    def use(model, x):
        handles = [
            layer.register_full_backward_hook(
                lambda layer, grads, upstream, i=i: seen.setdefault(i, []).append([*grads, *upstream])
            )
            for i, layer in enumerate(model)
        ]
        y = model(x)
        for handle in handles:
            handle.remove()
        return y

    assert_the_same(use)
    for stock, converted in seen.values():
        torch.testing.assert_close(converted, stock)


def test_anomaly_detection():
    def use(model, x):
        with torch.autograd.detect_anomaly(check_nan=True):
            return model(x)

    with pytest.warns(UserWarning, match="Anomaly"):
        assert_the_same(use)


def test_saved_tensors_on_another_place():
    def use(model, x):
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    assert_the_same(use)


def test_a_hook_on_several_gradients_at_once():
    seen = []

    def use(model, x):
        y = model[0](x)
        torch.autograd.graph.register_multi_grad_hook([y, model[0].weight], lambda grads: seen.append(grads))
        return model[1](y)

    assert_the_same(use)
    torch.testing.assert_close([grad * 1 for grad in seen[1]], [grad * 1 for grad in seen[0]])


@pytest.mark.parametrize(
    "change", [lambda grads: (grads[0] * 3,), lambda grads: (grads[0].clone(),), lambda grads: None]
)
def test_a_hook_on_the_node_of_the_convolution(change):
    def use(model, x):
        y = model[0](x)
        z = model[1](y)
        y.grad_fn.register_prehook(change)
        return z

    assert_the_same(use)


PARTS = [("1.weight",), ("0.weight",), ("1.bias", "0.bias"), ("0.weight", "1.weight"), ("1.weight",)]


def test_parts_of_a_retained_graph_in_any_order():
    def use(model, x):
        y = model[0](x)
        z = model[1](y)
        grad = random_tensor(*z.shape, seed=3)
        found = [z]
        for names in PARTS:
            wanted = [model.get_parameter(name) for name in names]
            found += torch.autograd.grad(z, wanted, grad, retain_graph=True)
        return [*found, *torch.autograd.grad(z, [x, y, model[0].weight], grad, retain_graph=True)]

    assert_the_same(use)


def test_the_same_graph_twice():
    def use(model, x):
        z = model(x)
        z.backward(random_tensor(*z.shape, seed=3), retain_graph=True)
        return [z * z, z.mean()]

    assert_the_same(use)


def test_outputs_of_several_calls_in_one_backward_pass():
    def use(model, x):
        first, second = model[0](x), model[0](2 * x)
        return model[1](second) * model[1](first) + first

    assert_the_same(use)


GRADIENTS = {
    "expanded": lambda z: z.sum(),
    "of means": lambda z: z.mean((2, 3)),
    "channels last": lambda z: z.permute(0, 2, 3, 1).contiguous(),
    "of a part": lambda z: z[:, 1:3, ::2],
    "in pieces": lambda z: list(z.unbind(1)),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_of_any_layout(kind):
    assert_the_same(lambda model, x: GRADIENTS[kind](model[1](model[0](x))))
