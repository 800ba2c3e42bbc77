"""Which budget? Memory by layer, and how far the gradients are off at each budget, in one picture.

Run: python examples/choose_budget.py              (needs torchvision, scikit-learn and matplotlib)
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits

import lowrank

Batch = tuple[torch.Tensor, torch.Tensor]


def loss_fn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def digits(count: int, size: int) -> Batch:
    """So many of scikit-learn's handwritten digits."""
    scans = load_digits()
    images = torch.tensor(scans.images[:count], dtype=torch.float32)[:, None] / 8 - 1
    return F.interpolate(images, size, mode="bilinear").expand(-1, 3, -1, -1), torch.tensor(scans.target[:count])


def main(output: Path, layers: int = 6, batch: int = 32, size: int = 96) -> dict[int, float]:
    """Draw `output`; returns the perplexity at each budget, by the parts of the exact memory that they are."""
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(num_classes=10).eval()
    data = digits(batch, size)
    names = lowrank.trailing_layers(model, layers)
    lowrank.freeze_before(model, names)
    table = lowrank.measure_perplexity(model, names, loss_fn, data, mode_energies=lowrank.MODE_ENERGIES)

    bytes_of = {name: cost.activation_bytes for name, cost in lowrank.account(model, names, data[0]).items()}
    exact = sum(bytes_of.values())
    plans = {part: lowrank.select_ranks(table, exact / part) for part in (5, 10, 20, 40)}
    norm = sum(layer.gradient_norm or 0 for layer in table.layers)

    figure, (by_layer, by_budget) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    places = range(len(names))
    by_layer.bar(places, [bytes_of[name] for name in names], label="as it is", color="0.8")
    for part in (10, 40):
        lowrank.convert(model, names, lowrank.ASI(ranks=plans[part]))
        cost = lowrank.account(model, names, data[0])
        by_layer.bar(places, [cost[name].activation_bytes for name in names], width=0.5, label=f"1/{part}")
    by_layer.set_yscale("log")
    by_layer.set_xticks(places, names, rotation=40, ha="right")
    by_layer.set_ylabel("bytes of the layer's input")
    by_layer.legend(title="budget")

    budgets = [plan.nbytes for plan in plans.values()]
    by_budget.plot(budgets, [plan.perplexity / norm for plan in plans.values()], marker="o")
    by_budget.set_xscale("log")
    by_budget.set_xlabel("bytes of all inputs")
    by_budget.set_ylabel("perplexity / norm of the gradients")
    figure.savefig(output, dpi=120)
    plt.close(figure)
    print(f"{exact:,} bytes as it is; {output} shows what is left of the gradients at a fifth to a fortieth of that")
    return {part: plan.perplexity for part, plan in plans.items()}


if __name__ == "__main__":
    main(Path("budget.png"))
