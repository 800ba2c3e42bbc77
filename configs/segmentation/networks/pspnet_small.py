# An eighth of the width, for small images on a CPU.
_base_ = "pspnet.py"
network = "pspnet_small"
model = dict(backbone=dict(stem_channels=16, base_channels=16), decode_head=dict(in_channels=128, channels=32))
weights = None
