"""decode(encode(a)) == a, bit for bit, through the bytes of a file."""
from __future__ import annotations

import json

import numpy as np
import pytest
from adapters import DTYPES, MAGNITUDE, A, assert_same, conv, dense, lora, random_layers, tensor, through_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindpet_lite.formats import diffusers, kohya, mindformers, mindpet
from mindpet_lite.formats.state import AdapterState, LayerState

# The folder of a test is one for all its examples: each writes the same file anew.
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CONFIGS = st.dictionaries(st.sampled_from(["ss_seed", "task_type", "modelspec.title", "revision"]),
                          st.sampled_from(["7", "CAUSAL_LM"]))


@many
@given(random_layers(dora=True, rslora=True), CONFIGS)
def test_kohya(layers, config):
    state = lora(layers, config=config)
    assert_same(kohya.decode(*through_file(*kohya.encode(state))), state)


@many
@given(random_layers(kinds=(dense,), rslora=True), CONFIGS)
def test_mindpet(layers, config):
    state = lora(layers, config=config, trained={"head.weight": tensor((2, 3), np.float16)})
    tensors, metadata = through_file(*mindpet.encode(state))
    assert_same(mindpet.decode(tensors, metadata["mindpet_lite"], ["lora"]), state)


@many
@given(random_layers(kinds=(dense,), same=True), CONFIGS)
def test_mindformers(layers, config):
    state = lora(layers, config=config)
    tensors, written = mindformers.encode(state)
    tensors, _ = through_file(tensors)
    assert_same(mindformers.decode(tensors, json.loads(json.dumps(written))), state)


@many
@given(random_layers(dora=True, rslora=True), CONFIGS)
def test_diffusers(layers, config):
    first = next(iter(layers.values()))
    for layer in layers.values():
        # PEFT's config has one of each.
        layer.settings["lora_dropout"] = 0.25
        for name in ("use_rslora", "use_dora"):
            layer.settings.pop(name, None)
        layer.settings.update({name: True for name in ("use_rslora", "use_dora") if name in first.settings})
        if "use_dora" not in first.settings:
            layer.tensors.pop(MAGNITUDE, None)
    layers = {path: layer for path, layer in layers.items() if len(layer.tensors) == len(first.tensors)}
    state = lora(layers, config=config)
    assert_same(diffusers.decode(*through_file(*diffusers.encode(state))), state)


@pytest.mark.parametrize("codec", [diffusers, kohya])
@pytest.mark.parametrize("heads", [["unet"], ["text_encoder"], ["unet", "text_encoder", "text_encoder_2"],
                                   ["transformer", "text_encoder"]])
def test_several_components(codec, heads):
    state = lora({f"{head}.blocks.{number}.to_q": dense(seed=number) for head in heads for number in range(2)})
    tensors, metadata = codec.encode(state)
    assert_same(codec.decode(*through_file(tensors, metadata)), state)
    foreign = {name: value for name, value in metadata.items() if name != "mindpet_lite"}
    if codec is diffusers:
        assert {name.split(".")[0] for name in tensors} == set(heads)
        found = diffusers.decode(tensors, foreign)
        assert_same(found, state if len(heads) > 1 else lora(
            {path.partition(".")[2]: layer for path, layer in state.layers.items()}), config=False)
        assert found.component == (heads[0] if len(heads) == 1 else "")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["bitfit", "adapter", "prefixtuning", "low_rank_adapter", "ptuning2"])
def test_mindpets_other_methods(method, dtype):
    names = ["bias"] if method == "bitfit" else [f"mindpet_delta_{method}.one.weight", f"mindpet_delta_{method}.bias"]
    state = AdapterState(method, {path: LayerState({name: tensor((2, 3), dtype) for name in names}, {"size": 3})
                                  for path in ("a.0", "a.1", "b")})
    tensors, metadata = through_file(*mindpet.encode(state))
    assert set(tensors) == {f"{path}.{name}" for path in state.layers for name in names}
    assert_same(mindpet.decode(tensors, metadata["mindpet_lite"], [method]), state)


def test_mindpets_own_file_has_no_settings():
    state = lora({path: LayerState(dense().tensors, None) for path in ("a", "b.0")})
    tensors, metadata = mindpet.encode(state)
    assert metadata == {}
    assert_same(mindpet.decode(tensors, None, ["lora"]), state)
    upper = {name.replace("lora_a", "lora_A").replace("lora_b", "lora_B"): value for name, value in tensors.items()}
    assert_same(mindpet.decode(upper, None, ["lora"]), state)


