# Exact inputs, with nothing kept for normalisation, activations and the loss.
lowrank = dict(method=dict(type="Vanilla"), fuse=True)
