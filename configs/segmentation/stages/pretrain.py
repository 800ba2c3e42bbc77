# Train everything from random weights, with the statistics of each batch.
stage = "pretrain"
lowrank = dict(freeze_statistics=False)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.05, momentum=0.9, weight_decay=5e-4),
    clip_grad=dict(max_norm=1, norm_type=2),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, begin=0, end=50, by_epoch=False),
    dict(type="CosineAnnealingLR", eta_min=1e-4, begin=50, end=800, by_epoch=False),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=800, val_interval=200)
default_hooks = dict(checkpoint=dict(interval=200))
