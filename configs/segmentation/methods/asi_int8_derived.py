# Inputs that can be computed again from what a layer ahead keeps of its own are not kept.
lowrank = dict(method=dict(type="ASI", storage="int8", derive=True))
