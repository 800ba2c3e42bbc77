# Inputs that can be computed again from what a layer ahead keeps of its own, by up to 20,000 products for each of their
# numbers, are not kept.
lowrank = dict(method=dict(type="ASI", storage="int8", derive=20000))
