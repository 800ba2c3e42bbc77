"""What is timed against what. Each section gives comparisons that are built only when it is their turn."""

from __future__ import annotations

import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from unittest.mock import patch

import torch
from torch import Tensor, nn

import lowrank
from benchmarks import published
from benchmarks.networks import Batch, batch_of, build, loss_of, trained_layers
from benchmarks.pairs import Clock, Work, seconds
from benchmarks.peers import RANKS
from benchmarks.processes import run_python
from experiment.allocator import keep_freed_memory
from lowrank.layers import activated
from lowrank.methods.base import Method, Tensors
from lowrank.ranks.perplexity import ENERGIES
from lowrank.tensors.decompose import hosvd, subspace_iteration
from lowrank.tensors.geometry import Geometry

CONVOLUTIONAL = ("mobilenet_v2", "mcunet", "resnet18")
ENERGY = 0.8
WARM = 3  # iterations
METHODS: dict[str, Method] = {
    "vanilla_fused": lowrank.Vanilla(),
    "gradient_filter_r2": lowrank.GradientFilter(2),
    "svd_0.8": lowrank.SVD(ENERGY),
    "hosvd_0.8": lowrank.HOSVD(ENERGY),
    "hosvd_0.8_full_svd": published.PublishedHOSVD(ENERGY),
    "asi": lowrank.ASI(RANKS),
    "asi_unfused": lowrank.ASI(RANKS),
}


@dataclass(frozen=True)
class Setting:
    """Sizes that all comparisons share: images in a batch, their side in pixels, networks."""

    batch: int
    size: int
    networks: tuple[str, ...] = CONVOLUTIONAL


SMALL = Setting(batch=16, size=64)  # full SVDs of every layer take their time


@dataclass(frozen=True)
class Comparison:
    """`first` over `second`, in a case; `build` makes the two; `clock` is what their time is taken by."""

    section: str
    case: str
    first: str
    second: str
    build: Callable[[], tuple[Work, Work]]
    clock: Clock = time.perf_counter


@dataclass(frozen=True)
class NoWeightGradient(lowrank.Vanilla):
    """The limit of what compressing inputs can reach: nothing is kept, and the weight gradient costs nothing."""

    def compress(self, x: Tensor, geometry: Geometry, state: Tensors, name: str) -> tuple[Tensors, Tensors]:
        return (), ()


def layer_inputs(network: str, count: int, setting: Setting) -> dict[str, Tensor]:
    """Inputs of the last `count` convolutions of a network with random weights."""
    model, batch = build(network, setting.size), batch_of(2 * setting.batch, setting.size)
    found: dict[str, Tensor] = {}
    for name in lowrank.trailing_layers(model, count):
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
    with torch.no_grad():
        model(batch[0])
    return found


