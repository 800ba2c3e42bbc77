"""What a run leaves beside its record, for people to look at: its layers' ranks, its memory by module, its curves."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiment.axes import within_percent
from experiment.finite import finite
from experiment.history import Row
from lowrank import Account, Explanation, Method, RankPlan, converted_layers
from lowrank.layers.arguments import input_among
from lowrank.layers.factored import FactoredLinear
from lowrank.layers.layer import LowRankLayer, geometry_of, is_single
from lowrank.layers.preserve import LossFunction, preserved
from lowrank.layers.token_mask import without_padding
from lowrank.methods.base import TuckerMethod
from lowrank.tensors.storage import restore

SCHEMA = 1


def ranks_of(
    network: nn.Module, loss_fn: LossFunction, batch: Any, costs: Account, method: Method | None = None
) -> dict[str, Any]:
    """The content of `ranks.json`: how each chosen layer keeps its input, on one training batch.

    Args:
        network: converted, in the mode in which it trains; left as it was.
        loss_fn, batch: see `lowrank.saved_bytes`.
        costs: of the chosen layers, by formula.
        method: that the network was converted with; its ranks may be a plan, the choice within a budget.

    Returns:
        Per layer its name and method; the input's "shape"; "ranks", one a mode, null where no Tucker form is kept;
        "derived", of a layer that keeps nothing, the name of the one from whose form its input follows;
        "energy", which the ranks were chosen by (a share, or one for each mode; null if by none); "captured", the share
        of this batch's energy, its squared norm, that is kept; "storage"; "weight_rank" of a factored weight; and by
        formula "activation_bytes", "flops_paper" and "flops".
    """
    found: dict[str, dict[str, Any]] = {}

    def note(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        assert isinstance(layer, LowRankLayer)
        found.setdefault(layer._lowrank.name, _kept_form(layer, input_among(given, named)))

    with preserved(network), torch.enable_grad():
        layers = [layer for layer in converted_layers(network) if layer._lowrank.chosen]
        handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
        try:
            loss_fn(network, batch)
        finally:
            for handle in handles:
                handle.remove()
    plan, rows = getattr(method, "ranks", None), []
    for name, cost in costs.items():
        formula = {key: getattr(cost, key) for key in ("activation_bytes", "flops_paper", "flops")}
        planned: dict[str, Any] = {}
        if isinstance(plan, RankPlan) and name in plan.energies:
            planned = {"energy": plan.energies[name]}
        if name in costs.derived:
            planned = {**dict.fromkeys(("ranks", "energy", "captured", "storage")), "derived": costs.derived[name]}
        rows.append({"name": name, **found.get(name, {}), **planned, **formula})
    return {"schema": SCHEMA, "layers": rows}


@torch.no_grad()
def _kept_form(layer: LowRankLayer, x: Tensor) -> dict[str, Any]:
    method = layer._lowrank.method
    told: dict[str, Any] = {"method": method.tag, "shape": list(x.shape), "ranks": None, "energy": None}
    told |= {
        "captured": None,
        "storage": None,
        "weight_rank": layer.rank if isinstance(layer, FactoredLinear) else None,
    }
    if isinstance(method, TuckerMethod):
        geometry = geometry_of(layer)
        x = without_padding(x.detach().unsqueeze(0) if is_single(layer, x) else x.detach(), geometry)
        kept, _ = method.compress(x, geometry, layer._lowrank.bases, layer._lowrank.name)
        form = restore(kept, torch.float64)
        # The bases are orthonormal, so the core has the energy of what is kept.
        share = form.core.square().sum() / x.to(torch.float64).square().sum()
        told |= {"ranks": list(form.ranks), "captured": round(float(share), 6), "storage": method.storage}
        if not isinstance(layer, FactoredLinear):  # of that one, the energy is the weight's
            told["energy"] = getattr(method, "energy", None)
    return told


def memory_of(explanation: Explanation) -> dict[str, Any]:
    """The content of `memory.json`: what autograd keeps, by module, largest first; see `lowrank.explain`."""
    rows = [[row.module, row.kind, row.nbytes, row.reason] for row in explanation]
    return {"schema": SCHEMA, "kept_bytes": explanation.nbytes, "module/kind/bytes/reason": rows}


def as_text(content: Mapping[str, Any]) -> str:
    """JSON with one row of a list a line, so that it can be read and compared; not a number is null."""
    lines = []
    for key, value in finite(content).items():
        if isinstance(value, list):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            lines.append(f"{json.dumps(key)}: [\n  {rows}]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{" + ",\n ".join(lines) + "}\n"


def curves(rows: Sequence[Row], title: str) -> bytes:
    """A picture (PNG) of a run's curves: losses, accuracies and the memory of its layers' inputs, at each row.

    Args:
        rows: of `metrics.csv`, at least one.
        title: written above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    along = next(iter(rows[0]))  # the epoch or the iteration
    losses = [name for name in rows[0] if name.endswith("loss")]
    shares = [name for name in rows[0] if name.endswith("accuracy") or name in ("miou", "macc")]
    figure = Figure(figsize=(10, 3), dpi=100)  # laid out by hand, which takes a third of the time
    figure.subplots_adjust(left=0.07, right=0.985, bottom=0.16, top=0.87, wspace=0.34)
    FigureCanvasAgg(figure)
    panels = (
        ("loss", losses, 1.0),
        ("%", shares, 100.0),
        ("inputs by formula (MiB)", ["activation_bytes"], 2**-20),
    )
    for axes, (label, names, unit) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in names:
            values = [unit * row[name] for row in rows]
            axes.plot([row[along] for row in rows], values, marker="o", ms=3, label=name.replace("_", " "))
        axes.set_xlabel(along)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.set_ylabel(label)
        if label == "%":
            within_percent(axes)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=8)
    figure.axes[-1].set_ylim(0, 1.1 * figure.axes[-1].get_ylim()[1])
    figure.suptitle(title, fontsize=10)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
