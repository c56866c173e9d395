"""Whatever a file holds, a codec gives an adapter or a ValueError of one sentence, and detection one of the formats."""
from __future__ import annotations

import json

import numpy as np
import pytest
from adapters import DTYPES, dense, lora, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from mindpet_lite.formats import diffusers, kohya, mindformers, mindpet, mlx, peft
from mindpet_lite.formats.detect import FORMATS, detect
from mindpet_lite.formats.float8 import FLOAT8
from mindpet_lite.names.placing import map_names

PARTS = st.sampled_from("""
    x 0 unet text_encoder lora_unet_x lora_te1_text_model lora_unet_ base_model model lora_A lora_B lora_down lora_up
    lora down up weight bias alpha dora_scale default lora_magnitude_vector lora_embedding_A lora_mid processor
    to_q_lora to_out_lora lora_a lora_b mindpet_delta_lora_a mindpet_delta_lora_B mindpet_delta_ hada_w1_a é a/../b
    lokr_w1 lokr_w2 lokr_w2_a lokr_w2_b lokr_t2 hada_w1_b hada_w2_a hada_w2_b hada_t1
    scalar diff diff_b bundle_emb diffusion_model lycoris_x module _orig_mod modules_to_save original_module m lm_head
    lora_unet_double_blocks_0_img_attn_qkv embed_tokens text_encoders clip_l transformer
    """.split() + [""])
FIELDS = st.sampled_from("""
    r lora_alpha lora_dropout peft_type rank_pattern alpha_pattern unet.r unet.peft_type unet.lora_alpha layers config
    trained path settings method parameters component_in_paths lora_config lora_rank mindpet_lite x a.*( more
    fine_tune_type lora_parameters rank scale dropout modules_to_save use_dora
    """.split())
KEYS = st.lists(PARTS, min_size=1, max_size=5).map(".".join)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3]), max_size=4).map(tuple)
ARRAYS = st.builds(tensor, SHAPES, st.sampled_from([*DTYPES, *FLOAT8, np.dtype(bool), np.dtype(np.int64),
                                                    np.dtype(np.complex64)]), st.integers(0, 3))
TENSORS = st.dictionaries(KEYS, ARRAYS, max_size=5)
VALUES = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-2, 10 ** 12), st.floats(), st.text(max_size=4)),
                      lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(FIELDS, inner, max_size=4)),
                      max_leaves=8)
OBJECTS = st.dictionaries(FIELDS, VALUES, max_size=6)
TEXTS = st.one_of(OBJECTS.map(json.dumps), st.text(max_size=6))
METADATA = st.dictionaries(st.sampled_from(["mindpet_lite", "lora_adapter_metadata", "format", "alpha", "rank",
                                            "ss_network_alpha"]), TEXTS)
CODECS = ["diffusers", "kohya", "kohya with a net", "mindpet", "mindformers", "peft", "mlx", "detect", "names"]
GOOD = {"peft": {"peft_type": "LORA", "r": 2, "lora_alpha": 4},
        "mlx": {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 3.0}}}
many = settings(max_examples=100, deadline=None)


@many
@pytest.mark.parametrize("codec", CODECS)
@given(TENSORS, METADATA, OBJECTS)
def test_an_adapter_or_a_clear_error(codec, tensors, metadata, config):
    read(codec, tensors, metadata, config)


@many
@pytest.mark.parametrize("codec", CODECS[:5])
@given(st.data())
def test_a_good_file_with_faults(codec, data):
    kinds = {"a": dense(2, 3), "b.to_q": dense(2, 3, seed=3)}
    encoder = {"diffusers": diffusers, "mindpet": mindpet, "mindformers": mindformers}.get(codec, kohya)
    tensors, beside = encoder.encode(lora(kinds))
    key = data.draw(st.sampled_from(sorted(tensors)))
    value = data.draw(st.one_of(st.none(), ARRAYS))
    tensors = {name: value if name == key else old for name, old in tensors.items() if name != key or value is not None}
    if codec == "mindformers":
        field = data.draw(st.sampled_from(sorted(beside)))
        read(codec, tensors, {}, {**beside, field: damaged(beside[field], data)})
    else:
        read(codec, tensors, {name: json.dumps(damaged(json.loads(text), data)) if text.startswith("{") else text
                              for name, text in beside.items()}, {})


def damaged(found, data):
    """Return a JSON value with another value somewhere in it."""
    if not isinstance(found, dict) or not found or data.draw(st.integers(0, 3)) == 0:
        return data.draw(VALUES)
    key = data.draw(st.sampled_from(sorted(found)))
    return {**found, key: damaged(found[key], data)}


def read(codec, tensors, metadata, config):
    """Let a codec read what must give an adapter or a ValueError."""
    try:
        if codec == "diffusers":
            diffusers.decode(tensors, metadata)
        elif codec.startswith("kohya"):
            kohya.decode(tensors, metadata, ["x", "a.b"] if codec != "kohya" else None)
        elif codec == "mindpet":
            mindpet.decode(tensors, metadata.get("mindpet_lite"), ["lora", "adapter"])
        elif codec in ("mindformers", "peft", "mlx"):
            codecs = {"mindformers": mindformers, "peft": peft, "mlx": mlx}
            codecs[codec].decode(tensors, {**GOOD.get(codec, {}), **config})
        elif codec == "detect":
            assert detect(tensors, metadata, config) in FORMATS
        else:
            assert set(map_names(tensors, ["x", "x.lora", "model.x"])) == set(tensors)
    except ValueError as error:
        assert str(error).strip()