def compression(setting: Setting) -> Iterator[Comparison]:
    """Compression against the published algorithms, in time and error, and against reading the tensor once.

    One thread is timed by processor time, which whatever else the machine does is no part of.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for network in setting.networks:
        for count in range(10, 0, -1):
            case = f"{network}, input of convolution -{count}, {2 * setting.batch} images"
            inputs = partial(_input_and_starts, network, count, setting)
            yield Comparison("compression", case, "ASI as published", "ASI", partial(_against_published, inputs), clock)
            errors = partial(_both_errors, inputs)
            yield Comparison("reconstruction error", case, "ASI", "ASI as published", errors)
            yield Comparison("reads", case, "ASI", "one read of the input", partial(_against_reading, inputs), clock)
            yield Comparison(
                "held bases", case, "ASI between refreshes", "ASI", partial(_between_refreshes, inputs), clock
            )
        yield Comparison("hosvd", case, "HOSVD by full SVDs", "HOSVD by Gram matrices", partial(_both_hosvd, inputs))


@lru_cache(maxsize=1)  # what is compared on one input comes one after the other
def _input_and_starts(network: str, count: int, setting: Setting) -> tuple[Tensor, list[Tensor]]:
    """The input of the last convolution but `count` - 1, and random starts at the ranks of HOSVD."""
    x = next(iter(layer_inputs(network, count, setting).values()))
    return x, [random_basis(n, rank) for n, rank in zip(x.shape, hosvd(x, ENERGY).ranks, strict=True)]


def random_basis(size: int, rank: int) -> Tensor:
    """Orthonormal columns (size, rank)."""
    return torch.linalg.qr(torch.randn(size, rank))[0]


def _factored(x: Tensor, starts: list[Tensor]) -> list[Tensor | None]:
    return [None if start.shape[1] >= n else start for n, start in zip(x.shape, starts, strict=True)]


def _against_published(inputs: Callable[[], tuple[Tensor, list[Tensor]]]) -> tuple[Work, Work]:
    x, starts = inputs()
    factored = _factored(x, starts)
    return lambda: published.subspace_iteration(x, starts), lambda: subspace_iteration(x, factored)


def _both_errors(inputs: Callable[[], tuple[Tensor, list[Tensor]]]) -> tuple[Work, Work]:
    """In place of times: the error of each algorithm after it has warmed up on the tensor."""
    x, starts = inputs()

    def own() -> float:
        bases = _factored(x, starts)
        for _ in range(WARM):
            tucker, bases = subspace_iteration(x, bases)
        return (x - tucker.dense()).norm().item()

    def as_published() -> float:
        bases = starts
        for _ in range(WARM):
            tucker = published.subspace_iteration(x, bases)
            bases = [factor for factor in tucker.factors if factor is not None]
        return (x - tucker.dense()).norm().item()

    return own, as_published


def _against_reading(inputs: Callable[[], tuple[Tensor, list[Tensor]]]) -> tuple[Work, Work]:
    x, starts = inputs()
    factored = _factored(x, starts)
    return lambda: subspace_iteration(x, factored), x.sum


def _between_refreshes(inputs: Callable[[], tuple[Tensor, list[Tensor]]]) -> tuple[Work, Work]:
    x, starts = inputs()
    factored = _factored(x, starts)
    held = range(1, x.ndim)
    iterated = partial(subspace_iteration, x, factored)
    return lambda: subspace_iteration(x, factored, held=held), iterated


def _both_hosvd(inputs: Callable[[], tuple[Tensor, list[Tensor]]]) -> tuple[Work, Work]:
    x, _ = inputs()
    return lambda: published.hosvd(x, ENERGY), lambda: hosvd(x, ENERGY)


def layer_steps(setting: Setting) -> Iterator[Comparison]:
    """One layer's training step with ASI against the stock step, for every distinct convolution of the networks."""
    seen = set()
    for network in setting.networks:
        shapes = shapes_of(network, setting)
        for name, layer in build(network, setting.size).named_modules():
            if not isinstance(layer, nn.Conv2d) or (repr(layer), shapes[name]) in seen:
                continue
            seen.add((repr(layer), shapes[name]))
            kind = kind_of_convolution(layer)
            case = f"{layer.in_channels} to {layer.out_channels} at {shapes[name][3]}, {network} {name}"
            yield Comparison(f"layer step, {kind}", case, "ASI", "vanilla", partial(_both_layers, layer, shapes[name]))


def kind_of_convolution(layer: nn.Conv2d) -> str:
    return "pointwise" if layer.kernel_size == (1, 1) else "depthwise" if layer.groups > 1 else "dense"


def _both_layers(layer: nn.Conv2d, shape: tuple[int, ...]) -> tuple[Work, Work]:
    own = lowrank.convert(nn.Sequential(copy.deepcopy(layer)), ["0"], lowrank.ASI(RANKS))
    x = torch.randn(shape)
    return step_on(own, x), step_on(nn.Sequential(layer), x)


