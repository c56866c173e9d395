"""Trainable tokens as a method of its own; the layers themselves are those of LoRA's tokens, in `test_tokens.py`."""
from __future__ import annotations

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from nets import unchanged
from safetensors.numpy import load_file, save_file

import mindpet_lite as mp
from mindpet_lite import TrainableTokensConfig
from mindpet_lite.graph.tree import set_parameter

TOKENS = [5, 2]
IDS = Tensor(np.array([[0, 2, 5, 2], [8, 5, 1, 3]], np.int32))
ROWS = "embed_tokens.mindpet_delta_trainable_tokens_rows"


class Net(nn.Cell):
    """A table, a layer, and an output layer that has the table too where `tied`."""

    def __init__(self, tied: bool = True, seed: int = 0) -> None:
        super().__init__()
        self.embed_tokens, self.q, self.lm_head = nn.Embedding(9, 4), nn.Dense(4, 4), nn.Dense(4, 9)
        rng = np.random.default_rng(seed)
        for item in self.get_parameters():
            item.set_data(Tensor(rng.standard_normal(item.shape).astype(np.float32)))
        if tied:
            set_parameter(self.lm_head, "weight", self.embed_tokens.embedding_table)

    def construct(self, ids):
        return self.lm_head(ops.square(self.q(self.embed_tokens(ids))))


def tuned(net: nn.Cell, **settings) -> nn.Cell:
    return mp.get_pet_model(net, TrainableTokensConfig(**{"token_indices": TOKENS, **settings}))


def shaken(net: nn.Cell) -> nn.Cell:
    rng = np.random.default_rng(7)
    for item in net.trainable_params():
        ops.assign(item, Tensor(rng.standard_normal(item.shape).astype(np.float32)))
    return net


def output(net: nn.Cell) -> np.ndarray:
    return net(IDS).asnumpy()


def expected(net: nn.Cell, tied: bool, strength: float = 1.0) -> np.ndarray:
    """Return the output in float64, with the trained rows in the table."""
    held = {path: item.asnumpy().astype(np.float64) for path, item in net.parameters_and_names()}
    table = held["embed_tokens.embedding_table"].copy()
    table[TOKENS] += strength * (held[ROWS] - table[TOKENS])
    hidden = (table[IDS.asnumpy()] @ held["q.weight"].T + held["q.bias"]) ** 2
    return hidden @ (table if tied else held["lm_head.weight"]).T + held["lm_head.bias"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "of its own"])
def test_rows_train_strength_file_and_merge(tied, mode):
    base, net = output(Net(tied)), tuned(Net(tied))
    assert np.array_equal(output(net), base) and [item.name for item in net.trainable_params()] == [ROWS]
    shaken(net)
    full = output(net)
    np.testing.assert_allclose(full, expected(net, tied), rtol=1e-5, atol=1e-5)
    with mp.adapters_disabled(net):
        assert np.array_equal(output(net), base)
    mp.set_lora_scale(net, 0.5)
    np.testing.assert_allclose(output(net), expected(net, tied, 0.5), rtol=1e-5, atol=1e-5)
    mp.set_lora_scale(net, 1)
    mp.save_adapter(net, "out")
    stored = load_file("out/adapter_model.safetensors")
    assert list(stored) == ["base_model.model.embed_tokens.trainable_tokens_delta"]
    described = json.loads(Path("out/adapter_config.json").read_text())
    assert {name: described[name] for name in ("peft_type", "token_indices", "target_modules", "init_weights")} == {
        "peft_type": "TRAINABLE_TOKENS", "token_indices": TOKENS, "target_modules": ["embed_tokens"],
        "init_weights": True}
    assert np.array_equal(output(mp.load_adapter(Net(tied), "out")), full)
    mp.merge(net)
    assert type(net.lm_head) is nn.Dense and type(net.embed_tokens) is nn.Embedding
    np.testing.assert_allclose(output(net), full, rtol=1e-5, atol=1e-5)
    mp.unmerge(net)
    assert np.array_equal(output(net), full)


def test_a_start_at_random_is_not_the_base(pynative_mode):
    net = tuned(Net(), init_weights=False)
    rows = net.embed_tokens.trained_rows.asnumpy()
    assert not np.allclose(output(net), output(Net())) and 0.2 < rows.std() < 3
    # It takes nothing from the base, so that it stays where another base comes.
    other = Net(tied=False, seed=3)
    ms.save_checkpoint(other, "base.ckpt")
    ms.load_checkpoint("base.ckpt", net)
    assert np.array_equal(net.embed_tokens.trained_rows.asnumpy(), rows)
    ms.load_checkpoint("base.ckpt", started := tuned(Net(tied=False)))
    assert np.array_equal(output(started), output(other))


