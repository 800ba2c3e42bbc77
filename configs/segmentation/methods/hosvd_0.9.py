lowrank = dict(method=dict(type="HOSVD", energy=0.9))
