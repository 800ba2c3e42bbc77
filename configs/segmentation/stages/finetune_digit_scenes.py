stage = "finetune"
optim_wrapper = dict(optimizer=dict(lr=0.05))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, begin=0, end=15, by_epoch=False),
    dict(type="CosineAnnealingLR", eta_min=1e-4, begin=15, end=300, by_epoch=False),
]
train_cfg = dict(max_iters=300, val_interval=50)
default_hooks = dict(checkpoint=dict(interval=50))
