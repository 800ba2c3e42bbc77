_base_ = ["../_base_/resnet18_d8.py", "../_base_/runtime.py"]
network = "fcn"
model = dict(decode_head=dict(type="FCNHead", num_convs=2, concat_input=True))
# Trained on Cityscapes, from MMSegmentation's model zoo.
weights = "https://mmassets.onedl.ai/mmsegmentation/v0.5/fcn/fcn_r18-d8_512x1024_80k_cityscapes/fcn_r18-d8_512x1024_80k_cityscapes_20201225_021327-6c50f8b4.pth"
# Of each depth: the compressed layers with the patch of the gradient filter, and what is frozen.
depths = dict(
    last5=dict(
        layers=[
            "backbone.layer4.1.conv1",
            "backbone.layer4.1.conv2",
            "decode_head.convs.0.conv",
            "decode_head.convs.1.conv",
            "decode_head.conv_cat.conv",
        ],
        patches=[4, 4, 4, 4, 4],
        freeze=[
            "backbone",
            "~backbone.layer4.1.conv1",
            "~backbone.layer4.1.conv2",
        ],
    ),
    last10=dict(
        layers=[
            "backbone.layer3.1.conv1",
            "backbone.layer3.1.conv2",
            "backbone.layer4.0.conv1",
            "backbone.layer4.0.conv2",
            "backbone.layer4.0.downsample.0",
            "backbone.layer4.1.conv1",
            "backbone.layer4.1.conv2",
            "decode_head.convs.0.conv",
            "decode_head.convs.1.conv",
            "decode_head.conv_cat.conv",
        ],
        patches=[2, 2, 2, 2, 2, 2, 2, 2, 2, 2],
        freeze=[
            "backbone",
            "~backbone.layer3.1.conv1",
            "~backbone.layer3.1.conv2",
            "~backbone.layer4.0.conv1",
            "~backbone.layer4.0.conv2",
            "~backbone.layer4.0.downsample.0",
            "~backbone.layer4.1.conv1",
            "~backbone.layer4.1.conv2",
        ],
    ),
)
