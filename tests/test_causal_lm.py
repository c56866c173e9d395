"""The decoder against float64 numpy, files of weights, answers on the cache, chats and the loss of answers."""
from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import reference_decoder as reference
from mindspore import Tensor
from tiny_decoders import CONFIG, TEMPLATE, byte_tokenizer, random_weights, write_gguf, write_model

import bases  # isort: skip
import generation  # isort: skip
import hf_folder  # isort: skip
from batches import bucket, encode  # isort: skip
from chat import Chat  # isort: skip
from common import UserError  # isort: skip
from decoder import AnswerLoss, Decoder  # isort: skip
from instructions import Sample  # isort: skip

SIZES = hf_folder.sizes_of(CONFIG, 2048)
# A head apart from the table, biases, heads of another width than hidden_size / heads, one key for each query.
OTHER = {"untied": dataclasses.replace(SIZES, tie_word_embeddings=False, head_dim=6),
         "biases": dataclasses.replace(SIZES, qkv_bias=True, o_bias=True, mlp_bias=True, num_key_value_heads=4)}


def net_of(sizes, seed: int = 0) -> tuple[Decoder, dict[str, np.ndarray]]:
    net = Decoder(sizes)
    weights = random_weights(net, seed)
    for name, parameter in net.parameters_and_names():
        parameter.set_data(Tensor(weights[bases.hugging_face(name)]))
    return net, weights


@pytest.mark.parametrize("kind", OTHER)
def test_logits_are_the_papers(mode, kind):
    net, weights = net_of(OTHER[kind])
    ids = np.random.default_rng(1).integers(0, 258, (2, 11)).astype(np.int32)
    found = net(Tensor(ids)).asnumpy()
    expected = [reference.logits(row, weights, OTHER[kind]) for row in ids]
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_gradients_are_those_of_the_reference(graph_mode):
    """The cells with a gradient of their own: central differences of the float64 reference, in random directions."""
    net, weights = net_of(SIZES)
    ids = np.random.default_rng(1).integers(0, 258, (2, 9)).astype(np.int32)
    places, labels = np.array([3, 4, 12, 16], np.int32), np.array([5, 6, 7, 8], np.int32)
    wanted = np.full((2, 9), -100)
    wanted.reshape(-1)[places + 1] = labels
    inputs = [*map(Tensor, (ids, places, labels, np.ones((4, 1), np.float32), np.float32(4)))]
    loss = AnswerLoss(net)
    names = [bases.hugging_face(name) for name, _ in net.parameters_and_names()]
    value, gradients = ms.value_and_grad(loss, None, ms.ParameterTuple(net.get_parameters()))(*inputs)
    assert float(value.asnumpy()) == pytest.approx(reference.answer_loss(ids, wanted, weights, SIZES), rel=1e-5)
    rng, exact = np.random.default_rng(2), {name: value.astype(np.float64) for name, value in weights.items()}
    for name, gradient in zip(names, gradients):
        direction = rng.standard_normal(weights[name].shape)
        either = [reference.answer_loss(ids, wanted, {**exact, name: exact[name] + step * direction}, SIZES)
                  for step in (1e-5, -1e-5)]
        assert float((gradient.asnumpy() * direction).sum()) == pytest.approx((either[0] - either[1]) / 2e-5, rel=1e-3,
                                                                              abs=1e-4), name


@pytest.mark.parametrize("kind", OTHER)
def test_answers_on_the_cache_are_those_of_the_whole_text(mode, kind):
    """Prompts of several lengths beside each other, in a bucket and past it; one text has ended before the others."""
    net, weights = net_of(OTHER[kind])
    rng = np.random.default_rng(3)
    prompts = [list(rng.integers(0, 258, length)) for length in (3, 7, 35)[:3 if mode == "graph" else 2]]
    generator = generation.Generator(net, 2, 48)
    found = generator(prompts, 6)
    for prompt, answer in zip(prompts, found):
        text = list(prompt)
        for _ in range(6):
            text.append(int(reference.logits(np.array(text), weights, OTHER[kind])[-1].argmax()))
        assert answer == text[len(prompt):]
    stop = found[0][2]
    ended = generator(prompts[:2], 6, frozenset([stop]))
    assert ended[0] == found[0][:found[0].index(stop)]
    assert ended[1] == (found[1][:found[1].index(stop)] if stop in found[1] else found[1])
    assert generator(prompts[:2], 6, temperature=1.0, top_p=1e-9) == found[:2]
    drawn = generator(prompts[:1], 6, temperature=2.0, seed=5)
    assert drawn == generator(prompts[:2], 6, temperature=2.0, seed=5)[:1]
    with pytest.raises(UserError, match="43 new ones do not fit into 48"):
        generator(prompts[:2], 43)
    with pytest.raises(UserError, match="256 positions"):
        generation.Generator(net, 1, 257)


