# Train everything from random weights, with the statistics of each batch.
stage = "pretrain"
lowrank = dict(freeze_statistics=False)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=3e-3, weight_decay=0.01))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, begin=0, end=30, by_epoch=False),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=30, end=900, by_epoch=False),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=900, val_interval=150)
default_hooks = dict(checkpoint=dict(interval=150))
