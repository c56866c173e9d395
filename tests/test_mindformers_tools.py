"""`mindpet-lite estimate` and `mindpet-lite run` on MindFormers' YAML."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("click")

from mindpet_lite.cli import main  # noqa: E402
from mindpet_lite.estimate import estimate  # noqa: E402
from mindpet_lite.tasks import evaluate, finetune  # noqa: E402

LLAMA_2 = {"type": "LlamaConfig", "seq_length": 16, "hidden_size": 4096, "num_layers": 32, "num_heads": 32,
           "vocab_size": 32000, "multiple_of": 256}
BLOCK = {"pet_type": "lora", "lora_rank": 16, "lora_alpha": 16, "lora_dropout": 0.05,
         "target_modules": ".*wq|.*wk|.*wv|.*wo"}


def document(pet: dict | None = BLOCK, **sizes) -> dict:
    inner = {**LLAMA_2, **sizes, **({} if pet is None else {"pet_config": pet})}
    return {"seed": 0, "trainer": {"type": "CausalLanguageModelingTrainer"}, "use_parallel": True,
            "model": {"model_config": inner, "arch": {"type": "LlamaForCausalLM"}}}


@pytest.mark.parametrize("sizes, parameters", [
    ({}, 6_738_415_616), ({"intermediate_size": 14336, "n_kv_heads": 8, "vocab_size": 128256}, 8_030_261_248),
    ({"hidden_size": 8192, "num_layers": 80, "num_heads": 64, "n_kv_heads": 8, "ffn_dim_multiplier": 1.3},
     68_976_648_192), ({"qkv_has_bias": True}, 6_738_415_616 + 32 * 3 * 4096)],
    ids=["2-7B", "3-8B", "2-70B", "biases"])
def test_parameters_of_published_models(sizes, parameters):
    assert estimate(document(**sizes), 1).parameters == parameters


SMALL = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 300, "multiple_of": 16}


def planned(pet: dict | None = BLOCK, **arguments):
    return estimate(document(pet, **SMALL), 2, **arguments)


def test_the_settings_of_pet_config_count():
    report = planned()
    assert report.lora_rank == 16 and report.lora_layers == tuple(
        f"model.layers.{block}.attention.{name}" for block in (0, 1) for name in ("wq", "wk", "wv", "wo"))
    assert report.lora_parameters == 8 * 16 * (64 + 64)
    assert report.plans["LoRA"].activations > planned({**BLOCK, "lora_dropout": 0.0}).plans["LoRA"].activations
    assert report == planned(lora_dropout=0.05, seq=16) != planned(seq=32)
    assert planned(None).lora_layers == report.lora_layers and planned(None).lora_rank == 8
    assert planned(lora_rank=2, target_modules=["w1"]).lora_parameters == 2 * 2 * (64 + 176)
    # The same net in the words of Hugging Face.
    same = estimate({"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
                     "vocab_size": 300}, 2, 16, 16, lora_dropout=0.05)
    assert same.plans == report.plans


@pytest.mark.parametrize("fields, layers", [
    ({"target_modules": "wq|w1"}, ("attention.wq", "feed_forward.w1")), ({"target_modules": "wq"}, ("attention.wq",)),
    ({"exclude_layers": "wo"}, ("attention.wq", "attention.wk", "attention.wv")),
    ({"target_modules": ".*w.", "exclude_layers": ["feed_forward", "w[kv]"]}, ("attention.wq", "attention.wo")),
    ({"param_init_type": None, "target_modules": ".*wo"}, ("attention.wo",))])
def test_layers_are_those_that_get_pet_model_adapts(fields, layers):
    assert planned({**BLOCK, **fields}).lora_layers == tuple(
        f"model.layers.{block}.{name}" for block in (0, 1) for name in layers)
    assert planned({**BLOCK, "exclude_layers": ["1$"]}).lora_layers == planned().lora_layers[:4]


@pytest.mark.parametrize("pet, sizes, message", [
    (BLOCK, {"type": "ChatGLM2Config"}, "type of model_config must be LlamaConfig"),
    (BLOCK, {"num_layers": None}, "the key num_layers is missing"), (BLOCK, {"qkv_concat": True}, "qkv_concat"),
    (BLOCK, {"moe_config": {"expert_num": 8}}, "8 experts"), (BLOCK, {"ffn_dim_multiplier": "x"}, "ffn_dim_multiplier"),
    ({**BLOCK, "pet_type": "ptuning2"}, {}, "ptuning2"), ({**BLOCK, "lora_rnk": 8}, {}, "Did you mean 'lora_rank'"),
    ({**BLOCK, "target_modules": "wz"}, {}, "'wz' hits no linear layer; the model's are attention.wq, "),
    ({**BLOCK, "exclude_layers": ["wz"]}, {}, "exclude_layers 'wz' hits nothing"), ([1], {}, "must be a mapping")])
def test_the_command_refuses_in_one_sentence(pet, sizes, message, tmp_path, capfd):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(document(pet, **{**SMALL, **sizes})), encoding="utf-8")
    assert main(["estimate", "--config", str(path), "--batch", "1"]) == 2
    output, errors = capfd.readouterr()
    assert output == "" and message in errors and errors.count("\n") == 1 and "a.yaml" in errors


def test_the_command(tmp_path, capfd):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(document(**SMALL)), encoding="utf-8")
    assert main(["estimate", "--config", str(path), "--batch", "2", "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["lora_layers"]) == 8


# run

SCRIPT = "import json, sys\nopen('flags.json', 'w').write(json.dumps(sys.argv[1:]))\n" \
         "open(sys.argv[sys.argv.index('--output_path') + 1] + '/eval_result.json', 'w').write('{}')\n"


@pytest.fixture
def given(tmp_path) -> dict[str, Path]:
    (tmp_path / "boot.py").write_text(SCRIPT, encoding="utf-8")
    for name in ("data", "out"):
        (tmp_path / name).mkdir()
    return {"data_path": tmp_path / "data", "output_path": tmp_path / "out", "boot_file_path": tmp_path / "boot.py"}


@pytest.mark.parametrize("text, before", [
    (document(), []), (document() | {"params": {"lr": 1}}, ["--lr", "1"]),
    ({"pet_config": BLOCK}, []), ({"pet_config": BLOCK, "params": {"lr": 1}}, ["--lr", "1"]),
    (document() | {"freeze": {"include": ["*"]}}, [])])
def test_the_script_gets_the_file_with_the_pet_config(given, text, before):
    Path("a.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")
    expected = [*before, "--advanced_config", str(Path("a.yaml").absolute())]
    assert finetune(**given, model_config_path="a.yaml", quiet=True) == 0
    flags = json.loads(Path("flags.json").read_text())
    assert flags[:len(expected)] == expected and flags[len(expected)] == "--output_path"
    if "freeze" not in text:
        assert evaluate(**given, ckpt_path=given["data_path"], model_config_path="a.yaml", quiet=True) == 0
        assert json.loads(Path("flags.json").read_text())[:len(expected)] == expected


@pytest.mark.parametrize("text, message", [
    ({"pet_config": BLOCK, "parms": {"lr": 1}}, "got 'parms'. Did you mean 'params'"),
    ({"pet_config": [1]}, "a.yaml: pet_config must be a mapping"),
    ({"model": {"pet_config": BLOCK}, "a": {"pet_config": BLOCK}}, "at a.pet_config and at model.pet_config"),
    ({"model": {"model_config": LLAMA_2}}, "but got 'model'")])
def test_other_files_are_refused_before_anything_starts(given, text, message):
    Path("a.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        finetune(**given, model_config_path="a.yaml", quiet=True)
    with pytest.raises(ValueError, match="'freeze'"):
        Path("a.yaml").write_text(yaml.safe_dump(document() | {"freeze": {"include": ["*"]}}), encoding="utf-8")
        evaluate(**given, ckpt_path=given["data_path"], model_config_path="a.yaml", quiet=True)
    assert not Path("flags.json").exists()