def test_the_net_itself_as_mindpet_names_it():
    state = lora({"": dense()})
    tensors, metadata = mindpet.encode(state)
    assert A in tensors
    assert_same(mindpet.decode(tensors, metadata["mindpet_lite"], ["lora"]), state)


@pytest.mark.parametrize("spelling", ["{}.mindpet_delta_lora_{}", "{}.lora_{}"])
def test_mindformers_both_spellings(spelling):
    layer = dense(rank=2)
    tensors = {spelling.format("model.layers.0.attention.wq", letter): layer.tensors[f"mindpet_delta_lora_{letter}"]
               for letter in "ab"}
    config = {"lora_alpha": 16, "lora_dropout": 0.05, "r": 2, "target_modules": ["wq"]}
    state = mindformers.decode(tensors, config)
    assert_same(state, lora({"model.layers.0.attention.wq": LayerState(
        layer.tensors, {"lora_rank": 2, "lora_alpha": 16, "lora_dropout": 0.05})}))
    _, written = mindformers.encode(state)
    assert {name: written[name] for name in config} == config
    manifest = {"format": "mindformers_pynative_lora_adapter_v1",
                "lora_config": {"lora_rank": 2, "lora_alpha": 16, "lora_dropout": 0.05}}
    assert_same(mindformers.decode(tensors, manifest), state)
    assert mindformers.decode(tensors, None).layers["model.layers.0.attention.wq"].settings is None


def test_rslora_in_kohyas_alpha():
    state = lora({"a": dense(4, 8, use_rslora=True), "b": conv(3, 1.5, use_rslora=True), "c": dense(4, 8)})
    tensors, metadata = kohya.encode(state)
    alpha = {path: float(tensors[f"lora_unet_{path}.alpha"]) for path in "abc"}
    assert alpha == {"a": 16.0, "b": 1.5 * 3 ** 0.5, "c": 8.0}
    del metadata["mindpet_lite"]
    found = kohya.decode(tensors, metadata, ["a", "b", "c"])
    assert found.layers["a"].settings == {"lora_rank": 4, "lora_alpha": 16, "lora_dropout": 0.0}


def test_a_changed_file_counts_more_than_what_we_wrote_beside_it():
    state = lora({"a": dense(4, 8, use_rslora=True)})
    tensors, metadata = kohya.encode(state)
    tensors["lora_unet_a.alpha"] = np.float32(3)
    assert kohya.decode(tensors, metadata).layers["a"].settings == {
        "lora_rank": 4, "lora_alpha": 3, "lora_dropout": 0.0}


def test_dora_in_kohyas_files():
    state = lora({"a": dense(sizes=(3, 5), use_dora=True), "b": conv(sizes=(3, 5), use_dora=True)})
    tensors, _ = kohya.encode(state)
    assert tensors["lora_unet_a.dora_scale"].shape == (5, 1)
    assert tensors["lora_unet_b.dora_scale"].shape == (5, 1, 1, 1)


def test_kohya_without_alpha_is_alpha_of_the_rank():
    layer = dense(3, 7)
    down, up = layer.tensors.values()
    for alpha, wanted in ((None, 3), (np.float16(0), 3), (np.float16(1.5), 1.5), (np.int64(2), 2)):
        tensors = {"lora_unet_x.lora_down.weight": down, "lora_unet_x.lora_up.weight": up}
        if alpha is not None:
            tensors["lora_unet_x.alpha"] = np.asarray(alpha)
        found = kohya.decode(tensors, {}, ["x"]).layers["x"].settings["lora_alpha"]
        assert found == wanted and type(found) is type(wanted)


def test_kohyas_metadata_is_kept():
    state = lora({"text_model.encoder.layers.0.mlp.fc1": dense()}, component="text_encoder",
                 config={"ss_base_model_version": "sdxl_base_v1-0", "text_encoder_prefix": "lora_te1"})
    tensors, metadata = kohya.encode(state)
    assert "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha" in tensors
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    foreign = {name: value for name, value in metadata.items() if name != "mindpet_lite"}
    assert_same(kohya.decode(tensors, foreign), state)
