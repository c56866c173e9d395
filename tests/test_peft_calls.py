"""PEFT's way of calling: spellings of configs, its config files, and its names of functions."""
from __future__ import annotations

import inspect
import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from conftest import SHARED
from mindspore import Tensor, nn
from nets import config

import mindpet_lite as mp
from mindpet_lite.config import as_config
from mindpet_lite.delta import METHODS
from mindpet_lite.delta.spelling import SPELLINGS


class Attention(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Dense(8, 8) for _ in range(4))

    def construct(self, x):
        return self.o_proj(self.q_proj(x) * self.k_proj(x) + self.v_proj(x))


class Layer(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), nn.Cell()
        self.mlp.down_proj = nn.Dense(8, 8)
        self.input_layernorm = nn.LayerNorm((8,))

    def construct(self, x):
        return self.mlp.down_proj(self.self_attn(self.input_layernorm(x)))


class Model(nn.Cell):
    """A model whose paths are those of a Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.CellList([Layer(), Layer()])
        self.lm_head = nn.Dense(8, 3)

    def construct(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


X = Tensor(np.random.RandomState(0).standard_normal((2, 8)), ms.float32)


def test_pefts_spellings():
    one = mp.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", inference_mode=False, target_modules=["q_proj"])
    assert one == mp.LoraConfig(4, 8, task_type="CAUSAL_LM", target_modules=["q_proj"])
    assert mp.PrefixTuningConfig(num_virtual_tokens=4, embed_dim=8, mid_dim=8,
                                 target_modules=["k_proj"]).prefix_token_num == 4
    for kind in METHODS.values():
        fields = inspect.signature(kind).parameters
        assert "task_type" in fields and not set(SPELLINGS) & set(fields) - {"r", "num_virtual_tokens"}


@pytest.mark.parametrize(("fields", "message"), [
    ({"lora_rnak": 4}, "LoraConfig has no field 'lora_rnak'. Did you mean 'lora_rank'"),
    ({"r": 4, "lora_rank": 4}, "given 'lora_rank' twice"), ({"fan_in_fan_out": True}, "known from its layer"),
    ({"inference_mode": "no"}, "inference_mode must be"), ({"base_model_name_or_path": 3}, "must be a name or a path")])
def test_what_no_config_has(fields, message):
    with pytest.raises(TypeError, match=message):
        mp.LoraConfig(lora_alpha=8, **fields)


def test_an_unknown_task_is_told_with_the_nearest():
    with pytest.raises(ValueError, match="task_type must be one of .*'CAUSAL_ML'. Did you mean 'CAUSAL_LM'"):
        mp.LoraConfig(8, 8, task_type="CAUSAL_ML")


def test_what_is_told_is_written_and_comes_back():
    net = mp.get_pet_model(Model(), mp.LoraConfig(2, 4, target_modules=["q_proj"], task_type="CAUSAL_LM",
                                                  base_model_name_or_path=Path("some/base")))
    mp.save_adapter(net, "adapter")
    written = json.loads(Path("adapter/adapter_config.json").read_text())
    assert (written["task_type"], written["base_model_name_or_path"]) == ("CAUSAL_LM", "some/base")
    again = mp.load_adapter(Model(), "adapter")
    mp.save_adapter(again, "again")
    assert json.loads(Path("again/adapter_config.json").read_text()) == written


def test_told_of_one_of_several():
    net = Model()
    mp.add_adapter(net, "a", mp.LoraConfig(2, 4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    mp.add_adapter(net, "b", mp.LoraConfig(2, 4, target_modules=["v_proj"], base_model_name_or_path="base"))
    for name, task, base in (("a", "CAUSAL_LM", None), ("b", None, "base")):
        mp.save_adapter(net, name, name=name)
        written = json.loads(Path(name, "adapter_config.json").read_text())
        assert (written["task_type"], written["base_model_name_or_path"]) == (task, base)


def test_nothing_trains_in_inference_mode():
    net = mp.get_pet_model(Model(), mp.LoraConfig(2, 4, target_modules=["q_proj"], inference_mode=True))
    assert net.trainable_params() == [] and len(mp.summary(net).rows) == 2


@pytest.mark.parametrize(("kind", "fields", "layers"), [
    (mp.LoraConfig, {"r": 2, "lora_alpha": 4}, ["q_proj", "v_proj"]),
    (mp.HiraConfig, {"r": 2}, ["q_proj", "v_proj"]), (mp.IA3Config, {}, ["k_proj", "v_proj", "down_proj"])])
def test_the_family_gives_targets_that_are_not_named(kind, fields, layers, capsys):
    net = mp.get_pet_model(Model(), kind(**fields))
    report = mp.summary(net)
    assert [row[0].rpartition(".")[2] for row in report.rows] == layers * 2
    assert (f"target_modules {', '.join(layers)}" in capsys.readouterr().out
            and "PEFT's default for Llama" in report.notes[0])
    if kind is mp.IA3Config:
        assert net.layers[0].mlp.down_proj.settings() == {"is_feedforward": True}
    with pytest.raises(ValueError, match="target_modules is missing"):
        mp.get_pet_model(nn.SequentialCell(nn.Dense(4, 4)), kind(**fields))


def test_pefts_config_file_is_a_config():
    net = mp.get_pet_model(Model(), mp.LoraConfig(3, 6, target_modules="all-linear", use_rslora=True))
    mp.save_adapter(net, "adapter")
    for path in ("adapter", "adapter/adapter_config.json"):
        again = mp.get_pet_model(Model(), path)
        assert {name: item.shape for name, item in again.parameters_and_names()} == {
            name: item.shape for name, item in net.parameters_and_names()}
        assert len(again.trainable_params()) == len(net.trainable_params()) > 0
    written = json.loads(Path("adapter/adapter_config.json").read_text())
    for field, value, message in (("peft_type", "LOAR", "peft_type must be one of .*Did you mean 'LORA'"),
                                  ("kasa_config", {"beta": 1}, "kasa_config = .* is not supported"),
                                  ("r", 0, "lora_rank must be")):
        Path("other.json").write_text(json.dumps({**written, field: value}))
        with pytest.raises(ValueError, match=f"other.json: .*{message}"):
            mp.get_pet_model(Model(), "other.json")
    with pytest.raises(FileNotFoundError, match="There is no nothing.json"):
        mp.get_pet_model(Model(), "nothing.json")


ROOT = SHARED / "fixtures" / "peft"


@pytest.mark.skipif(not ROOT.exists(), reason=f"the shared fixtures are not at {SHARED}")
@pytest.mark.parametrize("name", ["lora_dora", "vera", "adalora", "oft", "loha", "lora_init_corda", "prompt_tuning"])
def test_configs_that_peft_wrote(name):
    written = json.loads((ROOT / "llama_tiny" / name / "adapter_config.json").read_text())
    found = as_config(ROOT / "llama_tiny" / name)
    assert getattr(found, "lora_rank", getattr(found, "r", written.get("r"))) == written.get("r")
    assert found.task_type == written["task_type"] and not found.inference_mode


def test_thin_names(capsys):
    net = Model()
    base = net(X).asnumpy()
    mp.get_pet_model(net, config(target_modules=["q_proj", "down_proj"]))
    for item in net.trainable_params():
        item.set_data(Tensor(np.full(item.shape, 0.1, np.float32)))
    report = mp.print_trainable_parameters(net)
    assert capsys.readouterr().out == f"{report}\n" and str(report).startswith("trainable params: ")
    adapted = net(X).asnumpy()
    with mp.disable_adapter(net):
        np.testing.assert_array_equal(net(X).asnumpy(), base)
    np.testing.assert_array_equal(net(X).asnumpy(), adapted)
    merged = mp.merge_and_unload(net)
    assert merged is net and not isinstance(net.layers[0].mlp.down_proj, mp.LoRADense)
    np.testing.assert_allclose(net(X).asnumpy(), adapted, rtol=1e-5, atol=1e-5)


def test_an_adapter_as_arrays(mode):
    net = mp.get_pet_model(Model(), config(target_modules=["q_proj", "down_proj"]))
    first = mp.get_adapter_state(net)
    assert set(first) == {f"base_model.model.layers.{layer}.{path}.lora_{part}.weight" for layer in range(2)
                          for path in ("self_attn.q_proj", "mlp.down_proj") for part in "AB"}
    before = net(X).asnumpy()
    for item in net.trainable_params():
        item.set_data(Tensor(np.full(item.shape, 0.1, np.float32)))
    after, state = net(X).asnumpy(), mp.get_adapter_state(net)
    assert not np.array_equal(before, after)
    trained = [item.name for item in net.trainable_params()]
    assert mp.set_adapter_state(net, first) is net
    np.testing.assert_array_equal(net(X).asnumpy(), before)
    mp.set_adapter_state(net, state)
    np.testing.assert_array_equal(net(X).asnumpy(), after)
    assert [item.name for item in net.trainable_params()] == trained
    key = next(iter(state))
    for wrong, message in (({**state, "other": state[key]}, "unexpected: other"),
                           ({name: value for name, value in state.items() if name != key}, f"missing: {key}"),
                           ({**state, key: state[key][:1]}, "has the shape")):
        with pytest.raises(ValueError, match=message):
            mp.set_adapter_state(net, wrong)
    with pytest.raises(TypeError, match="state must be a mapping"):
        mp.set_adapter_state(net, {key: 1.0})
    np.testing.assert_array_equal(net(X).asnumpy(), after)


def test_norms_and_heads_in_float32(mode):
    net = Model()
    for item in net.get_parameters():
        item.set_dtype(ms.float16)
    net.to_float(ms.float16)
    assert mp.cast_to_float32(net, r".*layernorm|lm_head") == [
        "layers.0.input_layernorm", "layers.1.input_layernorm", "lm_head"]
    types = {name: item.dtype for name, item in net.parameters_and_names()}
    assert types["lm_head.weight"] == types["layers.1.input_layernorm.gamma"] == ms.float32
    assert types["layers.0.self_attn.q_proj.weight"] == ms.float16
    assert net(X).dtype == ms.float32
    with pytest.raises(ValueError, match="'lm_haed'.*Did you mean 'lm_head'"):
        mp.cast_to_float32(net, ["lm_haed"])
