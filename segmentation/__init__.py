"""Low-rank activations in MMSegmentation: importing this package registers the hook `LowRankHook`,
and for exact resuming the sampler `PlacedSampler` and the data set wrapper `PlacedDataset`.

In a config of your own:

    custom_imports = dict(imports=["segmentation"])
    custom_hooks = [
        dict(type="LowRankHook", method=dict(type="HOSVD", energy=0.8), layers=["decode_head.bottleneck.conv"]),
    ]
"""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Fail to import")  # a part of MMCV that is not used here
    from segmentation.data.draws import PlacedDataset, PlacedSampler
    from segmentation.hook import LowRankHook

__all__ = ["LowRankHook", "PlacedDataset", "PlacedSampler"]
