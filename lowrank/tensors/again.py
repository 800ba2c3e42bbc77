"""What it may take to compute a tensor again in the backward pass, in products for each of its numbers."""

LAYER = 1 << 24  # what a linear layer or attention takes; one is on the way to a tensor at most
BUDGET = 256  # and convolutions of so many
ROOM = 16  # of them is left for what is behind a layer that widens its input, such as a depthwise convolution
SHRINKING = 144  # of one that gives less than it is given, whose output takes little and serves those behind it
DEEPEST = 48  # steps from a source to a tensor; what is further away is kept itself


def too_much(depth: int, cost: int, reach: int = 0) -> bool:
    """Whether a way of so many steps and products for each number, and layers, is too long; it may take `reach`."""
    return depth > DEEPEST or cost >= 2 * LAYER or cost % LAYER > max(BUDGET, reach)
