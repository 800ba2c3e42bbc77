"""Language models: padding, gradients, methods, texts from local files in the published layouts, and a run."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import CONFIGS, TINY, execute, finish, only_file
from safetensors.torch import save_file

import lowrank
from classification.backbones import build_model
from classification.backbones.language import TINYLLAMA_SIZES, sequence_classifier
from classification.data import ImageDataModule, load_splits
from experiment import ExperimentError
from lowrank import ASI, HOSVD, WASI, Vanilla


def network():
    torch.manual_seed(0)
    return build_model("llama_mini", 3).double()


def batch(count=4, length=12):
    """Texts of different lengths, padded."""
    tokens = torch.randint(1, 257, (count, length), generator=torch.Generator().manual_seed(1))
    lengths = torch.arange(count) * 2 + 4
    return tokens * (torch.arange(length) < lengths[:, None]), torch.arange(count) % 3


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def gradients(model):
    model.zero_grad()
    loss_of(model, batch()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", [Vanilla(), HOSVD(1.0), ASI(999)], ids=lambda method: method.tag)
def test_at_full_rank_the_gradients_are_autograds(method):
    stock = network()
    model = copy.deepcopy(stock)
    names = lowrank.trailing_layers(model, "all", "linear")
    assert len(names) == 4 * 7 + 1
    lowrank.convert(model, names, method)
    torch.testing.assert_close(gradients(model), gradients(stock), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_padding_takes_nothing_of_the_rank():
    """At the rank of the real tokens the gradient is exact, and below it closer than with padding in the way."""
    stock, (tokens, labels) = network(), batch()
    name = "model.model.layers.3.mlp.down_proj"
    real = int((tokens != 0).any(0).sum())  # the longest text
    tokens = torch.cat([tokens, torch.zeros(4, 10, dtype=torch.long)], 1)  # more padding than text
    torch.nn.init.normal_(stock.model.model.embed_tokens.weight)  # of padding too, as in a model that shares its token
    loss_of(stock, (tokens, labels)).backward()
    exact = stock.get_submodule(name).weight.grad

    def error(masked):
        """Of the weight gradient at ranks that are too small for everything, after some iterations."""
        model = copy.deepcopy(stock)
        lowrank.convert(model, [name], ASI([4, 4, 12]), everywhere=True)
        for _ in range(3):
            model.zero_grad()
            y = model(tokens) if masked else model.model(tokens, attention_mask=(tokens != 0).long()).logits
            F.cross_entropy(y, labels).backward()
        return float((model.get_submodule(name).weight.grad - exact).norm())

    assert real < tokens.shape[1]
    assert error(masked=True) < error(masked=False)
    model = lowrank.convert(copy.deepcopy(stock), [name], HOSVD(0.9))
    loss_of(model, (tokens, labels)).backward()
    kept = model.get_submodule(name)._lowrank.formula_bytes
    assert lowrank.account(model, [name], tokens)[name].activation_bytes == kept
    lowrank.convert(stock, [name], ASI([4, real, 999]))
    assert torch.allclose(gradients_of(stock, (tokens, labels), name), exact, rtol=1e-9, atol=1e-10)


def gradients_of(model, batch, name):
    model.zero_grad()
    loss_of(model, batch).backward()
    return model.get_submodule(name).weight.grad


def test_a_mask_leaves_other_inputs_alone():
    with lowrank.token_mask(torch.tensor([[1, 0]])):
        layer = lowrank.convert(torch.nn.Sequential(torch.nn.Linear(3, 2)), ["0"], HOSVD(1.0))
        x = torch.randn(2, 4, 3)
        layer(x).sum().backward()
    torch.testing.assert_close(layer[0].weight.grad, x.sum((0, 1)).expand(2, 3))


@pytest.mark.slow
def test_perplexity_and_ranks():
    model = network()
    names = lowrank.trailing_layers(model, 3, "linear", "mlp")
    table = lowrank.measure_perplexity(model, names, loss_of, batch(), energies=(0.5, 1.0))
    assert max(row.perplexity[1] for row in table.layers) < 1e-9
    plan = lowrank.select_ranks(table, sum(row.nbytes[0] for row in table.layers))
    lowrank.convert(model, names, WASI(energy=0.5, ranks=plan))
    optimizer = lowrank.SGD(model.parameters(), 0.01)
    before = float(loss_of(model, batch()).detach())
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model, batch()).backward()
        optimizer.step()
    assert float(loss_of(model, batch()).detach()) < before


def test_tinyllama_has_the_published_size():
    with torch.device("meta"):
        model = sequence_classifier(2, **TINYLLAMA_SIZES)
    names = lowrank.trailing_layers(model, "all", "linear", "mlp")
    assert len(names) == 66
    assert names[-1] == "model.model.layers.21.mlp.down_proj"
    # The published 1,100,048,384 parameters, with a classifier in place of the head over the vocabulary.
    assert sum(p.numel() for p in model.parameters()) == 1_100_048_384 - 32000 * 2048 + 2 * 2048


def test_weights_from_a_folder_of_a_language_model(tmp_path):
    model = network().float()
    state = {key.removeprefix("model."): value for key, value in model.state_dict().items() if "score" not in key}
    save_file({**state, "lm_head.weight": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    loaded = build_model("llama_mini", 3, weights=str(tmp_path))
    for key, value in state.items():
        assert torch.equal(loaded.state_dict()[f"model.{key}"], value)
    del state["model.norm.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ExperimentError, match="1 tensors missing"):
        build_model("llama_mini", 3, weights=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ExperimentError, match="cannot be read"):
        build_model("llama_mini", 3, weights=str(tmp_path))


# Texts.

BOOLQ = {"question": "is water wet", "title": "Water", "answer": True, "passage": "Water is wet."}
NEWS = {"text": "Stocks fell.", "label": 2}


def write(folder, **parts):
    folder.mkdir(parents=True)
    for part, rows in parts.items():
        (folder / f"{part}.jsonl").write_text(
            "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
        )


def test_boolq_and_ag_news_from_local_files(tmp_path):
    write(tmp_path / "boolq", train=[BOOLQ, {**BOOLQ, "answer": False}] * 10, validation=[BOOLQ] * 3)
    splits = load_splits("boolq", tmp_path)
    assert splits.classes == ("no", "yes")
    assert [len(part.labels) for part in (splits.train, splits.val, splits.test)] == [18, 2, 3]
    assert splits.test.texts[0] == "is water wet [SEP] Water is wet."
    assert list(splits.test.labels) == [1, 1, 1]
    write(tmp_path / "ag_news", train=[{**NEWS, "label": n % 4} for n in range(20)], test=[NEWS])
    news = load_splits("ag_news", tmp_path)
    assert len(news.classes) == 4
    assert list(news.test.labels) == [2]
    assert np.array_equal(load_splits("boolq", tmp_path).train.labels, splits.train.labels)
    assert news.fingerprint != splits.fingerprint == load_splits("boolq", tmp_path).fingerprint


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "line 1 is not JSON"),
        ([BOOLQ, {"question": "x", "passage": "y"}], "line 2 has no proper 'answer'"),
        ([{**BOOLQ, "answer": "yes"}], "no proper 'answer'"),
        ([], "is empty"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, rows, message):
    write(tmp_path / "boolq", train=rows, validation=[BOOLQ])
    with pytest.raises(ExperimentError, match=message) as raised:
        load_splits("boolq", tmp_path)
    assert "\n" not in str(raised.value)


def test_a_label_out_of_range_and_missing_files_are_refused(tmp_path, monkeypatch):
    write(tmp_path / "ag_news", train=[NEWS] * 4, test=[{**NEWS, "label": 4}])
    with pytest.raises(ExperimentError, match="classes 0 to 3"):
        load_splits("ag_news", tmp_path)

    def fail(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(ExperimentError, match=r"boolq is not at .*train\.jsonl.*no route to host.*put the two files"):
        load_splits("boolq", tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: {"train": [BOOLQ] * 5, "validation": [BOOLQ]})
    assert len(load_splits("boolq", tmp_path).test.labels) == 1


def test_bytes_are_cut_and_padded_and_shuffled_like_images(tmp_path):
    data = ImageDataModule("sentences", str(tmp_path), batch_size=8, max_length=16)
    tokens, labels = data.first_batch(0)
    assert tokens.shape == (8, 16)
    assert tokens.dtype == torch.int64
    row = next(iter(data.test))[0]
    text = data.test.part.texts[0].encode()[:16]
    assert bytes((row[row > 0] - 1).tolist()) == text
    assert set(np.unique(data.train.part.labels)) == {0, 1, 2}
    halves = [
        ImageDataModule("sentences", str(tmp_path), batch_size=8, partition=part) for part in ("pretrain", "finetune")
    ]
    assert sum(len(half.train) for half in halves) == len(data.train)
    assert len(labels) == 8


def test_a_tokenizer_from_a_folder_and_one_that_is_not_there(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"</s>": 0, "water": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="?").save_pretrained(tmp_path / "words")
    write(tmp_path / "boolq", train=[BOOLQ] * 12, validation=[BOOLQ])
    options = {"root": str(tmp_path), "batch_size": 2, "max_length": 5}
    data = ImageDataModule("boolq", tokenizer=str(tmp_path / "words"), **options)
    assert data.test[0][0].tolist() == [2, 1, 2, 2, 2]  # is water wet [ SEP
    with pytest.raises(ExperimentError, match=r"tokenizer .*nowhere cannot be loaded"):
        ImageDataModule("boolq", tokenizer=str(tmp_path / "nowhere"), **options)


@pytest.mark.slow
def test_a_run_on_sentences_with_ranks_by_perplexity(tmp_path, capsys):
    c = CONFIGS
    configs = [c / "setups" / "b.yaml", c / "data" / "sentences.yaml", c / "models" / "llama_mini.yaml"]
    words = [word for path in configs for word in ("--config", str(path))]
    options = [*words, *TINY, "--model.layers", "2", "--data.max_length", "24", "--runs_dir", str(tmp_path)]
    execute(["measure", *options], capsys)
    table = only_file(tmp_path, "perplexity.json")
    budget = ["--model.budget.table", str(table), "--model.budget.mib", "1"]
    method = ["--config", str(c / "methods" / "wasi_0.9.yaml")]
    done = finish(["fit", *options, *method, *budget], tmp_path, capsys)
    assert done.record["run"]["dataset"] == "sentences"
    assert done.record["run"]["method"] == "wasi_0.9_1mib"
    assert done.record["memory_bytes"]["activation_formula"] > 0
