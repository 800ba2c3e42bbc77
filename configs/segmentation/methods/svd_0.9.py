lowrank = dict(method=dict(type="SVD", energy=0.9))
