# Digit scenes of half as many pixels again a side, for longer trainings: python -m segmentation prepare digit_scenes_96
_base_ = "digit_scenes.py"
dataset = "digit_scenes_96"
data_root = "data/digit_scenes_96"
crop_size = (96, 96)
model = dict(data_preprocessor=dict(size=crop_size))
train_pipeline = [
    *_base_.first_steps,
    dict(type="RandomResize", scale=crop_size, ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size),
    *_base_.last_steps,
]
train_dataloader = dict(dataset=dict(dataset=dict(data_root=data_root, pipeline=train_pipeline)))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
