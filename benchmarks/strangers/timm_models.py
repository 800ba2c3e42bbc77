"""timm's models: about sixty architectures, the smallest member of each, deeper ones cut to a few blocks.

LeViT is left out: in evaluation mode it holds on to a graph, so that a second step fails in the stock model too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.strangers.stranger import Stranger

AS_THEY_ARE = (
    "resnet10t resnet18d resnetv2_50d_gn resnext26ts seresnext26ts skresnet18 resnest14d res2net50_14w_8s "
    "eca_resnext26ts gcresnext26ts mobilenetv3_small_050 mobilenetv2_050 mobilenetv4_conv_small_050 "
    "efficientnet_lite0 tf_efficientnet_b0 efficientnet_b0_gn tf_mixnet_s mnasnet_small fbnetc_100 lcnet_035 "
    "tinynet_e hardcorenas_a regnety_002 regnetx_002 regnetv_040 repvgg_a0 mobileone_s0 hrnet_w18_small dla34 "
    "densenet121 ghostnet_050 ghostnetv2_100 rexnet_100 selecsls42 vovnet39a cspresnet50 convnext_atto "
    "convnextv2_atto inception_next_atto hgnetv2_b0 nf_regnet_b0 eca_nfnet_l0 fastvit_t8 poolformer_s12 "
    "caformer_s18 edgenext_xx_small efficientvit_b0 mobilevit_xxs mobilevitv2_050 pvt_v2_b0 starnet_s1 "
    "repvit_m0_9 mambaout_femto"
)
# Name, and options that make it smaller; those with a fixed image size have it in the options.
SMALL = {"depth": 3}
MODELS: dict[str, dict[str, Any]] = {
    **{name: {} for name in AS_THEY_ARE.split()},
    "vit_tiny_patch16_224": {**SMALL, "img_size": 64},
    "deit_tiny_patch16_224": {**SMALL, "img_size": 64},
    "beit_base_patch16_224": {**SMALL, "img_size": 64, "embed_dim": 96, "num_heads": 3},
    "eva02_tiny_patch14_224": {**SMALL, "img_size": 56},
    "cait_xxs24_224": {**SMALL, "img_size": 64},
    "xcit_nano_12_p16_224": {"img_size": 64, **SMALL},
    "mixer_s32_224": {"img_size": 64},
    "resmlp_12_224": {"img_size": 64},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (1, 1, 1, 1), "embed_dim": 48},
    "swinv2_cr_tiny_224": {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 48, "window_size": 2},
    "visformer_tiny": {"img_size": 64},
    "coat_lite_tiny": {"img_size": 64},
    "naflexvit_base_patch16_gap": {**SMALL, "embed_dim": 96, "num_heads": 3},
}
PLAIN = 64


def _make(name: str, options: dict[str, Any]) -> torch.nn.Module:
    from timm import create_model

    model = create_model(name, pretrained=False, num_classes=7, **options)
    assert isinstance(model, torch.nn.Module)
    for parameter in model.parameters():
        if not parameter.any():  # a scale, or a head, that starts at zero would hide what is ahead of it
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def _images(side: int, samples: int) -> torch.Tensor:
    return torch.randn(samples, 3, side, side)


def timm_models() -> Iterator[Stranger]:
    """The table's rows."""
    for name, options in MODELS.items():
        yield Stranger(name, "timm", partial(_make, name, options), partial(_images, options.get("img_size", PLAIN)))
