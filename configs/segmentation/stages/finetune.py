# The papers' recipe: 20,000 steps, a linear warm-up and then a cosine, statistics frozen.
stage = "finetune"
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=5e-4),
    clip_grad=dict(max_norm=1, norm_type=2),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, begin=0, end=1000, by_epoch=False),
    dict(type="CosineAnnealingLR", eta_min=1e-4, begin=1000, end=20000, by_epoch=False),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=20000, val_interval=2000)
default_hooks = dict(checkpoint=dict(interval=2000))
# As published, one energy for all modes of a layer.
perplexity = dict(mode_energies=[])
