"""Small configurations of transformers' models: 128 wide, two layers, 64 tokens or an image of 64 tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.strangers.stranger import Stranger

WORDS, TOKENS, WIDTH, SIDE = 99, 64, 128, 64
TEXT = {
    **{"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0},
}
GROUPED = {**TEXT, "num_key_value_heads": 2, "intermediate_size": 3 * WIDTH}
IMAGE = {
    **{"image_size": SIDE, "patch_size": 8, "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH},
    **{"num_hidden_layers": 2, "num_attention_heads": 4},
}
STAGES = {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]}
STARTS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
PAIR = {
    **{"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 4 * WIDTH, "decoder_ffn_dim": 4 * WIDTH, **STARTS},
}
# Class of the model, class of the configuration, and its settings.
LANGUAGE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", TEXT),
    "roberta": ("RobertaModel", "RobertaConfig", TEXT),
    "electra": ("ElectraModel", "ElectraConfig", {**TEXT, "embedding_size": WIDTH}),
    "albert": ("AlbertModel", "AlbertConfig", {**TEXT, "embedding_size": 32}),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": WORDS, "dim": WIDTH, "hidden_dim": 4 * WIDTH, "n_layers": 2, "n_heads": 4},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**TEXT, "ffn_dim": 4 * WIDTH, "word_embed_proj_dim": WIDTH},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 32}),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 32}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 32}),
    "phi": ("PhiForCausalLM", "PhiConfig", TEXT),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "falcon": ("FalconForCausalLM", "FalconConfig", {k: v for k, v in TEXT.items() if k != "intermediate_size"}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 2}),
}
TEXT_TO_TEXT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            **{"vocab_size": WORDS, "d_model": WIDTH, "d_kv": 32, "d_ff": 4 * WIDTH, "num_layers": 2, "num_heads": 4},
            "decoder_start_token_id": 0,
        },
    ),
    "bart": ("BartModel", "BartConfig", {**PAIR, "vocab_size": WORDS}),
}
VISION: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTModel", "ViTConfig", IMAGE),
    "deit": ("DeiTModel", "DeiTConfig", IMAGE),
    "beit": ("BeitModel", "BeitConfig", IMAGE),
    "dinov2": ("Dinov2Model", "Dinov2Config", {k: v for k, v in IMAGE.items() if k != "intermediate_size"}),
    "clip vision": ("CLIPVisionModel", "CLIPVisionConfig", IMAGE),
    "siglip vision": ("SiglipVisionModel", "SiglipVisionConfig", IMAGE),
    "swinv2": (
        "Swinv2Model",
        "Swinv2Config",
        {
            **{"image_size": SIDE, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]},
            "window_size": 4,
        },
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {**STAGES, "decoder_hidden_size": 64, "num_attention_heads": [1, 2, 4, 4]},
    ),
    "resnet": ("ResNetModel", "ResNetConfig", {**STAGES, "embedding_size": 16}),
    "convnext": ("ConvNextModel", "ConvNextConfig", {**STAGES, "image_size": SIDE}),
    "mobilenet_v2": ("MobileNetV2Model", "MobileNetV2Config", {"image_size": SIDE, "depth_multiplier": 0.35}),
}
WHISPER = {"vocab_size": WORDS, "num_mel_bins": 16, "max_source_positions": TOKENS, **PAIR}


def _make(entry: tuple[str, str, dict[str, Any]]) -> nn.Module:
    import transformers

    model, config, settings = entry
    made = getattr(transformers, model)(getattr(transformers, config)(**settings))
    assert isinstance(made, nn.Module)
    return made.train()


def _words(samples: int) -> torch.Tensor:
    return torch.randint(3, WORDS, (samples, TOKENS))


def _images(samples: int) -> torch.Tensor:
    return torch.randn(samples, 3, SIDE, SIDE)


def _sounds(samples: int) -> torch.Tensor:
    return torch.randn(samples, 16, 2 * TOKENS)


def _plain(model: nn.Module, batch: torch.Tensor) -> Any:
    return model(batch)


def _uncached(model: nn.Module, batch: torch.Tensor) -> Any:
    return model(batch, use_cache=False) if hasattr(getattr(model, "config", None), "use_cache") else model(batch)


def _both_sides(model: nn.Module, batch: torch.Tensor) -> Any:
    return model(input_ids=batch, decoder_input_ids=batch, use_cache=False)


def _hears(model: nn.Module, batch: torch.Tensor) -> Any:
    words = torch.arange(3, 3 + TOKENS).expand(len(batch), -1)
    return model(batch, decoder_input_ids=words, use_cache=False)


def transformers_models() -> Iterator[Stranger]:
    """The table's rows."""
    groups: list[tuple[dict[str, Any], Callable[..., Any], Callable[..., Any]]] = [
        (LANGUAGE, _words, _uncached),
        (TEXT_TO_TEXT, _words, _both_sides),
        (VISION, _images, _plain),
        ({"whisper": ("WhisperModel", "WhisperConfig", WHISPER)}, _sounds, _hears),
    ]
    for entries, batch, call in groups:
        for name, entry in entries.items():
            yield Stranger(name, "transformers", partial(_make, entry), batch, call)
