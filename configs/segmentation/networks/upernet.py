_base_ = ["../_base_/resnet18.py", "../_base_/runtime.py"]
network = "upernet"
model = dict(
    decode_head=dict(
        type="UPerHead", in_channels=[64, 128, 256, 512], in_index=[0, 1, 2, 3], channels=512, pool_scales=(1, 2, 3, 6)
    )
)
# Trained on Cityscapes, from MMSegmentation's model zoo.
weights = "https://mmassets.onedl.ai/mmsegmentation/v0.5/upernet/upernet_r18_512x1024_80k_cityscapes/upernet_r18_512x1024_80k_cityscapes_20220614_110712-c89a9188.pth"
# Of each depth: the compressed layers with the patch of the gradient filter, and what is frozen.
depths = dict(
    last5=dict(
        layers=[
            "decode_head.bottleneck.conv",
            "decode_head.fpn_convs.0.conv",
            "decode_head.fpn_convs.1.conv",
            "decode_head.fpn_convs.2.conv",
            "decode_head.fpn_bottleneck.conv",
        ],
        patches=[2, 8, 4, 2, 8],
        freeze=[
            "backbone",
            "decode_head",
            "~decode_head.bottleneck",
            "~decode_head.fpn_convs.0",
            "~decode_head.fpn_convs.1",
            "~decode_head.fpn_convs.2",
            "~decode_head.fpn_bottleneck",
            "~decode_head.conv_seg",
        ],
    ),
    last10=dict(
        layers=[
            "decode_head.bottleneck.conv",
            "decode_head.lateral_convs.0.conv",
            "decode_head.lateral_convs.1.conv",
            "decode_head.lateral_convs.2.conv",
            "decode_head.fpn_convs.0.conv",
            "decode_head.fpn_convs.1.conv",
            "decode_head.fpn_convs.2.conv",
            "decode_head.fpn_bottleneck.conv",
        ],
        patches=[2, 8, 4, 2, 8, 4, 2, 8],
        freeze=[
            "backbone",
            "decode_head",
            "~decode_head.psp_modules.0",
            "~decode_head.psp_modules.1",
            "~decode_head.bottleneck",
            "~decode_head.lateral_convs.0",
            "~decode_head.lateral_convs.1",
            "~decode_head.lateral_convs.2",
            "~decode_head.fpn_convs.0",
            "~decode_head.fpn_convs.1",
            "~decode_head.fpn_convs.2",
            "~decode_head.fpn_bottleneck",
            "~decode_head.conv_seg",
        ],
    ),
)