def test_tokens_are_drawn_as_the_chances_say():
    logits, rng = np.log([0.5, 0.3, 0.15, 0.05]).astype(np.float32), np.random.default_rng(0)
    count = np.bincount([generation.pick(logits, 1.0, 1.0, rng) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(count, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    count = np.bincount([generation.pick(logits, 1.0, 0.75, rng) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(count, [0.625, 0.375, 0, 0], atol=0.03)
    count = np.bincount([generation.pick(logits, 0.5, 1.0, rng) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(count, np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365, atol=0.03)
    assert {generation.pick(logits, 0.0, 1.0, rng) for _ in range(9)} == {0}


@pytest.mark.parametrize(("config", "sizes", "shards"), [
    ({}, {}, 2),
    ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False}, {"qkv_bias": True}, 1),
    ({"model_type": "mistral", "head_dim": 6, "tie_word_embeddings": False, "sliding_window": 20},
     {"head_dim": 6, "tie_word_embeddings": False, "context": 20}, 1),
    ({"attention_bias": True, "mlp_bias": True, "rope_theta": None, "rope_parameters": {"rope_theta": 500.0}},
     {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "rope_theta": 500.0}, 1)])
def test_folders_of_hugging_face(tmp_path, config, sizes, shards):
    config = {key: value for key, value in (CONFIG | config).items() if value is not None}
    expected = dataclasses.replace(SIZES, **sizes)
    assert hf_folder.sizes_of(hf_folder.KINDS[config["model_type"]] | config, 2048) == expected
    weights = write_model(tmp_path / "model", expected, config, shards)
    base = bases.load_base(tmp_path / "model")
    for name, parameter in base.net.parameters_and_names():
        np.testing.assert_array_equal(parameter.asnumpy(), weights[bases.hugging_face(name)], err_msg=name)
    assert base.chat.stop == {1}


def change(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def lose_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def cut_short(folder: Path) -> None:
    file = folder / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize(("spoil", "message"), [
    (lose_shard, "names files that are not beside it: model-00002-of-00002.safetensors"),
    (cut_short, "is not a whole safetensors file"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "there is no .*tokenizer.json"),
    (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
    (lambda folder: change(folder, model_type="gpt2"), "model_type is 'gpt2': expected llama, qwen2, mistral"),
    (lambda folder: change(folder, rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rope_scaling is 'llama3'"),
    (lambda folder: change(folder, rope_parameters={"rope_type": "yarn"}), "rope_scaling is 'yarn'"),
    (lambda folder: change(folder, hidden_act="gelu"), "hidden_act is 'gelu'"),
    (lambda folder: change(folder, quantization_config={"bits": 4}), "quantization_config is"),
    (lambda folder: change(folder, num_hidden_layers=3), "lacks model.layers.2.*and 6 more"),
    (lambda folder: change(folder, num_hidden_layers=1), "holds what the model does not have: model.layers.1"),
    (lambda folder: change(folder, vocab_size=300), r"another shape model.embed_tokens.weight \(259, 16\)"),
    (lambda folder: change(folder, num_key_value_heads=3), "4 heads of queries on 3 of keys"),
    (lambda folder: change(folder, hidden_size="big"), "hidden_size must be a whole number, got 'big'")])
def test_a_folder_that_cannot_be_computed_is_refused(tmp_path, spoil, message):
    write_model(tmp_path / "model", SIZES, CONFIG, 2)
    spoil(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        bases.load_base(tmp_path / "model")


def test_gguf_holds_what_the_folder_holds(tmp_path):
    weights = write_model(tmp_path / "model", SIZES, CONFIG)
    write_gguf(tmp_path / "model.gguf", weights)
    base, other = bases.load_base(tmp_path / "model.gguf"), bases.load_base(tmp_path / "model")
    assert base.net.sizes == dataclasses.replace(SIZES, rms_norm_eps=base.net.sizes.rms_norm_eps)
    for name, parameter in base.net.parameters_and_names():
        np.testing.assert_array_equal(parameter.asnumpy(), weights[bases.hugging_face(name)], err_msg=name)
    chat = [{"role": "user", "content": "in 1984, 你好"}]
    assert base.chat.prompt(chat) == other.chat.prompt(chat)
    assert base.chat.decode(base.chat.prompt(chat)) == "user\nin 1984, 你好\nassistant\n"
    write_gguf(tmp_path / "other.gguf", weights, "gemma")
    with pytest.raises(UserError, match="architecture 'gemma': expected 'llama'"):
        bases.load_base(tmp_path / "other.gguf")
    write_gguf(tmp_path / "scaled.gguf", weights, **{"rope.scaling.type": "yarn"})
    with pytest.raises(UserError, match=r"scales its rotary positions \(yarn\)"):
        bases.load_base(tmp_path / "scaled.gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    for size in (2, 100, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match="cannot be read as a GGUF file"):
            bases.load_base(tmp_path / "cut.gguf")
    with pytest.raises(UserError, match="no base at"):
        bases.load_base(tmp_path / "none.gguf")


def chat_of(template: str = TEMPLATE) -> Chat:
    return Chat(byte_tokenizer(), template, "", "<|im_end|>", [])


def test_answers_alone_are_marked():
    chat = chat_of()
    messages = [{"role": role, "content": text} for role, text in
                (("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))]
    ids, marks = chat.tokens(messages)
    assert ids == chat.encode(chat.text(messages, False))
    assert chat.tokenizer.decode([one for one, mark in zip(ids, marks) if mark], skip_special_tokens=False) == \
        "two<|im_end|>four<|im_end|>"
    assert chat.prompt(messages[:1]) == ids[:marks.index(True)]
    plain = Chat(byte_tokenizer(), None, "", "<|im_end|>", [])
    assert plain.text(messages[:1], True) == "### Instruction:\none\n\n### Response:\n"
    with pytest.raises(UserError, match="elsewhere than where it is asked for"):
        chat_of("{{ messages[-1]['content'] }}").tokens(messages)
    with pytest.raises(UserError, match="cannot show this chat: no system"):
        chat_of("{{ raise_exception('no system') }}").tokens(messages)
    with pytest.raises(UserError, match="template is not valid"):
        chat_of("{% for")
    with pytest.raises(UserError, match="which token ends an answer"):
        Chat(byte_tokenizer(), None, "", "", [])


def test_the_loss_is_that_of_the_answers(graph_mode):
    """Other labels for the prompts' tokens: the same loss; another label for one token of an answer: another loss."""
    net, weights = net_of(SIZES)
    samples = [Sample([{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b" * m}], "")
               for n, m in ((3, 2), (1, 5))]
    (one,), _ = encode(samples, chat_of(), [64])
    ids, places, _, real, total = one.batch([0, 1], one.room(2), sum(map(len, one.places)))
    loss = AnswerLoss(net)

    def with_labels(labels: np.ndarray) -> float:
        there = bucket(64, [(list(row), own) for row, own in zip(labels, one.places)])
        return float(loss(*map(Tensor, (ids, places, there.batch([0, 1], one.room(2), 1)[2], real, total))).asnumpy())

    answered = np.zeros((2, 64), bool)
    for row, own in zip(answered, one.places):
        row[own + 1] = True
    before = with_labels(one.ids)
    assert before == pytest.approx(reference.answer_loss(one.ids, np.where(answered, one.ids, -100), weights, SIZES),
                                   rel=1e-5)
    assert with_labels(np.where(answered, one.ids, 77)) == before
    changed = one.ids.copy()
    changed[0, one.places[0][-1] + 1] = 77
    assert abs(with_labels(changed) - before) > 1e-3


@pytest.mark.slow
def test_smollm2_knows_the_capital(graph_mode):
    try:
        base = bases.load_base()
    except UserError as error:
        pytest.skip(str(error))
    prompt = base.chat.encode("The capital of France is")
    found = generation.Generator(base.net, 1, 64)([prompt], 2, base.chat.stop)
    assert base.chat.decode(found[0]).startswith(" Paris")


@pytest.mark.interop
@pytest.mark.parametrize(("kind", "more"), [
    ("Llama", {"tie_word_embeddings": False, "attention_bias": True}), ("Qwen2", {"tie_word_embeddings": True}),
    ("Mistral", {"sliding_window": None, "head_dim": 6})])
def test_transformers_computes_the_same(tmp_path, graph_mode, kind, more):
    """A small random model that transformers saves, in shards."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {key: value for key, value in CONFIG.items() if key not in ("model_type", "rope_theta")} | more
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model", max_shard_size="8KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    ids = np.random.default_rng(1).integers(0, 258, (2, 13)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(ids).long()).logits.numpy()
    found = bases.load_net(tmp_path / "model")(Tensor(ids)).asnumpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    shutil.rmtree(tmp_path / "model")
