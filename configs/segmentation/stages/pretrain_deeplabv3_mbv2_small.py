# Shorter than that of the small PSPNet, as a step takes twice as long.
stage = "pretrain"
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, begin=0, end=20, by_epoch=False),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=20, end=600, by_epoch=False),
]
train_cfg = dict(max_iters=600, val_interval=150)
