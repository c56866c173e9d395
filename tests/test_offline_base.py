"""What merging must know of the base: weights that are tied, which way they lie, and what else is refused."""
from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from offline_bases import A, B, linear, lora, weights, write_adapter, write_shards

from mindpet_lite.formats.files import read_tensors, to_bytes
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.offline.merge import merge
from mindpet_lite.offline.orientation import inputs_first

RNG = np.random.default_rng(0)
Q = "model.layers.0.self_attn.q_proj"
TIE = "one weight for its embedding and its output layer"


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32)


def table_delta(rows: int, columns: int) -> LayerState:
    return LayerState({"mindpet_delta_lora_embedding_a": normal(2, rows),
                       "mindpet_delta_lora_embedding_b": normal(columns, 2)}, {"lora_rank": 2, "lora_alpha": 2})


def write_base(tensors: dict[str, np.ndarray], config: dict | None = None) -> Path:
    Path("base").mkdir(exist_ok=True)
    Path("base/model.safetensors").write_bytes(to_bytes(tensors))
    if config is not None:
        Path("base/config.json").write_text(json.dumps(config))
    return Path("base")


def merged(state: AdapterState, **settings) -> dict[str, np.ndarray]:
    """Return the tensors of ``base`` with this adapter."""
    write_adapter(Path("adapter"), state)
    if settings:
        config = json.loads(Path("adapter/adapter_config.json").read_text())
        Path("adapter/adapter_config.json").write_text(json.dumps({**config, **settings}))
    merge(Path("base"), Path("adapter"), Path("out"), quiet=True)
    return read_tensors(Path("out/model.safetensors"))


TABLES = {"mamba": ("backbone.embeddings", "MambaForCausalLM"),
          "xlnet": ("transformer.word_embedding", "XLNetLMHeadModel"),
          "xlm": ("transformer.embeddings", "XLMWithLMHeadModel"), "own": ("net.tokens", "MyForCausalLM")}


@pytest.mark.parametrize("said", [{"tie_word_embeddings": True}, {}, {"text_config": {
    "vocab_size": 20, "tie_word_embeddings": True}}], ids=["said", "by default", "nested"])
@pytest.mark.parametrize("kind", TABLES)
def test_ties_are_found_under_any_name(kind, said):
    path, architecture = TABLES[kind]
    write_base({f"{path}.weight": normal(20, 8), f"{Q}.weight": normal(8, 8)},
               {"model_type": kind, "architectures": [architecture], "vocab_size": 20, **said})
    for state in (AdapterState("lora", {path: table_delta(20, 8)}),
                  AdapterState("lora", lora({Q: (8, 8)}).layers, {f"{path}.weight": normal(20, 8)}),
                  lora({Q: (8, 8), "lm_head": (20, 8)})):
        with pytest.raises(ValueError, match=TIE):
            merged(state)
    assert sorted(os.listdir(".")) == ["adapter", "base"]
    merged(lora({Q: (8, 8)}))


@pytest.mark.parametrize("change", [
    {"tie_word_embeddings": False}, {"architectures": ["MyForSequenceClassification"]}, {"head": True}])
def test_tables_that_are_not_tied_are_merged(change):
    head = {"net.output.weight": normal(20, 8)} if change.pop("head", False) else {}
    table = normal(20, 8)
    write_base({"net.tokens.weight": table, "net.positions.weight": normal(12, 8), **head},
               {"model_type": "mine", "architectures": ["MyForCausalLM"], "vocab_size": 20, **change})
    state = AdapterState("lora", {"net.tokens": table_delta(20, 8)})
    tensors = state.layers["net.tokens"].tensors
    wanted = table + (tensors["mindpet_delta_lora_embedding_b"] @ tensors["mindpet_delta_lora_embedding_a"]).T
    assert np.abs(merged(state)["net.tokens.weight"] - wanted).max() < 1e-5


def test_positions_of_a_tied_net_are_merged():
    write_base({"net.tokens.weight": normal(20, 8), "net.positions.weight": normal(12, 8)},
               {"model_type": "mine", "vocab_size": 20, "tie_word_embeddings": True})
    merged(AdapterState("lora", {"net.positions": table_delta(12, 8)}))


@pytest.mark.parametrize("stored", [1, 2])
def test_both_sides_of_a_tie_saved_whole(stored):
    old, new = normal(20, 8), normal(20, 8)
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    write_base({**{name: old for name in names[:stored]}, f"{Q}.weight": normal(8, 8)},
               {"model_type": "llama", "vocab_size": 20, "tie_word_embeddings": True})
    delta = lora({Q: (8, 8)}).layers
    found = merged(AdapterState("lora", delta, {name: new for name in names}))
    assert all(np.array_equal(found[name], new) for name in names[:stored]) and len(found) == stored + 1
    for trained in ({names[0]: new}, {names[1]: new}, {names[0]: new, names[1]: old + 1}):
        with pytest.raises(ValueError, match=f"{TIE}.*untie the base"):
            write_adapter(Path("one"), AdapterState("lora", delta, trained))
            merge(Path("base"), Path("one"), Path("two"), quiet=True)


def test_values_of_a_tied_table_that_did_not_train_change_nothing():
    table = normal(20, 8)
    write_base({"model.embed_tokens.weight": table, f"{Q}.weight": normal(8, 8)},
               {"model_type": "llama", "vocab_size": 20, "tie_word_embeddings": True})
    state = AdapterState("lora", lora({Q: (8, 8)}).layers, {"lm_head.weight": table})
    assert np.array_equal(merged(state)["model.embed_tokens.weight"], table)


