"""Causal language models for the classification of texts: TinyLlama by `transformers`, and a small one of its class."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import lowrank
from classification.backbones.registry import backbone
from experiment import ExperimentError

TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
# The sizes of TinyLlama-1.1B-Chat-v1.0; `</s>` pads.
TINYLLAMA_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
MINI_SIZES = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


class SequenceClassifier(nn.Module):
    """A language model with a classifier on the last token; padding is left out of what its layers compress.

    Args:
        model: of `transformers`, with `pad_token_id` in its config.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Token numbers (B, N), padded, to logits (B, num_classes)."""
        config: Any = self.model.config
        mask = tokens != config.pad_token_id
        with lowrank.token_mask(mask):
            return self.model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits


def sequence_classifier(num_classes: int, **sizes: Any) -> SequenceClassifier:
    """A network of these sizes with random weights."""
    from transformers import LlamaConfig, LlamaForSequenceClassification  # slow to import

    return SequenceClassifier(LlamaForSequenceClassification(LlamaConfig(num_labels=num_classes, **sizes)))


@backbone("tinyllama")
def tinyllama(num_classes: int, pretrained: bool) -> nn.Module:
    """TinyLlama-1.1B-Chat: 1.0 G parameters, 66 linear layers in MLPs; from the hub, or a folder as weights."""
    if not pretrained:
        return sequence_classifier(num_classes, **TINYLLAMA_SIZES)
    from transformers import LlamaForSequenceClassification

    try:
        model = LlamaForSequenceClassification.from_pretrained(TINYLLAMA, num_labels=num_classes, pad_token_id=2)
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise ExperimentError(
            f"{TINYLLAMA} cannot be downloaded ({reason}); download that repository elsewhere and give its folder as "
            f"--model.weights"
        ) from None
    return SequenceClassifier(model.float())


@backbone("llama_mini")
def llama_mini(num_classes: int, pretrained: bool) -> nn.Module:
    """A network of TinyLlama's class with 0.2 M parameters, for bytes as tokens."""
    if pretrained:
        raise ExperimentError("llama_mini has no published weights; set --model.pretrained false")
    return sequence_classifier(num_classes, **MINI_SIZES)