def shapes_of(network: str, setting: Setting) -> dict[str, tuple[int, ...]]:
    """Input shapes of all convolutions at this batch, found on one image."""
    model, shapes = build(network, setting.size), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(
                lambda _, args, name=name: shapes.update({name: (setting.batch, *args[0].shape[1:])})
            )
    with torch.no_grad():
        model(batch_of(1, setting.size)[0])
    return shapes


def step_on(model: nn.Module, x: Tensor) -> Work:
    """A training step whose loss has the output itself as its gradient."""

    def step() -> None:
        y = model(x.requires_grad_(True))
        y.backward(y.detach())
        x.grad = None
        model.zero_grad()

    return step


def model_steps(setting: Setting) -> Iterator[Comparison]:
    """A network's training step with each method against ordinary training, inference, and the limit."""
    for network in setting.networks:
        for layers in ("2", "4", "all"):
            for name, method in METHODS.items():
                if name.endswith("full_svd") and layers == "all":
                    continue  # hours
                for other in ("vanilla", "limit", "inference") if name == "asi" else ("vanilla",):
                    pair = partial(_both_models, network, layers, method, other, setting, not name.endswith("unfused"))
                    yield Comparison("model step", f"{network}, last {layers}", name, other, pair)


def _both_models(
    network: str, layers: str, method: Method, other: str, setting: Setting, fuse: bool
) -> tuple[Work, Work]:
    own = training_step(network, layers, method, setting, fuse)
    if other == "inference":
        return own, _inference(network, setting)
    return own, training_step(network, layers, NoWeightGradient() if other == "limit" else None, setting)


def training_step(
    network: str,
    layers: str,
    method: Method | None,
    setting: Setting,
    fuse: bool = True,
    parts: int = 1,
    smallest: float = 0,
    channels_last: bool = False,
) -> Work:
    form = torch.channels_last if channels_last else torch.contiguous_format
    model = build(network, setting.size).to(memory_format=form)
    names = trained_layers(network, model, layers)
    if method is not None:
        lowrank.convert(model, names, method, fuse, smallest=smallest)
    images, labels = batch_of(setting.batch, setting.size)
    images = images.contiguous(memory_format=form)
    pieces = list(zip(images.chunk(parts), labels.chunk(parts), strict=True))

    def step() -> None:
        model.zero_grad()
        for piece in pieces:
            loss_of(model, piece).backward()

    return step


def _inference(network: str, setting: Setting) -> Work:
    model, batch = build(network, setting.size), batch_of(setting.batch, setting.size)

    def forward() -> None:
        with torch.no_grad():
            loss_of(model, batch)

    return forward


def operator(setting: Setting) -> Iterator[Comparison]:
    """A step with convolution and activation of the frozen layers as one operator of oneDNN, against one without it."""
    for network in setting.networks:
        pair = partial(_with_and_without_operator, network, setting)
        yield Comparison("operator", f"{network}, last 2", "asi", "asi without the operator", pair)


def _with_and_without_operator(network: str, setting: Setting) -> tuple[Work, Work]:
    own, other = (training_step(network, "2", METHODS["asi"], setting) for _ in range(2))

    def without() -> None:
        with patch.object(activated, "_operator", lambda: None):
            other()

    return own, without


def growth(setting: Setting) -> Iterator[Comparison]:
    """Time of compression against its time at the smallest size, as one size grows; and of a step against its depth."""
    base = {"batch": 16, "channels": 64, "side": 14, "rank": 4}
    for what, sizes in {"batch": (32, 64, 128), "side": (28, 56), "rank": (8, 16), "channels": (128, 256)}.items():
        for size in sizes:
            pair = partial(_both_sizes, {**base, what: size}, base)
            yield Comparison("growth", "compression", f"{what} {size}", f"{what} {base[what]}", pair)
    for depth in ("8", "16", "32"):
        pair = partial(_both_depths, setting.networks[0], depth, "4", setting)
        yield Comparison("growth", f"step of {setting.networks[0]}", f"depth {depth}", "depth 4", pair)


