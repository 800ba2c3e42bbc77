_base_ = ["../_base_/resnet18_d8.py", "../_base_/runtime.py"]
network = "pspnet"
model = dict(decode_head=dict(type="PSPHead", pool_scales=(1, 2, 3, 6)))
# Trained on Cityscapes, from MMSegmentation's model zoo.
weights = "https://mmassets.onedl.ai/mmsegmentation/v0.5/pspnet/pspnet_r18-d8_512x1024_80k_cityscapes/pspnet_r18-d8_512x1024_80k_cityscapes_20201225_021458-09ffa746.pth"
# Of each depth: the compressed layers with the patch of the gradient filter, and what is frozen.
depths = dict(
    last5=dict(
        layers=[
            "decode_head.bottleneck.conv",
        ],
        patches=[4],
        freeze=[
            "backbone",
        ],
    ),
    last10=dict(
        layers=[
            "backbone.layer4.0.conv1",
            "backbone.layer4.0.conv2",
            "backbone.layer4.1.conv1",
            "backbone.layer4.1.conv2",
            "decode_head.bottleneck.conv",
        ],
        patches=[4, 4, 4, 4, 4],
        freeze=[
            "backbone",
            "~backbone.layer4",
        ],
    ),
)
