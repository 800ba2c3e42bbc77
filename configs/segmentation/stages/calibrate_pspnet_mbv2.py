stage = "calibrate"
train_cfg = dict(max_iters=5000)
