# ResNet-18 whose last two stages are dilated instead of strided: features at 1/8 of the image.
_base_ = "resnet18.py"
model = dict(backbone=dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)))
