_base_ = ["../_base_/mobilenet_v2_d8.py", "../_base_/runtime.py"]
network = "deeplabv3_mbv2"
model = dict(decode_head=dict(type="ASPPHead", dilations=(1, 12, 24, 36)))
# Trained on Cityscapes, from MMSegmentation's model zoo.
weights = "https://mmassets.onedl.ai/mmsegmentation/v0.5/mobilenet_v2/deeplabv3_m-v2-d8_512x1024_80k_cityscapes/deeplabv3_m-v2-d8_512x1024_80k_cityscapes_20200825_124836-bef03590.pth"
# Of each depth: the compressed layers with the patch of the gradient filter, and what is frozen.
depths = dict(
    last5=dict(
        layers=[
            "decode_head.aspp_modules.0.conv",
            "decode_head.aspp_modules.1.conv",
            "decode_head.aspp_modules.2.conv",
            "decode_head.aspp_modules.3.conv",
            "decode_head.bottleneck.conv",
        ],
        patches=[3, 3, 6, 9, 3],
        freeze=[
            "backbone",
            "decode_head",
            "~decode_head.aspp_modules",
            "~decode_head.bottleneck",
            "~decode_head.conv_seg",
        ],
    ),
    last10=dict(
        layers=[
            "backbone.layer6.2.conv.2.conv",
            "backbone.layer7.0.conv.0.conv",
            "backbone.layer7.0.conv.1.conv",
            "backbone.layer7.0.conv.2.conv",
            "decode_head.aspp_modules.0.conv",
            "decode_head.aspp_modules.1.conv",
            "decode_head.aspp_modules.2.conv",
            "decode_head.aspp_modules.3.conv",
            "decode_head.bottleneck.conv",
        ],
        patches=[3, 3, 3, 3, 3, 3, 6, 9, 3],
        freeze=[
            "backbone",
            "~backbone.layer6.2.conv.2",
            "~backbone.layer7.0.conv.0",
            "~backbone.layer7.0.conv.1",
            "~backbone.layer7.0.conv.2",
        ],
    ),
)
