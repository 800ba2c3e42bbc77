# MobileNetV2 with dilated last stages: features at 1/8 of the image.
_base_ = "resnet18.py"
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    backbone=dict(
        _delete_=True,
        type="MobileNetV2",
        widen_factor=1.0,
        strides=(1, 2, 2, 1, 1, 1, 1),
        dilations=(1, 1, 1, 2, 2, 4, 4),
        out_indices=(1, 2, 4, 6),
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(in_channels=320),
)
# The published head has 512 channels and this one 128, so the whole head is calibrated.
depths = dict(calibrate=dict(freeze=["backbone"]))
