"""MMSegmentation: a config of your own, with one hook more. Checkpoints load in stock MMSegmentation.

Run: PYTHONPATH=. python examples/mmsegmentation_hook.py (needs the suite, in whose folder it is started; no download)
"""

from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

from segmentation.data.scenes import Scenes, write_scenes

CLASSES = ("ground", "five", "six", "seven")


def config(folder: Path, iterations: int, size: int, batch: int) -> Config:
    """As you would write it for MMSegmentation; new is `custom_imports` and `custom_hooks`."""
    norm = dict(type="BN", requires_grad=True)
    steps = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
    data = dict(
        type="BaseSegDataset",
        data_root=str(folder / "scenes"),
        ann_file="ImageSets/Segmentation/train.txt",
        data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
        img_suffix=".png",
        metainfo=dict(classes=CLASSES),
        pipeline=steps,
    )
    backbone = dict(type="ResNetV1c", depth=18, stem_channels=16, base_channels=16, norm_cfg=norm, norm_eval=True)
    head = dict(type="FCNHead", in_channels=128, in_index=3, channels=32, num_classes=len(CLASSES), norm_cfg=norm)
    return Config(
        dict(
            default_scope="mmseg",
            custom_imports=dict(imports=["segmentation"]),
            custom_hooks=[
                dict(
                    type="LowRankHook",
                    method=dict(type="ASI", ranks=[4, 16, 4, 4]),
                    layers=["backbone.layer4.1.conv1", "backbone.layer4.1.conv2", "decode_head.convs.0.conv"],
                    freeze=["backbone", "~backbone.layer4.1"],
                )
            ],
            model=dict(
                type="EncoderDecoder",
                data_preprocessor=dict(type="SegDataPreProcessor", size=(size, size), mean=[128] * 3, std=[64] * 3),
                backbone=backbone,
                decode_head=head,
            ),
            train_dataloader=dict(batch_size=batch, num_workers=0, sampler=dict(type="InfiniteSampler"), dataset=data),
            train_cfg=dict(type="IterBasedTrainLoop", max_iters=iterations),
            optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.05, momentum=0.9)),
            default_hooks=dict(
                logger=dict(type="LoggerHook", interval=10, log_metric_by_epoch=False),
                checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=iterations),
            ),
            log_processor=dict(by_epoch=False),
            work_dir=str(folder / "work"),
        )
    )


def main(folder: Path, iterations: int = 100, size: int = 64, batch: int = 8) -> Runner:
    """Draw scenes into `folder` and train there."""
    if not (folder / "scenes").exists():
        write_scenes(folder / "scenes", Scenes(digits=(5, 6, 7), train=80, val=4, size=size))
    runner = Runner.from_cfg(config(folder, iterations, size, batch))
    runner.train()
    return runner


if __name__ == "__main__":
    main(Path("runs/mmsegmentation_hook"))
