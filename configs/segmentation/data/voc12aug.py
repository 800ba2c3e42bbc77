# PASCAL VOC 2012 with the extra annotations of SBD: python -m segmentation prepare voc12aug
dataset = "voc12aug"
data_root = "data/voc12aug"
crop_size = (512, 512)
model = dict(
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(num_classes=21),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type="PlacedSampler", shuffle=True),
    dataset=dict(
        type="PlacedDataset",
        dataset=dict(
            type="ConcatDataset",
            datasets=[
                dict(
                    type="PascalVOCDataset",
                    data_root=data_root,
                    data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
                    ann_file="ImageSets/Segmentation/train.txt",
                    pipeline=train_pipeline,
                ),
                dict(
                    type="PascalVOCDataset",
                    data_root=data_root,
                    data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClassAug"),
                    ann_file="ImageSets/Segmentation/aug.txt",
                    pipeline=train_pipeline,
                ),
            ],
        ),
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="PascalVOCDataset",
        data_root=data_root,
        data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
        ann_file="ImageSets/Segmentation/val.txt",
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
