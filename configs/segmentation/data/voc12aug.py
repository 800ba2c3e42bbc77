# PASCAL VOC 2012 with the extra annotations of SBD: python -m segmentation prepare voc12aug
_base_ = "../_base_/photographs.py"
dataset = "voc12aug"
data_root = "data/voc12aug"
crop_size = (512, 512)
model = dict(data_preprocessor=dict(size=crop_size), decode_head=dict(num_classes=21))
train_pipeline = [
    *_base_.first_steps,
    dict(type="RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    *_base_.last_steps,
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
official = dict(img_path="JPEGImages", seg_map_path="SegmentationClass")
of_sbd = dict(img_path="JPEGImages", seg_map_path="SegmentationClassAug")
lists = "ImageSets/Segmentation/"
voc = dict(type="PascalVOCDataset", data_prefix=official)
train_dataloader = dict(
    dataset=dict(
        dataset=dict(
            type="ConcatDataset",
            datasets=[
                dict(**voc, data_root=data_root, ann_file=lists + "train.txt", pipeline=train_pipeline),
                dict(voc, data_root=data_root, data_prefix=of_sbd, ann_file=lists + "aug.txt", pipeline=train_pipeline),
            ],
        ),
    ),
)
val_dataloader = dict(dataset=dict(**voc, data_root=data_root, ann_file=lists + "val.txt", pipeline=test_pipeline))
test_dataloader = val_dataloader
