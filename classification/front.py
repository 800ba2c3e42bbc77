"""The frozen front of a network: what no training step changes, so that it can be computed once per image.

With everything ahead of the trained layers frozen, and no augmentation, an image gives the same activations in every
epoch. Splitting the network there and keeping those activations leaves only the trained tail to be run in each step.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from experiment import ExperimentError, fingerprint
from lowrank.layers.swap import stock_class

# Layers that compute the same in training as in evaluation; any other layer has to be in evaluation mode.
_ROOMS = (
    "activation",
    "channelshuffle",
    "conv",
    "flatten",
    "linear",
    "padding",
    "pixelshuffle",
    "pooling",
    "upsampling",
)
_DRAWING = (nn.RReLU, nn.MultiheadAttention, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
_SAME_IN_TRAINING = {
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d, nn.Embedding),
    *(
        kind
        for room in _ROOMS
        for kind in vars(getattr(nn.modules, room)).values()
        if isinstance(kind, type) and issubclass(kind, nn.Module) and not issubclass(kind, LazyModuleMixin)
    ),
} - set(_DRAWING)


@dataclass(frozen=True)
class Split:
    """A network in two: `tail(*front(images))` is `network(images)`. The parts share the network's layers.

    Attributes:
        front: images (B, 3, H, W) -> the activations that the tail reads, each (B, ...).
        tail: those activations -> the output of the network.
        layers: how many layers are called in the front, and in the network.
        stops: the layers that the front ends at, each with the reason.
    """

    front: fx.GraphModule
    tail: fx.GraphModule
    layers: tuple[int, int]
    stops: tuple[str, ...]

    def __str__(self) -> str:
        most = 3
        more = f" and {len(self.stops) - most} more" if len(self.stops) > most else ""
        ends = f", up to {'; '.join(self.stops[:most])}{more}" if self.stops else ""
        return f"{self.layers[0]} of {self.layers[1]} layers{ends}"

    def fingerprint(self) -> str:
        """A short hash of all that the front's output depends on but for the images: code, settings and tensors."""
        parts = [self.front.code.encode(), torch.__version__.encode()]
        for name, layer in self.front.named_modules():
            kind = stock_class(layer)  # what a conversion adds has no influence
            parts.append(f"{name} {kind.__name__}({kind.extra_repr(layer)})".encode())
        for name, tensor in sorted(self.front.state_dict().items()):
            parts += [f"{name} {tensor.dtype} {tensor.device.type}".encode(), _bytes(tensor)]
        return fingerprint(parts)


def _bytes(tensor: Tensor) -> bytes:
    content: bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return content


def split(network: nn.Module, images: Tensor) -> Split:
    """Split a network, in the mode in which it trains, behind everything that no training step changes.

    Args:
        network: any network of one input that `torch.fx` can trace.
        images: a batch (B, 3, H, W) on which the two parts are checked against the whole.

    Raises:
        ExperimentError: the network cannot be split.
    """
    graph = _graph_of(network)
    constant, stops = _constant_nodes(graph, network)
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
    calls = [node for node in graph.nodes if node.op == "call_module"]
    layers = (sum(node in constant for node in calls), len(calls))
    parts = Split(fx.GraphModule(network, front), fx.GraphModule(network, tail), layers, tuple(stops))
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


def _constant_nodes(graph: fx.Graph, network: nn.Module) -> tuple[set[fx.Node], list[str]]:
    """What no training step changes, and the layers that depend on nothing else and change nevertheless, with why."""
    constant: set[fx.Node] = set()
    stops: dict[str, None] = {}
    for node in graph.nodes:
        if node.op == "output" or not constant.issuperset(node.all_input_nodes):
            continue
        reason = _reason_against(node, network)
        if reason is None:
            constant.add(node)
        else:
            stops[f"{node.target} ({reason})"] = None
    return constant, list(stops)


def _reason_against(node: fx.Node, network: nn.Module) -> str | None:
    """Why a node's value may change from step to step though its inputs do not; None if it does not."""
    if node.op == "get_attr":
        owner, _, attribute = str(node.target).rpartition(".")
        return "is trained" if getattr(network.get_submodule(owner), attribute).requires_grad else None
    if node.op != "call_module":
        return None
    layer = network.get_submodule(str(node.target))
    if any(parameter.requires_grad for parameter in layer.parameters()):
        return "is trained"
    kind = stock_class(layer)
    return f"{kind.__name__} differs in training" if layer.training and kind not in _SAME_IN_TRAINING else None
