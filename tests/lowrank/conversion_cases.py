"""Models of every kind of layer, and all of a model that a conversion could change."""

from torch import nn


class OddConv(nn.Conv2d):
    """A subclass that computes something else."""

    def forward(self, input):
        return 2 * super().forward(input)


class Zoo(nn.Module):
    """One of every kind of layer that must be refused, and two that are fine."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.odd = OddConv(4, 4, 3)
        self.bilinear = nn.Bilinear(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.conv1d = nn.Conv1d(4, 4, 3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.lazy = nn.LazyLinear(4)
        self.linear = nn.Linear(4, 4)


def snapshot(model):
    """Every module's identity, class and attributes, and those of the tensors in them; what it holds is as it was."""
    return [
        (id(module), type(module), [(name, _identity(value)) for name, value in vars(module).items()])
        for module in model.modules()
    ]


def _identity(value):
    if isinstance(value, dict):
        return [(key, id(entry), getattr(entry, "_version", None)) for key, entry in value.items()]
    return id(value)
