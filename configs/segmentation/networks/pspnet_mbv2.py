_base_ = ["pspnet.py", "../_base_/mobilenet_v2_d8.py"]
network = "pspnet_mbv2"
model = dict(backbone=dict(_delete_=True, **_base_.mobilenet_v2), decode_head=dict(in_channels=320))
# Trained on Cityscapes, from MMSegmentation's model zoo.
weights = "https://mmassets.onedl.ai/mmsegmentation/v0.5/mobilenet_v2/pspnet_m-v2-d8_512x1024_80k_cityscapes/pspnet_m-v2-d8_512x1024_80k_cityscapes_20200825_124817-19e81d51.pth"
# The last five layers are those of pspnet. The published head has 512 channels and this one 128, so the whole head is
# calibrated.
depths = dict(
    calibrate=dict(freeze=["backbone"]),
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
