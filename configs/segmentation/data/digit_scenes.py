# Handwritten digits 5 to 9 on textured grounds, made on first use: python -m segmentation prepare digit_scenes
dataset = "digit_scenes"
data_root = "data/digit_scenes"
crop_size = (64, 64)
metainfo = dict(
    classes=("ground", "five", "six", "seven", "eight", "nine"),
    palette=[[0, 0, 0], [230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178]],
)
model = dict(
    data_preprocessor=dict(size=crop_size),
    # Most of a scene is ground; with equal weights a short training would call everything ground.
    decode_head=dict(num_classes=6, loss_decode=dict(class_weight=[0.3, 1.0, 1.0, 1.0, 1.0, 1.0])),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=crop_size, ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    drop_last=True,
    sampler=dict(type="PlacedSampler", shuffle=True),
    dataset=dict(
        type="PlacedDataset",
        dataset=dict(
            type="BaseSegDataset",
            metainfo=metainfo,
            data_root=data_root,
            data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
            img_suffix=".png",
            ann_file="ImageSets/Segmentation/train.txt",
            pipeline=train_pipeline,
        ),
    ),
)
val_dataloader = dict(
    batch_size=20,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="BaseSegDataset",
        metainfo=metainfo,
        data_root=data_root,
        data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
        img_suffix=".png",
        ann_file="ImageSets/Segmentation/val.txt",
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
