lowrank = dict(method=dict(type="ASI"))
