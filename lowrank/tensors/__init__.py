"""Pure functions on tensors: Tucker form, decompositions, factored matrices, layer geometry, gradients, costs."""
