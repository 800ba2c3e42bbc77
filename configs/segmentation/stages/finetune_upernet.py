stage = "finetune"
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
