lowrank = dict(method=dict(type="ASI", storage="int8"))
