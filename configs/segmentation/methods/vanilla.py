lowrank = dict(method=dict(type="Vanilla"))
