"""Pure functions on tensors: Tucker form, decompositions, factored matrices, layer geometry, gradients, costs.

And what all rooms above have to know of a tensor: whether it is trained in plain eager mode (`eager`), what is noted of
it (`notes`), and which step of its compression was made already (`head_start`).
"""
