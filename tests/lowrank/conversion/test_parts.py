"""Which linear layers of a transformer are its MLPs' and which attention's, however its modules are named."""

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

import lowrank
from lowrank import SettingError

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {**SIZES, "vocab_size": 50}
BART = {f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in (("layers", 2), ("ffn_dim", 64))}


def hugging_face(kind, **sizes):
    """A classifier of a kind of model; its sizes are the configuration's."""
    config = getattr(transformers, f"{kind}Config")(num_labels=3, **sizes)
    task = "ImageClassification" if "image_size" in sizes else "SequenceClassification"
    return getattr(transformers, f"{kind}For{task}")(config)


def pytorch():
    return nn.Sequential(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2), nn.Linear(32, 3)
    )


# The network, the layers of its MLPs by the ends of their names, how many, and how many are attention's.
NETWORKS = {
    "BERT": (lambda: hugging_face("Bert", **TEXT), (".intermediate.dense", ".output.dense"), 4, 8),
    "DistilBERT": (
        lambda: hugging_face("DistilBert", dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=50),
        (".ffn.lin1", ".ffn.lin2"),
        4,
        8,
    ),
    "ALBERT": (lambda: hugging_face("Albert", **TEXT, embedding_size=16), (".ffn", ".ffn_output"), 2, 4),
    "OPT": (
        lambda: hugging_face(
            "OPT", **{**TEXT, "intermediate_size": 0, "ffn_dim": 64, "word_embed_proj_dim": 16, "bos_token_id": 2}
        ),
        (".fc1", ".fc2"),
        4,
        8,
    ),
    "BART": (lambda: hugging_face("Bart", **BART, d_model=32, vocab_size=50), (".fc1", ".fc2"), 8, 24),
    "T5": (
        lambda: hugging_face("T5", d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2, vocab_size=50),
        (".DenseReluDense.wi", ".DenseReluDense.wo"),
        8,
        24,
    ),
    "Llama": (lambda: hugging_face("Llama", **TEXT), (".mlp.gate_proj", ".mlp.up_proj", ".mlp.down_proj"), 6, 8),
    "ViT": (
        lambda: hugging_face("ViT", **SIZES, image_size=32, patch_size=8),
        (".mlp.fc1", ".mlp.fc2", ".intermediate.dense", ".output.dense"),
        4,
        8,
    ),
    "timm's ViT": (lambda: timm.create_model("vit_tiny_patch16_224", depth=2), (".mlp.fc1", ".mlp.fc2"), 4, 4),
    "timm's MLP-Mixer": (
        lambda: timm.create_model("mixer_s32_224"),
        (".mlp_tokens.fc1", ".mlp_tokens.fc2", ".mlp_channels.fc1", ".mlp_channels.fc2"),
        32,
        0,
    ),
    "torchvision's Swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [2, 2]),
        (".mlp.0", ".mlp.3"),
        8,
        8,
    ),
    "PyTorch's encoder": (pytorch, (".linear1", ".linear2"), 4, 4),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_mlps_of_common_transformers_are_found_and_neither_attention_nor_classifier_is(name):
    make, ends, mlps, attentions = NETWORKS[name]
    with torch.device("meta"):
        model = make()
    found = lowrank.trailing_layers(model, "all", "linear", "mlp")
    assert len(found) == mlps
    assert all(layer.endswith(ends) and "attention.output" not in layer for layer in found)
    lowrank.open_attention(model)
    assert lowrank.trailing_layers(model, "all", "linear", "mlp") == found
    if attentions:
        attention = lowrank.trailing_layers(model, "all", "linear", "attention")
        assert len(attention) == attentions
        assert not {*found} & {*attention}
    assert lowrank.trailing_layers(model, 1, "linear")[0] not in found  # the classifier


class Attending(nn.Module):
    """A block with attention, of which the rest is given."""

    def __init__(self, **rest):
        super().__init__()
        self.attention = nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4)})
        for name, module in rest.items():
            self.add_module(name, module)


class Classifier(nn.Module):
    """Two stages of blocks with a layer between them, layers ahead of them and a classifier behind them."""

    def __init__(self, *stages):
        super().__init__()
        self.embedding = nn.Sequential(nn.Linear(4, 4))
        self.attention_stages = nn.ModuleList(
            nn.Sequential(nn.Sequential(*blocks), nn.Linear(4, 4)) for blocks in stages
        )
        self.classifier = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def wide():
    return nn.Linear(4, 8)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential, lambda model: nn.ModuleList([model])])
def test_only_blocks_count_and_in_each_the_name_mlp_goes_ahead_of_the_place(wrap):
    model = wrap(
        Classifier(
            [Attending(first=wide(), second=nn.Sequential(wide())), Attending()],  # the second has attention alone
            [Attending(modulation=wide(), MLP=nn.Sequential(wide(), wide()))],
        )
    )
    found = [name.partition("stages.")[2] for name in lowrank.trailing_layers(model, "all", "linear", "mlp")]
    assert found == ["0.0.0.first", "0.0.0.second.0", "1.0.0.MLP.0", "1.0.0.MLP.1"]


def test_a_network_without_attention_and_without_that_name_has_no_mlp():
    model = nn.Sequential(nn.Sequential(wide(), nn.Linear(8, 4)), wide())
    with pytest.raises(SettingError, match="'all' trailing linear layers of its mlp asked of Sequential, which has 0"):
        lowrank.trailing_layers(model, "all", "linear", "mlp")
