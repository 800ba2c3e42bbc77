# Patches per layer, from the network.
lowrank = dict(method=dict(type="GradientFilter"))