def test_the_table_of_an_encoder_and_a_decoder():
    write_base({"shared.weight": normal(20, 8), "lm_head.weight": normal(20, 8)},
               {"model_type": "t5", "vocab_size": 20, "is_encoder_decoder": True, "tie_word_embeddings": False})
    with pytest.raises(ValueError, match="its encoder and its decoder"):
        merged(AdapterState("lora", {"shared": table_delta(20, 8)}))


def test_without_a_config_a_merged_embedding_is_warned_of():
    write_base({"net.tokens.weight": normal(20, 8), f"{Q}.weight": normal(8, 8)})
    with pytest.warns(UserWarning, match="net.tokens.*same weight for its output layer") as caught:
        merged(AdapterState("lora", {"net.tokens": table_delta(20, 8)}))
    assert len(caught) == 1
    with pytest.raises(ValueError, match="the base has no such layer.*weight for it, merging would change both"):
        merge(Path("base"), write_adapter(Path("one"), lora({"lm_head": (20, 8)})), Path("two"), quiet=True)


def test_the_config_beside_a_file_counts():
    write_base({"net.tokens.weight": normal(20, 8)},
               {"model_type": "mine", "tie_word_embeddings": True, "vocab_size": 20})
    adapter = write_adapter(Path("adapter"), AdapterState("lora", {"net.tokens": table_delta(20, 8)}))
    with pytest.raises(ValueError, match=TIE):
        merge(Path("base/model.safetensors"), adapter, Path("out"), quiet=True)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("model", ["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "llama"])
def test_square_weights_lie_as_their_model_has_them(model, flag, dora):
    """One flag stands for layers that differ: PEFT leaves in the file what it set for the last one."""
    paths = ["h.0.attn.c_proj", "lm_head"]
    base = {path: normal(6, 6) for path in paths}
    write_base({f"{path}.weight": value for path, value in base.items()},
               {"model_type": model, "vocab_size": 99, "tie_word_embeddings": False})
    state = lora({path: (6, 6) for path in paths}, **({"use_dora": True} if dora else {}))
    wanted = {}
    for path, layer in state.layers.items():
        turned = model != "llama" and path.endswith("c_proj")
        update = 5 / 3 * layer.tensors[B].astype(np.float64) @ layer.tensors[A]
        value = (base[path].T if turned else base[path]) + update
        if dora:
            size = np.linspace(1, 2, 6, dtype=np.float32)
            layer.tensors["mindpet_delta_lora_magnitude"] = size
            value *= (size / np.linalg.norm(value, axis=1))[:, None]
        wanted[path] = value.T if turned else value
    if model == "llama" and flag:
        with pytest.raises(ValueError, match=r"c_proj: its weight of shape \(6, 6\) may lie as .*config.json beside"):
            merged(state, fan_in_fan_out=True)
        return
    found = merged(state, fan_in_fan_out=flag)
    assert all(np.abs(found[f"{path}.weight"] - wanted[path]).max() < 1e-5 for path in paths)


def test_shapes_decide_without_a_config_and_square_weights_are_refused():
    weight = normal(6, 18)
    write_base({"h.0.attn.c_attn.weight": weight, "h.0.attn.c_proj.weight": normal(6, 6)})
    state = lora({"h.0.attn.c_attn": (18, 6)})
    layer = state.layers["h.0.attn.c_attn"].tensors
    wanted = weight + 5 / 3 * (layer[B] @ layer[A]).T
    assert np.abs(merged(state)["h.0.attn.c_attn.weight"] - wanted).max() < 1e-5
    square = write_adapter(Path("square"), lora({"h.0.attn.c_proj": (6, 6)}))
    with pytest.raises(ValueError, match="c_proj: .*put the base's own config.json beside it"):
        merge(Path("base"), square, Path("two"), quiet=True)
    # A turned delta fits no layer of a model that has none of these.
    Path("base/config.json").write_text(json.dumps({"model_type": "gpt_bigcode"}))
    with pytest.raises(ValueError, match=r"shape \(18, 6\), but the base's weight has \(6, 18\)"):
        merge(Path("base"), Path("adapter"), Path("two"), quiet=True)


def test_the_way_of_a_weight_by_architecture_and_nested_model():
    assert inputs_first("h.0.c_fc", {"architectures": ["GPT2LMHeadModel"]}) is True
    assert inputs_first("h.0.c_fc", {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}) is True
    assert inputs_first("h.0.c_fc", {"model_type": "gpt_bigcode"}) is False
    assert inputs_first("lm_head", {"model_type": "gpt2"}, True) is False


@pytest.mark.parametrize("name", [f"{Q}.mindpet_delta_lora_a", f"{Q}.lora_scaling", f"{Q}.lora_A.default.weight",
                                  f"{Q}.base_layer.weight"])
def test_a_base_that_holds_an_adapter_is_refused(name):
    tensors = weights(layers=1)
    write_base({**tensors, name: np.ones((2, 24), np.float32)})
    with pytest.raises(ValueError, match="holds an adapter itself"):
        merged(lora(linear(tensors)))


def test_what_belongs_to_a_base_is_copied_and_adapters_are_not():
    write_shards(Path("base"), weights(layers=1), 2)
    for name in ("generation_config.json", "tokenizer_config.json", "adapter_config.json", "adapter_model.safetensors"):
        Path("base", name).write_text("{}")
    adapter = write_adapter(Path("adapter"), lora(linear(weights(layers=1))))
    done = merge(Path("base"), adapter, Path("out"), quiet=True)
    assert {path.name for path in done.left_behind} == {"adapter_config.json", "adapter_model.safetensors"}
    assert set(os.listdir("out")) == set(os.listdir("base")) - {"adapter_config.json", "adapter_model.safetensors"}
