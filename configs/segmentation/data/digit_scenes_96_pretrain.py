# Digits 0 to 4 in scenes of that size, to pretrain on: python -m segmentation prepare digit_scenes_96_pretrain
_base_ = "digit_scenes_96.py"
dataset = "digit_scenes_96_pretrain"
data_root = "data/digit_scenes_96_pretrain"
metainfo = dict(classes=("ground", "nought", "one", "two", "three", "four"))
train_dataloader = dict(dataset=dict(dataset=dict(metainfo=metainfo, data_root=data_root)))
val_dataloader = dict(dataset=dict(metainfo=metainfo, data_root=data_root))
test_dataloader = val_dataloader
