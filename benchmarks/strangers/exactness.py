"""How far a converted model is from the stock one, in double precision: outputs and every gradient, over two steps."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import torch
from torch import Tensor, nn

import lowrank
from benchmarks.strangers.stranger import SEED, Stranger, all_layers, asi

Change = Callable[[nn.Module], object]
LENGTH = 1e-3  # of a step, so that no network runs away from its own rounding


def vanilla(model: nn.Module, recompute: bool = True) -> nn.Module:
    """Every layer converted, at full rank."""
    return lowrank.convert(model, all_layers(model), lowrank.Vanilla(), recompute=recompute)


def largest_error(stranger: Stranger) -> float:
    """The largest relative error of an output or a gradient: both ways of normalising, and with a frozen middle."""
    batch, stock = stranger.given(2, torch.float64), stranger.build(torch.float64)
    errors = []
    for training, frozen in ((False, False), (True, False), (False, True)):
        model = copy.deepcopy(stock).train(training)
        if frozen:
            freeze_middle(model)
        wanted = steps(stranger, copy.deepcopy(model), batch, 1 if frozen else 2)
        errors.append(difference(wanted, steps(stranger, vanilla(model), batch, 1 if frozen else 2)))
    return max(errors)


def error_at_full_ranks(stranger: Stranger) -> float:
    """The same with ASI, of one step in evaluation mode."""
    batch, stock = stranger.given(2, torch.float64), stranger.build(torch.float64).eval()
    converted = copy.deepcopy(stock)
    lowrank.convert(converted, asi(stranger, converted, all_layers(converted), full=True))
    return difference(steps(stranger, stock, batch, 1), steps(stranger, converted, batch, 1))


def freeze_middle(model: nn.Module) -> None:
    """The middle third of the parameters wants no gradient."""
    parameters = list(model.parameters())
    for parameter in parameters[len(parameters) // 3 : 2 * len(parameters) // 3]:
        parameter.requires_grad_(False)


def steps(stranger: Stranger, model: nn.Module, batch: Tensor, count: int) -> list[dict[str, Tensor]]:
    """Per step the output, every gradient by name, and the buffers behind it; steps of plain gradient descent."""
    found = []
    for _ in range(count):
        torch.manual_seed(SEED + 2)
        y = stranger.output(model, batch)
        generator = torch.Generator().manual_seed(SEED + 3)
        y.backward(torch.randn(y.shape, dtype=y.dtype, generator=generator))
        parameters = dict(_stock_names(model))
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        buffers = {f"{name} (buffer)": b.clone() for name, b in model.named_buffers() if b.is_floating_point()}
        found.append({"output": y.detach(), **buffers, **gradients})
        length = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        with torch.no_grad():
            for parameter in parameters.values():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=LENGTH / float(length.clamp_min(1e-12)))
                    parameter.grad = None
    return found


def _stock_names(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name.replace("lowrank_in_proj.", "in_proj_"), p) for name, p in model.named_parameters()]


def difference(wanted: list[dict[str, Tensor]], found: list[dict[str, Tensor]]) -> float:
    """The largest error of a tensor, relative to its own largest entry and at least to 1e-6 of all gradients'.

    A gradient that one side lacks counts as zero.
    """
    worst = 0.0
    for one, other in zip(wanted, found, strict=True):
        grads = [float(t.abs().max()) for name, t in one.items() if name != "output" and "(buffer)" not in name]
        floor = 1e-6 * max(grads, default=1.0)
        for name in {**one, **other}:
            a, b = one.get(name), other.get(name)
            present = a if a is not None else b
            assert present is not None
            a = torch.zeros_like(present) if a is None else a
            b = torch.zeros_like(present) if b is None else b
            if not a.numel():
                continue
            error = float((a - b).abs().max()) / max(float(a.abs().max()), floor, 1e-12)
            worst = max(worst, error if error == error else float("inf"))  # NaN is no error that a maximum sees
    return worst


def problems_as_a_model(stranger: Stranger) -> list[str]:
    """What a converted model cannot do that the stock one can: state dict both ways, copies, pickle, revert."""
    stock, batch = stranger.build().eval(), stranger.given(2)
    with torch.no_grad():
        wanted = stranger.output(stock, batch)
    converted, initial = vanilla(copy.deepcopy(stock)), copy.deepcopy(stock.state_dict())
    problems: list[str] = []
    if list(converted.state_dict()) != list(stock.state_dict()):
        problems.append("the keys of the state dict, or their order, are not the stock ones")
    moved = stock.state_dict()  # with its versions
    moved.update({name: (tensor * 1.5).to(tensor.dtype) for name, tensor in moved.items()})
    other = copy.deepcopy(stock)
    other.load_state_dict(moved)
    converted.load_state_dict(other.state_dict())
    for name, tensor in converted.state_dict().items():
        if not torch.equal(tensor, moved[name]):
            problems.append(f"{name} was not loaded")
    stock.load_state_dict(converted.state_dict())
    converted.load_state_dict(initial)
    copies = {"deepcopy": copy.deepcopy(converted)}
    if pickled(other) is not None:
        copies["pickle"] = pickled(converted)
    lowrank.revert(converted)
    if [type(module) for module in converted.modules()] != [type(module) for module in other.modules()]:
        problems.append("revert does not give every class back")
    for name, model in {**copies, "revert": converted}.items():
        with torch.no_grad():
            found = stranger.output(model, batch)
        if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())):
            problems.append(f"{name} computes something else")
    return problems


def pickled(model: nn.Module) -> nn.Module | None:
    """The model through `torch.save` and `torch.load`; None if it cannot be saved."""
    buffer = io.BytesIO()
    try:
        torch.save(model, buffer)
    except Exception:
        return None
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded
