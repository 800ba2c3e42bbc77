# Handwritten digits 0 to 4 on textured grounds, to pretrain on: python -m segmentation prepare digit_scenes_pretrain
_base_ = "../_base_/digit_scenes.py"
dataset = "digit_scenes_pretrain"
data_root = "data/digit_scenes_pretrain"
crop_size = (64, 64)
model = dict(data_preprocessor=dict(size=crop_size))
metainfo = dict(classes=("ground", "nought", "one", "two", "three", "four"), palette=_base_.palette)
train_pipeline = [
    *_base_.first_steps,
    dict(type="RandomResize", scale=crop_size, ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size),
    *_base_.last_steps,
]
train_dataloader = dict(
    batch_size=16, dataset=dict(dataset=dict(metainfo=metainfo, data_root=data_root, pipeline=train_pipeline))
)
val_dataloader = dict(dataset=dict(metainfo=metainfo, data_root=data_root))
test_dataloader = val_dataloader
