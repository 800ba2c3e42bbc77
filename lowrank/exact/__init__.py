"""Functions that keep less than PyTorch's for the backward pass, with the same values and gradients."""
