"""Configs: LoraConfig itself, mappings and YAML, unknown keys, wrong types."""
from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import mindspore as ms
import pytest
from mindspore import nn

import mindpet_lite as mp
from mindpet_lite.config import as_config
from mindpet_lite.delta import METHODS
from mindpet_lite.delta.delta_config import DeltaConfig

GOOD = {"pet_type": "lora", "lora_rank": 4, "lora_alpha": 8, "target_modules": ["to_q"]}


def write(text: str) -> str:
    Path("pet.yaml").write_text(text, encoding="utf-8")
    return "pet.yaml"


def test_a_config_is_frozen_and_has_the_documented_defaults():
    config = mp.LoraConfig(target_modules="x")
    assert dataclasses.is_dataclass(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lora_rank = 3
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout, config.exclude_modules) == (8, 16, 0.0, None)
    assert mp.LoraConfig(target_modules="x") == config != mp.LoraConfig(target_modules="y")
    assert dataclasses.replace(config, lora_rank=2).lora_rank == 2


def test_every_method_has_a_config_of_its_name():
    for name, kind in METHODS.items():
        assert issubclass(kind, DeltaConfig) and kind.pet_type == name


@pytest.mark.parametrize("text", [
    "pet_config:\n  pet_type: lora\n  lora_rank: 4\n  lora_alpha: 8\n  target_modules: [to_q]\n",
    "model:\n  pet_config: {pet_type: LORA, r: 4, lora_alpha: 8, target_modules: [to_q]}\n",
    "model:\n  model_config:\n    pet_config: {pet_type: lora, lora_rank: 4, lora_alpha: 8, target_modules: [to_q]}\n",
    "model_config:\n  pet_config: {pet_type: lora, lora_rank: 4, lora_alpha: 8, target_modules: [to_q]}\n",
])
def test_yaml_is_the_configs_spelling(text):
    assert as_config(write(text)) == as_config(Path("pet.yaml")) == as_config(GOOD) == \
        mp.LoraConfig(lora_rank=4, lora_alpha=8, target_modules=["to_q"])


def test_all_fields_from_yaml():
    config = as_config(write("""
pet_config:
  pet_type: lora
  lora_rank: 4
  lora_alpha: 0.5
  lora_dropout: 1.0e-1
  lora_a_init: normal
  lora_b_init: zeros
  param_init_type: float16
  compute_dtype: Float32
  target_modules: '.*wq'
  exclude_layers: [layers.0.wq]
  freeze_include: ['*']
  freeze_exclude: ['*lora*']
"""))
    assert config == mp.LoraConfig(4, 0.5, 0.1, "normal", "zeros", ms.float16, ms.float32, target_modules=".*wq",
                                   exclude_modules=("layers.0.wq",), freeze_include=("*",), freeze_exclude=("*lora*",))


BAD = [
    ({"lora_rnak": 4}, ValueError, "lora_rnak.*Did you mean 'lora_rank'"),
    ({"target_module": ["q"]}, ValueError, "Did you mean 'target_modules'"), ({"rank": 4}, ValueError, "rank"),
    ({3: 4}, ValueError, "Unknown key 3"), ({"r": 4}, ValueError, "'r' in pet_config says 'lora_rank' a second time"),
    ({"lora_alpha": "1e-5"}, TypeError, "lora_alpha.*YAML reads 1e-5 as text: write 1e-05 or 1.0e-05"),
    ({"lora_alpha": "16"}, TypeError, "Write 16 without quotes"), ({"lora_alpha": "much"}, TypeError, "lora_alpha"),
    ({"lora_rank": "8"}, TypeError, "lora_rank"), ({"lora_rank": 8.0}, TypeError, "lora_rank"),
    ({"lora_rank": True}, TypeError, "lora_rank"), ({"lora_rank": 0}, ValueError, "lora_rank"),
    ({"lora_rank": None}, TypeError, "lora_rank"), ({"lora_rank": [8]}, TypeError, "lora_rank"),
    ({"lora_dropout": "0.1"}, TypeError, "lora_dropout"), ({"lora_dropout": 1.5}, ValueError, "lora_dropout"),
    ({"target_modules": 3}, TypeError, "target_modules"), ({"target_modules": []}, TypeError, "target_modules"),
    ({"target_modules": ""}, TypeError, "target_modules"), ({"target_modules": ["q", 1]}, TypeError, "holds 1"),
    ({"target_modules": {"q": 1}}, TypeError, "target_modules"), ({"exclude_modules": 3}, TypeError, "exclude_modules"),
    ({"freeze_include": "*"}, TypeError, "freeze_include"), ({"freeze_exclude": [1]}, TypeError, "freeze_exclude"),
    ({"param_init_type": "float61"}, TypeError, "param_init_type.*'float16'"),
    ({"param_init_type": "int32"}, TypeError, "param_init_type"), ({"compute_dtype": 16}, TypeError, "compute_dtype"),
    ({"lora_a_init": "normall"}, ValueError, "normall.*'normal'"),
    ({"pet_type": "loar"}, ValueError, "Did you mean 'lora'"), ({"pet_type": None}, ValueError, "pet_type"),
    ({"pet_type": 3}, ValueError, "pet_type"),
]


