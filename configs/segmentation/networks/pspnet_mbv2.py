_base_ = ["../_base_/mobilenet_v2_d8.py", "../_base_/runtime.py"]
network = "pspnet_mbv2"
model = dict(decode_head=dict(type="PSPHead", pool_scales=(1, 2, 3, 6)))
# Trained on Cityscapes, from MMSegmentation's model zoo.
weights = "https://mmassets.onedl.ai/mmsegmentation/v0.5/mobilenet_v2/pspnet_m-v2-d8_512x1024_80k_cityscapes/pspnet_m-v2-d8_512x1024_80k_cityscapes_20200825_124817-19e81d51.pth"
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
            "backbone.layer6.2.conv.1.conv",
            "backbone.layer6.2.conv.2.conv",
            "backbone.layer7.0.conv.0.conv",
            "backbone.layer7.0.conv.1.conv",
            "backbone.layer7.0.conv.2.conv",
            "decode_head.bottleneck.conv",
        ],
        patches=[4, 4, 4, 4, 4, 4],
        freeze=[
            "backbone",
            "~backbone.layer6.2.conv.1",
            "~backbone.layer6.2.conv.2",
            "~backbone.layer7",
        ],
    ),
)
