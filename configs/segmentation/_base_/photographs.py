# What the papers do with photographs: draws for training, batches of 8, validation on whole images one by one. A data
# set puts scale, crop and its images in.
first_steps = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
last_steps = [dict(type="RandomFlip", prob=0.5), dict(type="PhotoMetricDistortion"), dict(type="PackSegInputs")]
train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type="PlacedSampler", shuffle=True),
    dataset=dict(type="PlacedDataset"),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader
