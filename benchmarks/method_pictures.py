"""`python -m benchmarks.method_pictures`: what each method leaves of one input, as the pictures of docs/methods.md."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lowrank
from lowrank import Method
from lowrank.tensors.storage import restore

RANKS = [8, 12, 6, 6]  # of the convolution's input: batch, channels, height, width
METHODS: dict[str, Method] = {
    "vanilla": lowrank.Vanilla(),
    "gradient_filter": lowrank.GradientFilter(2),
    "svd": lowrank.SVD(0.9),
    "hosvd": lowrank.HOSVD(0.9),
    "asi": lowrank.ASI(RANKS),
    "fixed_bases": lowrank.FixedBases(RANKS),
    "rounded": lowrank.Rounded(),
    "wsi": lowrank.WSI(0.8),
    "wasi": lowrank.WASI(energy=0.8, ranks=[8, 24, 16]),
}
BATCHES, BATCH = 3, 32  # the last batch is shown: methods that carry something have seen those before it


def inputs() -> list[Tensor]:
    """Inputs (32, 24, 16, 16) of a layer: digits behind three convolutions with random weights."""
    torch.manual_seed(0)
    ahead = nn.Sequential(*(part for width in ((1, 12), (12, 24), (24, 24)) for part in _block(*width)))
    scans = torch.tensor(load_digits().images[: BATCHES * BATCH], dtype=torch.float32)[:, None] / 16
    with torch.no_grad():
        return list(ahead(F.interpolate(scans, 16, mode="bilinear")).split(BATCH))


def _block(channels: int, out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()


def draw(name: str, method: Method, batches: Sequence[Tensor], output: Path) -> None:
    """Draw what a method leaves of the last batch: one channel of one image, its bytes, and the gradient's error."""
    linear = method.factors_weight
    if linear:
        batches = [batch.flatten(2).transpose(1, 2) for batch in batches]
    x = batches[-1]
    torch.manual_seed(1)
    layer: nn.Module = nn.Linear(24, 96) if linear else nn.Conv2d(24, 32, 3, padding=1)
    upstream = torch.randn_like(layer(x))
    model = nn.Sequential(layer)
    (exact,) = torch.autograd.grad(layer(x), layer.weight, upstream)
    weight = layer.weight.detach().clone()  # type: ignore[operator]
    lowrank.convert(model, ["0"], method)
    for batch in batches:
        model.zero_grad()
        model(batch).backward(upstream)
    kept = layer._lowrank.formula_bytes / (4 * x.numel())  # type: ignore[union-attr]
    shown = [("input", _picture(x)), ("what is left of it", _picture(_left(method, batches, layer)))]
    if not linear:
        error = f"gradient off by {float((layer.weight.grad - exact).norm() / exact.norm()):.2f}"  # type: ignore[operator,union-attr]
    else:
        found = layer.left.detach() @ layer.right.detach()  # type: ignore[operator,union-attr]
        shown = [*(shown if isinstance(method, lowrank.WASI) else []), ("weight", weight), ("as two factors", found)]
        error = f"weight off by {float((found - weight).norm() / weight.norm()):.2f}"
    figure, axes = plt.subplots(1, len(shown), figsize=(2.2 * len(shown), 2.5), layout="constrained")
    for axis, (title, image) in zip(axes, shown, strict=True):
        axis.imshow(image.numpy(), cmap="viridis", aspect="equal" if image.shape[0] == image.shape[1] else "auto")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.suptitle(f"{method.tag}: {kept:.0%} of the input's bytes, {error}", fontsize=9)
    figure.savefig(output / f"{name}.png", dpi=110)
    plt.close(figure)


def _picture(x: Tensor) -> Tensor:
    """One channel of the fourth image, as a square."""
    return x[3, :, 5].reshape(16, 16) if x.ndim == 3 else x[3, 5]


def _left(method: Method, batches: Sequence[Tensor], layer: nn.Module) -> Tensor:
    """The last batch as the weight gradient sees it."""
    state: tuple[Tensor | None, ...] = ()
    geometry = lowrank.LinearGeometry() if method.factors_weight else lowrank.ConvGeometry.of(layer)
    for x in batches:
        kept, state = method.for_layer("0").compress(x, geometry, state, "0")
    if method.keeps_input:
        return x
    if isinstance(method, lowrank.GradientFilter):
        return F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)
    return restore(kept, x.dtype).dense()


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw all of them."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.method_pictures", description=__doc__)
    command.add_argument("--output", type=Path, default=Path("figures/methods"), help="folder (default: %(default)s)")
    output = command.parse_args(arguments).output
    output.mkdir(parents=True, exist_ok=True)
    batches = inputs()
    for name, method in METHODS.items():
        draw(name, method, batches, output)
    print(f"{len(METHODS)} pictures in {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
