"""diffusers' layouts, and what is wrong with a file."""
from __future__ import annotations

import json

import numpy as np
import pytest
from adapters import A, B, assert_same, conv, dense, embedding, lora, tensor

from mindpet_lite.formats import diffusers
from mindpet_lite.formats.state import LayerState

PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
TEXT = "text_model.encoder.layers.0.self_attn.out_proj"
CONFIG = {"unet.peft_type": "LORA", "unet.r": 2, "unet.lora_alpha": 6}


def keys(layer, spelling):
    """Return a layer's factors under keys like `spelling`, which holds down|up or A|B."""
    first, second = spelling.split("|")
    return {first: layer.tensors[A], second: layer.tensors[B]}


@pytest.mark.parametrize("spelling", [
    f"unet.{PATH}.lora_A.weight|unet.{PATH}.lora_B.weight", f"{PATH}.lora_A.weight|{PATH}.lora_B.weight",
    f"unet.{PATH}.lora_A.default.weight|unet.{PATH}.lora_B.default.weight",
    f"{PATH}.lora_A.my-style.weight|{PATH}.lora_B.my-style.weight",
    f"unet.{PATH}.lora.down.weight|unet.{PATH}.lora.up.weight",
    f"unet.{PATH[:-9]}.processor.to_out_lora.down.weight|unet.{PATH[:-9]}.processor.to_out_lora.up.weight",
    f"{PATH[:-9]}.processor.to_out_lora.down.weight|{PATH[:-9]}.processor.to_out_lora.up.weight"])
def test_layouts_of_the_unet(spelling):
    layer = dense(2, 2)
    assert_same(diffusers.decode(keys(layer, spelling), {}), lora({PATH: layer}))


@pytest.mark.parametrize("spelling", [
    f"text_encoder.{TEXT}.lora_linear_layer.down.weight|text_encoder.{TEXT}.lora_linear_layer.up.weight",
    f"text_encoder.{TEXT}.lora_A.weight|text_encoder.{TEXT}.lora_B.weight",
    f"text_encoder.{TEXT[:-9]}.to_out_lora.down.weight|text_encoder.{TEXT[:-9]}.to_out_lora.up.weight"])
def test_layouts_of_text_encoders(spelling):
    layer = dense(2, 2)
    state = diffusers.decode(keys(layer, spelling), {})
    assert_same(state, lora({TEXT: layer}))
    assert state.component == "text_encoder"


def test_alpha_of_each_layer():
    first, second, third = dense(2, 6), conv(3, 0.5, seed=2), dense(2, 2, seed=4)
    tensors = {}
    for name, layer in (("a", first), ("b", second), ("c", third)):
        tensors |= keys(layer, f"unet.{name}.lora.down.weight|unet.{name}.lora.up.weight")
    tensors |= {"unet.a.alpha": np.asarray(6, np.float32), "unet.b.alpha": np.asarray([0.5], np.float16)}
    assert_same(diffusers.decode(tensors, {}), lora({"a": first, "b": second, "c": third}))


def test_components_with_configs_of_their_own():
    layers = {"unet.a": dense(2, 6), "text_encoder.b": dense(3, 4, seed=3)}
    tensors = {f"{path}.lora_{factor}.weight": layer.tensors[name] for path, layer in layers.items()
               for factor, name in (("A", A), ("B", B))}
    config = {**CONFIG, "text_encoder.peft_type": "LORA", "text_encoder.r": 3, "text_encoder.lora_alpha": 4}
    assert_same(diffusers.decode(tensors, {"lora_adapter_metadata": json.dumps(config)}), lora(layers), config=False)


GOOD = keys(dense(2, 6), "unet.a.lora_A.weight|unet.a.lora_B.weight")
BAD = [
    ({}, {}, "it holds no tensor"),
    ({"unet.a.weight": tensor((2, 2))}, {}, "unet.a.weight is no tensor of a LoRA layer in any of diffusers' layouts"),
    ({"unet.a.hada_w1_a": tensor((2, 2))}, {}, "a lacks hada_w1_b and hada_w2_a and hada_w2_b"),
    ({"unet.a.lora_A.weight": tensor((2, 3))}, {}, "unet: a lacks"),
    ({"unet.a.lora_B.weight": tensor((2, 3))}, {}, "no factor A"),
    (GOOD | keys(dense(2, 6), "unet.a.lora.down.weight|unet.a.lora.up.weight"), {},
     "unet.a.lora.down.weight stands twice in the file, in two layouts"),
    (keys(dense(), "a.lora_A.one.weight|a.lora_B.two.weight"), {}, "several adapters: one, two"),
    (GOOD | {"unet.b.alpha": np.float32(1)}, {}, "alpha without a layer: b"),
    (GOOD | {"unet.a.alpha": np.asarray(np.nan, np.float32)}, {}, "a: alpha must be one positive number"),
    (GOOD | {"unet.a.alpha": np.asarray(-1.0)}, {}, "a: alpha must be one positive number"),
    (GOOD | {"unet.a.alpha": np.ones(2)}, {}, "a: alpha must be one positive number"),
    (GOOD | {"unet.a.alpha": np.asarray(1.0)}, {"lora_adapter_metadata": json.dumps(CONFIG)}, "which counts"),
    (GOOD, {"lora_adapter_metadata": "{"}, "its config .lora_adapter_metadata. is not valid JSON"),
    (GOOD, {"lora_adapter_metadata": "[]"}, "its config .lora_adapter_metadata. must hold a JSON object"),
    (GOOD, {"lora_adapter_metadata": json.dumps({"text_encoder.r": 2})}, "unet: "),
    (GOOD, {"lora_adapter_metadata": json.dumps({**CONFIG, "unet.r": 3})}, "do not fit rank 3"),
    (GOOD, {"mindpet_lite": "[]"}, "its entry 'mindpet_lite' must hold"),
    (GOOD, {"mindpet_lite": '{"component_in_paths": 1, "config": {}}'}, "its entry 'mindpet_lite' is damaged"),
]


@pytest.mark.parametrize("tensors, metadata, message", BAD, ids=[message[:30] for _, _, message in BAD])
def test_what_is_wrong_with_a_file(tensors, metadata, message):
    with pytest.raises(ValueError, match=message):
        diffusers.decode(tensors, metadata)


def test_all_problems_in_one_message():
    with pytest.raises(ValueError, match="(?s)one.weight.*two.weight"):
        diffusers.decode({"one.weight": tensor((1,)), "two.weight": tensor((1,))}, {})


def test_what_diffusers_files_cannot_hold():
    with pytest.raises(ValueError, match="head.weight: diffusers' LoRA files have no place for a base parameter"):
        diffusers.encode(lora({"a": dense()}, trained={"head.weight": tensor((2,))}))
    with pytest.raises(ValueError, match="a: rank and alpha are not known"):
        diffusers.encode(lora({"a": LayerState(dense().tensors, None)}))
    with pytest.raises(ValueError, match="unet.b: lora_dropout=0.5 cannot stand in PEFT's config"):
        diffusers.encode(lora({"a": dense(), "b": dense(lora_dropout=0.5), "c": dense()}))


def test_an_embedding():
    state = lora({"text_encoder.text_model.embeddings.token_embedding": embedding()})
    tensors, metadata = diffusers.encode(state)
    assert "text_encoder.text_model.embeddings.token_embedding.lora_embedding_A" in tensors
    assert_same(diffusers.decode(tensors, metadata), state)
