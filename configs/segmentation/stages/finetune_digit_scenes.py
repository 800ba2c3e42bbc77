stage = "finetune"
optim_wrapper = dict(optimizer=dict(lr=0.05))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, begin=0, end=10, by_epoch=False),
    dict(type="CosineAnnealingLR", eta_min=1e-4, begin=10, end=200, by_epoch=False),
]
train_cfg = dict(max_iters=200, val_interval=33)
default_hooks = dict(checkpoint=dict(interval=33))
# An energy for each mode: the inputs are small, and one layer may hold half of the memory.
perplexity = dict(mode_energies=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98])
