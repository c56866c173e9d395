"""PEFT's files as others write them: names and wrappers in keys, modules that no net has, grown vocabularies."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from adapters import MAGNITUDE, A, B, same_tensors, tensor
from mindspore import nn

import mindpet_lite as mp
from mindpet_lite.formats import peft
from mindpet_lite.formats.adapters import read_adapter
from mindpet_lite.formats.files import read_tensors, to_bytes
from mindpet_lite.offline.convert import convert
from mindpet_lite.offline.inspect import inspect
from mindpet_lite.offline.merge import merge

PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none", "target_modules": ["q"],
          "task_type": None}
PAIR = {f"{PREFIX}q.lora_A.weight": tensor((2, 4)), f"{PREFIX}q.lora_B.weight": tensor((4, 2), seed=1)}


def written(tensors, folder="adapter", **config):
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "adapter_model.safetensors").write_bytes(to_bytes(tensors))
    Path(folder, "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return Path(folder)


def renamed(*changes, tensors=PAIR):
    found = {}
    for key, value in tensors.items():
        for old, new in changes:
            key = key.replace(old, new)
        found[key] = value
    return found


@pytest.mark.parametrize("changes", [
    [(".weight", ".default.weight")], [("base_model", "module.base_model")],
    [("base_model", "module.module.base_model")],
    [("base_model", "_orig_mod.base_model")], [("model.q", "model._orig_mod.q")],
    [("model.q", "model._fsdp_wrapped_module.q")], [("model.q", "model._checkpoint_wrapped_module.q")],
    [("base_model", "module.base_model"), (".weight", ".my_adapter.weight"), ("model.q", "model._orig_mod.q")]])
def test_adapter_names_and_wrappers_are_taken_out(changes):
    state = read_adapter(written(renamed(*changes))).state
    assert list(state.layers) == ["q"]
    same_tensors(state.layers["q"].tensors, peft.decode(PAIR, CONFIG).layers["q"].tensors, "q")
    assert set(peft.encode(state)[0]) == set(PAIR)


def test_every_tensor_of_an_adapter_may_carry_the_name():
    # PEFT has a bias of B without DoRA alone.
    named = renamed((".weight", ".default.weight"), (".bias", ".default.bias"),
                    tensors={**PAIR, f"{PREFIX}q.lora_B.bias": tensor((4,))})
    assert len(peft.decode(named, {**CONFIG, "lora_bias": True}).layers["q"].tensors) == 3
    bare = {**PAIR, f"{PREFIX}q.lora_magnitude_vector": np.ones(4, np.float32),
            f"{PREFIX}head.weight": tensor((3, 4)), f"{PREFIX}head.bias": tensor((3,))}
    config = {**CONFIG, "use_dora": True, "modules_to_save": ["head"]}
    named = renamed((".weight", ".default.weight"), (".bias", ".default.bias"),
                    ("magnitude_vector", "magnitude_vector.default"), ("head.default", "head.modules_to_save.default"),
                    tensors=bare)
    named[f"{PREFIX}head.original_module.weight"] = tensor((3, 4), seed=9)
    found, wanted = peft.decode(named, config), peft.decode(bare, config)
    same_tensors(found.layers["q"].tensors, wanted.layers["q"].tensors, "q")
    same_tensors(found.trained, wanted.trained, "head")
    assert MAGNITUDE in found.layers["q"].tensors and set(found.trained) == {"head.weight", "head.bias"}
    table = {f"{PREFIX}e.lora_embedding_A.x": tensor((2, 5)), f"{PREFIX}e.lora_embedding_B.x": tensor((4, 2))}
    assert list(peft.decode(table, CONFIG).layers) == ["e"]


@pytest.mark.parametrize("tensors, message", [
    (renamed((".weight", ".one.weight")) | renamed((".weight", ".two.weight")), "it holds several adapters: one, two"),
    (PAIR | renamed((".weight", ".two.weight")), "several adapters: one without a name, two"),
    (PAIR | renamed(("base_model", "module.base_model")), "stands twice in the file, in two spellings")])
def test_several_adapters_are_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        peft.decode(tensors, CONFIG)


def test_a_pattern_goes_by_the_layers_path():
    tensors = renamed(("model.q", "model.0._orig_mod.q"))
    state = peft.decode(tensors, {**CONFIG, "alpha_pattern": {"0.q": 8}})
    assert state.layers["0.q"].settings["lora_alpha"] == 8


def test_tensors_without_a_value_are_refused():
    for key in [*PAIR, f"{PREFIX}embed_tokens.weight"]:
        with pytest.raises(ValueError, match=rf"{key} has the shape \(0,\), which holds no value: DeepSpeed's ZeRO-3"):
            read_adapter(written({**PAIR, key: np.zeros(0, np.float32)}))
    with pytest.raises(ValueError, match=f"q.{A} is of type I8, but LoRA's tensors are F32, F16, BF16 or F64"):
        read_adapter(written({**PAIR, f"{PREFIX}q.lora_A.weight": np.ones((2, 4), np.int8)}))


# modules_to_save of which the file holds nothing

HEAD = {f"{PREFIX}classifier.weight": tensor((3, 4)), f"{PREFIX}classifier.bias": tensor((3,))}
SAVED = {"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}


def base_file(*more):
    own = {"q.weight": np.ones((4, 4), np.float32), "classifier.weight": np.ones((3, 4), np.float32),
           "classifier.bias": np.ones(3, np.float32), **{name: np.ones((3, 4), np.float32) for name in more}}
    Path("base.safetensors").write_bytes(to_bytes(own))
    return Path("base.safetensors")


def test_an_entry_of_which_the_file_holds_nothing_is_passed_over_and_kept():
    source = written({**PAIR, **HEAD}, **SAVED)
    state = read_adapter(source).state
    assert set(state.trained) == {"classifier.weight", "classifier.bias"}
    assert [item["name"] for item in inspect(source)["trained"]] == ["classifier.bias", "classifier.weight"]
    convert(source, Path("again"), "peft")
    assert json.loads(Path("again/adapter_config.json").read_text()) == {**CONFIG, **SAVED}
    assert set(merge(base_file(), source, Path("out"), quiet=True).changed) == {
        "q.weight", "classifier.weight", "classifier.bias"}
    found = read_tensors(Path("out/base.safetensors"))
    assert np.array_equal(found["classifier.weight"], HEAD[f"{PREFIX}classifier.weight"])


@pytest.mark.parametrize("module", ["score", "deep.score", "my_score", "score.dense"])
def test_a_module_of_the_base_that_peft_would_have_saved(module):
    with pytest.raises(ValueError, match=f"names 'score', which {module.removesuffix('.dense')} is, but the file"):
        merge(base_file(f"{module}.weight"), written({**PAIR, **HEAD}, **SAVED), Path("out"), quiet=True)
    state = peft.decode({**PAIR, **HEAD}, {**CONFIG, **SAVED})
    assert peft.unsaved_modules(state, ["q", "classifier", "scores", "score_head"]) == []
    assert peft.unsaved_modules(peft.decode(PAIR, {**CONFIG, **SAVED}), ["a.classifier"]) == [
        "modules_to_save names 'classifier', which a.classifier is, but the file holds nothing of it."]


class Net(nn.Cell):
    """A layer `q`, and a head of this name."""

    def __init__(self, head):
        super().__init__()
        self.q = nn.Dense(4, 4, has_bias=False)
        self.insert_child_to_cell(head, nn.Dense(4, 3))


def test_a_net_gets_the_head_that_it_has_and_refuses_one_that_is_missing():
    source = written({**PAIR, **HEAD}, **SAVED)
    net = mp.load_adapter(Net("classifier"), source)
    assert np.array_equal(net.classifier.weight.asnumpy(), HEAD[f"{PREFIX}classifier.weight"])
    mp.save_adapter(net, "again")
    assert json.loads(Path("again/adapter_config.json").read_text())["modules_to_save"] == SAVED["modules_to_save"]
    net = Net("score")
    with pytest.raises(ValueError, match="modules_to_save names 'score', which score is, but the file"):
        mp.load_adapter(net, written(PAIR, **SAVED))
    assert type(net.q) is nn.Dense


# Embeddings that PEFT saves along when a vocabulary grew

TABLE, OTHER = tensor((6, 4), seed=3), tensor((6, 4), seed=4)
# By model: the embedding, the output layer, in the file; and in a base of its own format, None where they are tied.
MODELS = {
    "Llama": ("model.embed_tokens", "lm_head", "lm_head"), "GPT-NeoX": ("gpt_neox.embed_in", "lm_head", "embed_out"),
    "GPT-2": ("transformer.wte", "lm_head", None), "T5": ("shared", "lm_head", None),
    "BERT": ("bert.embeddings.word_embeddings", "cls.predictions.decoder", None),
    "Mamba": ("backbone.embeddings", "lm_head", None), "Whisper": ("model.decoder.embed_tokens", "proj_out", None),
    "XLNet": ("transformer.word_embedding", "lm_loss", "lm_loss"),
    "XLM": ("transformer.embeddings", "pred_layer.proj", None),
    "unknown names": ("net.symbols", "net.answers", "net.answers")}


def grown(model, head_value):
    """Return an adapter with the embedding and the output layer, and the directory of its grown base."""
    table, head, in_base = MODELS[model]
    tensors = {**PAIR, f"{PREFIX}{table}.weight": TABLE, f"{PREFIX}{head}.weight": head_value}
    base = {"q.weight": np.ones((4, 4), np.float32), f"{table}.weight": np.ones((6, 4), np.float32)}
    if in_base:
        base[f"{in_base}.weight"] = np.ones((6, 4), np.float32)
    if model == "BERT":
        tensors[f"{PREFIX}{head}.bias"], base["cls.predictions.bias"] = tensor((6,)), np.ones(6, np.float32)
    Path("base").mkdir(exist_ok=True)
    Path("base/model.safetensors").write_bytes(to_bytes(base))
    Path("base/config.json").write_text(json.dumps({"architectures": ["XForCausalLM"],
                                                    "tie_word_embeddings": in_base is None}))
    return written(tensors), table, in_base


@pytest.mark.parametrize("model", MODELS)
def test_a_grown_vocabulary_is_read_and_merged(model):
    tied = MODELS[model][2] is None
    adapter, table, head = grown(model, TABLE if tied else OTHER)
    state = read_adapter(adapter).state
    assert {f"{MODELS[model][0]}.weight", f"{MODELS[model][1]}.weight"} <= set(state.trained)
    same_tensors(peft.encode(state)[0], read_tensors(adapter / "adapter_model.safetensors"), model)
    merge(Path("base"), adapter, Path("out"), quiet=True)
    found = read_tensors(Path("out/model.safetensors"))
    assert np.array_equal(found[f"{table}.weight"], TABLE)
    assert tied or np.array_equal(found[f"{head}.weight"], OTHER)
    assert model != "BERT" or np.array_equal(found["cls.predictions.bias"], tensor((6,)))
    b, a = state.layers["q"].tensors[B].astype(np.float64), state.layers["q"].tensors[A]
    np.testing.assert_allclose(found["q.weight"], 1 + 2 * b @ a, rtol=1e-6)


@pytest.mark.parametrize("model", [model for model, (_, _, head) in MODELS.items() if head is None])
def test_an_output_layer_of_its_own_does_not_fit_a_tied_base(model):
    adapter, _, _ = grown(model, OTHER)
    with pytest.raises(ValueError, match="one weight for its embedding and its output layer.*untie the base first"):
        merge(Path("base"), adapter, Path("out"), quiet=True)
    assert not Path("out").exists()


@pytest.mark.parametrize("tensors", [
    {"x.weight": TABLE}, {"x.weight": TABLE, "y.weight": TABLE[:5]},
    {"x.weight": TABLE, "y.weight": TABLE, "z.weight": TABLE},
    {"lm_head.scale": TABLE}, {"lm_head.bias": TABLE[0]}, {"embed_tokens.weight": TABLE[0]}])
def test_what_is_neither_stays_an_error(tensors):
    with pytest.raises(ValueError, match="is no tensor of a LoRA layer"):
        peft.decode({**PAIR, **{f"{PREFIX}{name}": value for name, value in tensors.items()}}, CONFIG)
