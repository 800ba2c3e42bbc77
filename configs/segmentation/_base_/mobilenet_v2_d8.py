# MobileNetV2 with dilated last stages: features of 320 channels at 1/8 of the image; for a network's `backbone`.
mobilenet_v2 = dict(
    type="MobileNetV2",
    widen_factor=1.0,
    strides=(1, 2, 2, 1, 1, 1, 1),
    dilations=(1, 1, 1, 2, 2, 4, 4),
    out_indices=(1, 2, 4, 6),
    norm_cfg=dict(type="BN", requires_grad=True),
)
