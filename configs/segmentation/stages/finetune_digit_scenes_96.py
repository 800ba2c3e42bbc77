# Long enough that what a method never learns shows, and with AdamW.
stage = "finetune"
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-3, weight_decay=0.01))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, begin=0, end=40, by_epoch=False),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=40, end=800, by_epoch=False),
]
train_cfg = dict(max_iters=800, val_interval=100)
default_hooks = dict(checkpoint=dict(interval=100))
# As for the smaller scenes, an energy for each mode.
perplexity = dict(mode_energies=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98])