@pytest.mark.parametrize("fields, error, message", BAD, ids=lambda item: str(item)[:40])
def test_wrong_fields_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        as_config({**GOOD, **fields})


@pytest.mark.parametrize("text, error, message", [
    ("pet_config:\n  pet_type: lora\n  lora_rnak: 4\n", ValueError, "pet.yaml.*lora_rnak.*'lora_rank'"),
    ("pet_config:\n  pet_type: lora\n  lora_alpha: 1e-5\n", TypeError, "pet.yaml.*YAML reads 1e-5 as text"),
    ("pet_confg:\n  pet_type: lora\n", ValueError, "pet.yaml.*'pet_config'.*Did you mean 'pet_confg'"),
    ("pet_config:\n", TypeError, "must be a mapping with 'pet_type', but got None"),
    ("pet_config: [1]\n", TypeError, "mapping"), ("", ValueError, "pet_config"),
    ("- 1\n", ValueError, "list"), ("a: [\n", ValueError, "not valid YAML"),
    ("pet_config: {lora_rank: 4}\n", ValueError, "pet_type must be one of lora"),
    ("pet_config: !!python/object/apply:os.system ['touch hacked']\n", ValueError, "not valid YAML"),
])
def test_wrong_yaml_names_the_file(text, error, message):
    with pytest.raises(error, match=message):
        as_config(write(text))
    assert not Path("hacked").exists()


def test_a_missing_file_stays_missing():
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        as_config("nowhere.yaml")
    assert not Path("nowhere.yaml").exists()
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary.yaml"):
        as_config("binary.yaml")
    with pytest.raises(OSError, match="no YAML file"):
        as_config(Path.cwd())


def test_the_given_mapping_is_not_changed():
    block = dict(GOOD)
    as_config(block)
    assert block == GOOD


@pytest.mark.parametrize("kind, name, value", [
    (mp.LoraConfig, "token_indices", [1]), (mp.LoraConfig, "target_parameter", "weight"),
    (mp.IA3Config, "is_feedforward", True), (mp.AdaLoraConfig, "kept", "101")])
def test_fields_of_one_layer_are_not_the_users(kind, name, value):
    """Files of adapters hold them, for the layer that they are about."""
    more = {"total_step": 9, "init_r": 3, "target_r": 2} if kind is mp.AdaLoraConfig else {}
    config = kind.of_layer({name: value}, **more)
    assert getattr(config, f"_{name}") == value and f" _{name}=" not in repr(config)
    assert f"_{name}" not in inspect.signature(kind).parameters
    with pytest.raises(TypeError, match=f"has no field '{name}'"):
        kind(**{name: value}, **more)
    with pytest.raises(ValueError, match=f"Unknown key '{name}'"):
        mp.get_pet_model(nn.SequentialCell(nn.Dense(4, 4)), {"pet_type": kind.pet_type, name: value, **more})
