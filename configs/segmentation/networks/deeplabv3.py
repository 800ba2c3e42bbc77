_base_ = ["../_base_/resnet18_d8.py", "../_base_/runtime.py"]
network = "deeplabv3"
model = dict(decode_head=dict(type="ASPPHead", dilations=(1, 12, 24, 36)))
# Trained on Cityscapes, from MMSegmentation's model zoo.
weights = "https://mmassets.onedl.ai/mmsegmentation/v0.5/deeplabv3/deeplabv3_r18-d8_512x1024_80k_cityscapes/deeplabv3_r18-d8_512x1024_80k_cityscapes_20201225_021506-23dffbe2.pth"
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
            "backbone.layer4.0.conv1",
            "backbone.layer4.0.conv2",
            "backbone.layer4.1.conv1",
            "backbone.layer4.1.conv2",
            "decode_head.aspp_modules.0.conv",
            "decode_head.aspp_modules.1.conv",
            "decode_head.aspp_modules.2.conv",
            "decode_head.aspp_modules.3.conv",
            "decode_head.bottleneck.conv",
        ],
        patches=[2, 2, 2, 2, 3, 3, 6, 9, 3],
        freeze=[
            "backbone",
            "decode_head",
            "~backbone.layer4.0.conv1",
            "~backbone.layer4.0.conv2",
            "~backbone.layer4.1.conv1",
            "~backbone.layer4.1.conv2",
            "~decode_head.aspp_modules",
            "~decode_head.bottleneck",
            "~decode_head.conv_seg",
        ],
    ),
)
