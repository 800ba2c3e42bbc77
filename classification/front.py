"""The frozen front of a network: what no training step changes, so that it can be computed once per image.

With everything ahead of the trained layers frozen, and no augmentation, an image gives the same activations in every
epoch. Splitting the network there and keeping those activations leaves only the trained tail to be run in each step.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from classification.data.module import Activations
from experiment import ExperimentError
from lowrank.layers.swap import stock_class

# Layers that compute the same in training as in evaluation; any other layer has to be in evaluation mode.
_SAME_IN_TRAINING = (
    *(nn.Conv2d, nn.Linear, nn.LayerNorm, nn.Identity, nn.Flatten),
    *(nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
)


@dataclass(frozen=True)
class Split:
    """A network in two: `tail(*front(images))` is `network(images)`. The parts share the network's layers.

    Attributes:
        front: images (B, 3, H, W) -> the activations that the tail reads, each (B, ...).
        tail: those activations -> the output of the network.
    """

    front: Callable[[Tensor], Activations]
    tail: Callable[..., Tensor]


def split(network: nn.Module, images: Tensor) -> Split:
    """Split a network, in the mode in which it trains, behind everything that no training step changes.

    Args:
        network: any network of one input that `torch.fx` can trace.
        images: a batch (B, 3, H, W) on which the two parts are checked against the whole.

    Raises:
        ExperimentError: the network cannot be split.
    """
    graph = _graph_of(network)
    constant = _constant_nodes(graph, network)
    crossing = [node for node in graph.nodes if node in constant and not constant.issuperset(node.users)]
    front, tail = fx.Graph(), fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in constant:
            values[node] = front.node_copy(node, values.__getitem__)
    front.output(tuple(values[node] for node in crossing))
    values = {node: tail.placeholder(node.name) for node in crossing}
    for node in graph.nodes:
        if node not in constant:
            values[node] = tail.node_copy(node, values.__getitem__)
    parts = Split(fx.GraphModule(network, front), fx.GraphModule(network, tail))
    with _evaluating(network), torch.no_grad():
        whole, in_parts = network(images), parts.tail(*parts.front(images))
    if not torch.allclose(whole, in_parts, rtol=1e-4, atol=1e-4 * float(whole.abs().max())):
        raise ExperimentError(_uncached("front and tail together do not give its output"))
    return parts


def _uncached(reason: str) -> str:
    return f"the network's frozen front cannot be cached: {reason}; set --model.cache_front false"


def _graph_of(network: nn.Module) -> fx.Graph:
    """The graph of a network's code in the mode in which it trains, arguments with a default taken at their default.

    Tracing runs that code, which may leave marks; so it is done on a copy, which shares the network's parameters.

    Raises:
        ExperimentError: the code depends on values, or on the mode, or fails.
    """
    twin = copy.deepcopy(network, {id(parameter): parameter for parameter in network.parameters()})
    parameters = inspect.signature(network.forward).parameters.values()
    fixed = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    try:
        graph, in_evaluation = fx.Tracer().trace(twin, fixed), fx.Tracer().trace(twin.eval(), fixed)
    except Exception as error:  # tracing runs the network's own code
        raise ExperimentError(_uncached(f"its code cannot be traced ({' '.join(str(error).split())})")) from error
    if str(graph) != str(in_evaluation):
        raise ExperimentError(_uncached("it takes another path in training than in evaluation"))
    return graph


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """A network in evaluation mode; at the end every module inside is in the mode that it was in."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _constant_nodes(graph: fx.Graph, network: nn.Module) -> set[fx.Node]:
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "output" and constant.issuperset(node.all_input_nodes) and _is_fixed(node, network):
            constant.add(node)
    return constant


def _is_fixed(node: fx.Node, network: nn.Module) -> bool:
    if node.op == "get_attr":
        owner, _, attribute = str(node.target).rpartition(".")
        return not getattr(network.get_submodule(owner), attribute).requires_grad
    if node.op != "call_module":
        return True
    layer = network.get_submodule(str(node.target))
    if any(parameter.requires_grad for parameter in layer.parameters()):
        return False
    return not layer.training or stock_class(layer) in _SAME_IN_TRAINING
