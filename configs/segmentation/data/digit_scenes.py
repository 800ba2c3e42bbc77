# Handwritten digits 5 to 9 on textured grounds, made on first use: python -m segmentation prepare digit_scenes
_base_ = "../_base_/digit_scenes.py"
dataset = "digit_scenes"
data_root = "data/digit_scenes"
crop_size = (64, 64)
model = dict(data_preprocessor=dict(size=crop_size))
metainfo = dict(classes=("ground", "five", "six", "seven", "eight", "nine"), palette=_base_.palette)
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
