stage = "finetune"
optim_wrapper = dict(optimizer=dict(lr=0.05))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, begin=0, end=10, by_epoch=False),
    dict(type="CosineAnnealingLR", eta_min=1e-4, begin=10, end=200, by_epoch=False),
]
train_cfg = dict(max_iters=200, val_interval=33)
default_hooks = dict(checkpoint=dict(interval=33))
