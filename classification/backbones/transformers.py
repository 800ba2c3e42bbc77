"""Swin-T and ViT-B/32 of torchvision, with the published ImageNet weights; and small networks of the same classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models import SwinTransformer, VisionTransformer

from classification.backbones.registry import backbone
from classification.backbones.torchvision_models import build_pretrained, with_classes
from experiment import ExperimentError


def resized_positions(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Position embeddings (1, 1 + n^2, E), the class token's first, for a grid of rows x columns patches."""
    side = round((positions.shape[1] - 1) ** 0.5)
    if (rows, columns) == (side, side):
        return positions
    token, grid = positions[:, :1], positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([token, grid.flatten(2).mT], 1)


torch.fx.wrap("resized_positions")


class AnySizeVisionTransformer(VisionTransformer):
    """torchvision's vision transformer for images of any size that whole patches fill.

    At another size than that of the weights, the position embeddings are interpolated, as is usual for fine-tuning
    (ViT, ICLR 2021, sec. 3.2).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        patches = self.conv_proj(x)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches.flatten(2).transpose(1, 2)], 1)
        positions = resized_positions(self.encoder.pos_embedding, patches.shape[2], patches.shape[3])
        encoded = self.encoder.ln(self.encoder.layers(self.encoder.dropout(tokens + positions)))
        return self.heads(encoded[:, 0])


@backbone("vit_b_32")
def vit_b_32(num_classes: int, pretrained: bool) -> nn.Module:
    """ViT-B/32: 88 M parameters, 24 linear layers in MLPs, native resolution 224."""
    weights = models.ViT_B_32_Weights.IMAGENET1K_V1
    model = with_classes(build_pretrained(models.vit_b_32, weights, pretrained), "heads.head", num_classes)
    model.__class__ = AnySizeVisionTransformer
    return model


@backbone("swin_t")
def swin_t(num_classes: int, pretrained: bool) -> nn.Module:
    """Swin-T: 28 M parameters, 24 linear layers in MLPs, 4-D inputs."""
    weights = models.Swin_T_Weights.IMAGENET1K_V1
    return with_classes(build_pretrained(models.swin_t, weights, pretrained), "head", num_classes)


def _refuse_pretrained(name: str, pretrained: bool) -> None:
    if pretrained:
        raise ExperimentError(f"{name} has no ImageNet weights; setup B pretrains its own, or give --model.weights")


@backbone("vit_mini")
def vit_mini(num_classes: int, pretrained: bool) -> nn.Module:
    """A vision transformer for the digits: 0.3 M parameters, 8 linear layers in MLPs, native resolution 32."""
    _refuse_pretrained("vit_mini", pretrained)
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 4, "num_heads": 4, "hidden_dim": 80, "mlp_dim": 320}
    model = VisionTransformer(**sizes, num_classes=num_classes)
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)  # torchvision's zeros stop every gradient at the head
    model.__class__ = AnySizeVisionTransformer
    return model


@backbone("swin_mini")
def swin_mini(num_classes: int, pretrained: bool) -> nn.Module:
    """A Swin transformer for the digits: 0.3 M parameters, 8 linear layers in MLPs, native resolution 32."""
    _refuse_pretrained("swin_mini", pretrained)
    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=48,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        stochastic_depth_prob=0.0,
        num_classes=num_classes,
    )
