"""Low-rank activations in MMSegmentation: importing this package registers the hook `LowRankHook`,
and for exact resuming the sampler `PlacedSampler` and the data set wrapper `PlacedDataset`.

In a config of your own:

    custom_imports = dict(imports=["segmentation"])
    custom_hooks = [
        dict(type="LowRankHook", method=dict(type="HOSVD", energy=0.8), layers=["decode_head.bottleneck.conv"]),
    ]
"""

from segmentation.data.draws import PlacedDataset, PlacedSampler
from segmentation.hook import LowRankHook

__all__ = ["LowRankHook", "PlacedDataset", "PlacedSampler"]
