_base_ = ["deeplabv3.py", "../_base_/mobilenet_v2_d8.py"]
network = "deeplabv3_mbv2"
model = dict(backbone=dict(_delete_=True, **_base_.mobilenet_v2), decode_head=dict(in_channels=320))
# Trained on Cityscapes, from MMSegmentation's model zoo.
weights = "https://mmassets.onedl.ai/mmsegmentation/v0.5/mobilenet_v2/deeplabv3_m-v2-d8_512x1024_80k_cityscapes/deeplabv3_m-v2-d8_512x1024_80k_cityscapes_20200825_124836-bef03590.pth"
# The last five layers are those of deeplabv3. The published head has 512 channels and this one 128, so all of the head
# is calibrated.
depths = dict(
    calibrate=dict(freeze=["backbone"]),
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
