# Digit scenes of any size: how they are read, drawn and validated. A data set says which ones, and their size.
first_steps = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
last_steps = [dict(type="PackSegInputs")]
scenes = dict(
    data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
    img_suffix=".png",
)
# Most of a scene is ground; with equal weights a short training would call everything ground.
model = dict(decode_head=dict(num_classes=6, loss_decode=dict(class_weight=[0.3, 1.0, 1.0, 1.0, 1.0, 1.0])))
palette = [[0, 0, 0], [230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178]]
train_dataloader = dict(
    num_workers=0,
    drop_last=True,
    sampler=dict(type="PlacedSampler", shuffle=True),
    dataset=dict(
        type="PlacedDataset",
        dataset=dict(type="BaseSegDataset", ann_file="ImageSets/Segmentation/train.txt", **scenes),
    ),
)
val_dataloader = dict(
    batch_size=20,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="BaseSegDataset",
        ann_file="ImageSets/Segmentation/val.txt",
        pipeline=[*first_steps, *last_steps],
        **scenes,
    ),
)
test_dataloader = val_dataloader