def test_lists_and_yaml_and_another_name():
    Path("tokens.yaml").write_text("pet_config:\n  pet_type: trainable_tokens\n  token_indices: [1, 3]\n")
    assert mp.get_pet_model(Net(), "tokens.yaml").embed_tokens.settings() == {"token_indices": [1, 3]}
    net = nn.SequentialCell(nn.Embedding(9, 4), nn.Dense(4, 2))
    assert [tuple(item.shape) for item in tuned(net, target_modules=["0"]).trainable_params()] == [(2, 4)]
    assert mp.freeze_delta(net, "trainable_tokens").trainable == 8


@pytest.mark.parametrize("settings, message", [
    ({"token_indices": [9]}, "token_indices must be different numbers below 9"),
    ({"token_indices": [3, 3]}, "token_indices must be different numbers"),
    ({"target_modules": ["q"]}, "q: the method of trainable tokens adapts nn.Embedding, not Dense"),
    ({"target_modules": ["embed"]}, "hits nothing.*such as 'embed_tokens'"),
    ({"modules_to_save": ["lm_head"]}, "lm_head has the same weight")])
def test_what_does_not_fit_is_refused(settings, message):
    net = Net()
    with unchanged(net), pytest.raises(ValueError, match=message):
        tuned(net, **settings)


@pytest.mark.parametrize("settings, message", [
    ({"token_indices": []}, "not empty"), ({}, "not empty"), ({"token_indices": [-1]}, "token numbers"),
    ({"token_indices": [True]}, "token numbers"), ({"token_indices": {"embed_tokens": [1]}}, "token numbers"),
    ({"token_indices": [1], "init_weights": "no"}, "init_weights must be True or False")])
def test_wrong_settings(settings, message):
    with pytest.raises(TypeError, match=message):
        TrainableTokensConfig(**settings)


@pytest.mark.parametrize("tokens, message", [
    ([1], "misshapen: embed_tokens.*is .1, 4. in the net, .2, 4. in the file"), (["x", 2], "list of numbers"),
    ([1.5, 2], "token_indices must be a list of token numbers"), (None, "token_indices must be"),
    ([1, 9], "different numbers below 9")])
def test_files_that_do_not_fit_are_refused(tokens, message):
    Path("theirs").mkdir()
    save_file({"base_model.model.embed_tokens.trainable_tokens_delta": np.ones((2, 4), np.float32)},
              "theirs/adapter_model.safetensors")
    Path("theirs/adapter_config.json").write_text(json.dumps({
        "peft_type": "TRAINABLE_TOKENS", "target_modules": ["embed_tokens"], "token_indices": tokens}))
    net = Net()
    with unchanged(net), pytest.raises(ValueError, match=message):
        mp.load_adapter(net, "theirs")


@pytest.mark.parametrize("library, follows", [(None, True), ("transformers.models.llama", True), ("mine", False)])
@pytest.mark.filterwarnings("ignore:theirs. the tokens that train")
def test_a_tied_layer_follows_where_peft_lets_it(library, follows, pynative_mode):
    Path("theirs").mkdir()
    save_file({"base_model.model.embed_tokens.trainable_tokens_delta": np.ones((2, 4), np.float32)},
              "theirs/adapter_model.safetensors")
    Path("theirs/adapter_config.json").write_text(json.dumps({
        "peft_type": "TRAINABLE_TOKENS", "target_modules": ["embed_tokens"], "token_indices": TOKENS,
        "auto_mapping": library and {"parent_library": library, "base_model_class": "Net"}}))
    net = mp.load_adapter(Net(), "theirs")
    head = net.embed_tokens.embedding_table.asnumpy().copy()
    head[TOKENS] = 1 if follows else head[TOKENS]
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    np.testing.assert_allclose(net.lm_head(Tensor(x)).asnumpy(), x @ head.T + net.lm_head.bias.asnumpy(), atol=1e-5)


def test_beside_another_method_and_on_a_layer_that_has_one(pynative_mode):
    net = tuned(mp.get_pet_model(Net(), mp.LoraConfig(lora_rank=2, target_modules=["q"])))
    shaken(net)
    mp.save_adapter(net, "out")
    assert np.array_equal(output(mp.load_adapter(Net(), "out")), output(net))
    with unchanged(net), pytest.raises(ValueError, match="adapted already"):
        tuned(net)
