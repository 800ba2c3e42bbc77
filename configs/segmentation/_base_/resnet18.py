# ResNet-18 with a stem of three convolutions, not dilated. BatchNorm need not be synchronised between processes, since
# its statistics are frozen in fine-tuning.
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type="ResNetV1c",
        depth=18,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        strides=(1, 2, 2, 2),
        dilations=(1, 1, 1, 1),
        norm_cfg=norm_cfg,
        style="pytorch",
        contract_dilation=True,
    ),
    decode_head=dict(
        in_channels=512,
        in_index=3,
        channels=128,
        dropout_ratio=0,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
# What is calibrated to a new set of classes before fine-tuning; `~` takes a module out of what is frozen.
depths = dict(calibrate=dict(layers=[], freeze=["backbone", "decode_head", "~decode_head.conv_seg"]))
