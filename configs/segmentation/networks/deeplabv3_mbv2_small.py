# A third of the width, for small images on a CPU.
_base_ = "deeplabv3_mbv2.py"
network = "deeplabv3_mbv2_small"
model = dict(
    backbone=dict(widen_factor=0.35),
    decode_head=dict(in_channels=112, channels=32, dilations=(1, 2, 4, 6)),
)
weights = None