def _both_sizes(sizes: dict[str, int], base: dict[str, int]) -> tuple[Work, Work]:
    return _compress(**sizes), _compress(**base)


def _compress(batch: int, channels: int, side: int, rank: int) -> Work:
    x = torch.randn(batch, channels, side, side)
    starts = _factored(x, [random_basis(n, min(rank, n)) for n in x.shape])
    return lambda: subspace_iteration(x, starts)


def _both_depths(network: str, depth: str, base: str, setting: Setting) -> tuple[Work, Work]:
    return training_step(network, depth, METHODS["asi"], setting), training_step(network, base, METHODS["asi"], setting)


def perplexity(setting: Setting) -> Iterator[Comparison]:
    """All layers of MobileNetV2 at six energies against a pass per energy with full SVDs; and the rank choice."""
    case = f"mobilenet_v2, 52 layers, batch {SMALL.batch} at {SMALL.size}"
    yield Comparison("perplexity", case, "a pass per energy with full SVDs", "measure_perplexity", _against_passes)
    yield Comparison("rank choice", case, "select_ranks", "measure_perplexity", _against_choice)


def _measuring() -> tuple[nn.Module, list[str], Batch]:
    model = build("mobilenet_v2", SMALL.size)
    return model, lowrank.trailing_layers(model, "all"), batch_of(SMALL.batch, SMALL.size)


def _against_passes() -> tuple[Work, Work]:
    model, names, batch = _measuring()
    methods = [published.PublishedHOSVD(energy) for energy in ENERGIES]
    passes = [training_step("mobilenet_v2", "all", method, SMALL) for method in methods]
    return lambda: [step() for step in passes], lambda: lowrank.measure_perplexity(model, names, loss_of, batch)


def _against_choice() -> tuple[Work, Work]:
    model, names, batch = _measuring()
    table = lowrank.measure_perplexity(model, names, loss_of, batch)
    budget = sum(layer.nbytes[ENERGIES.index(ENERGY)] for layer in table.layers)
    return (
        lambda: lowrank.select_ranks(table, budget),
        lambda: lowrank.measure_perplexity(model, names, loss_of, batch),
    )


def allocator(setting: Setting) -> Iterator[Comparison]:
    """A step as the C library comes, against one with freed memory kept; each in a process of its own."""
    for name in ("vanilla", "asi"):
        pair = partial(_both_allocators, name, setting)
        yield Comparison("allocator", f"mobilenet_v2, last 2, {name}", "default", "freed memory kept", pair)


def _both_allocators(method: str, setting: Setting) -> tuple[Work, Work]:
    return _Probe(method, "default", setting), _Probe(method, "keep", setting)


@dataclass
class _Probe:
    """A process that takes steps; its own median counts, not its start."""

    method: str
    allocator: str
    setting: Setting

    def __call__(self) -> float:
        setting = f"{self.setting.batch} {self.setting.size}"
        environment = {**os.environ, "LOWRANK_ALLOCATOR": self.allocator}
        done = run_python(["-m", "benchmarks.comparisons", self.method, *setting.split()], environment)
        done.check_returncode()
        return float(done.stdout)


SECTIONS = {
    "compression": compression,
    "layer": layer_steps,
    "model": model_steps,
    "operator": operator,
    "growth": growth,
    "perplexity": perplexity,
    "allocator": allocator,
}


def probe(method: str, batch: int, size: int, steps: int = 5) -> float:
    """Median seconds of a step of MobileNetV2's last two layers under the allocator that the environment names."""
    keep_freed_memory()
    step = training_step("mobilenet_v2", "2", METHODS.get(method), Setting(batch, size))
    step()
    return statistics.median(seconds(step) for _ in range(steps))


if __name__ == "__main__":
    print(probe(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
