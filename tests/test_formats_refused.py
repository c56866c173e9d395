"""What a format cannot hold, or what is wrong with a file: an error that names the layer and what of it."""
from __future__ import annotations

import json

import numpy as np
import pytest
from adapters import B_BIAS, MAGNITUDE, A, B, conv, dense, embedding, lora, tensor

from mindpet_lite.formats import kohya, mindformers, mindpet
from mindpet_lite.formats.state import AdapterState, LayerState

CODECS = {"kohya": kohya.encode, "mindpet": mindpet.encode, "mindformers": mindformers.encode}
BIASED = LayerState({**dense().tensors, B_BIAS: tensor((5,))}, {**dense().settings, "lora_bias": True})
UNKNOWN = LayerState(dense().tensors, None)
TRAINED = {"head.weight": tensor((2,))}
CANNOT = [
    ("mindpet", lora({"x.y": dense(use_dora=True)}), "x.y: MindPet's files have no place for DoRA's magnitude"),
    ("mindpet", lora({"x.y": dense(use_dora=True)}), "x.y: MindPet's files cannot say use_dora=True"),
    ("mindpet", lora({"x.y": conv()}), "x.y: MindPet has LoRA on dense layers only"),
    ("mindpet", lora({"x.y": embedding()}), "x.y: MindPet's files have no place for an embedding's factor A"),
    ("mindpet", lora({"x.y": BIASED}), "x.y: MindPet's files have no place for the bias of B .lora_bias."),
    ("mindpet", lora({"x.y": dense()}, trained={f"x.y.{A}": tensor((2,))}), f"x.y.{A} would be the name of 2 tensors"),
    ("mindformers", lora({"x.y": dense(use_dora=True)}), "x.y: MindFormers' files have no place for DoRA's magnitude"),
    ("mindformers", lora({"x.y": conv()}), "x.y: MindFormers has LoRA on dense layers only"),
    ("mindformers", lora({"x.y": embedding()}), "x.y: MindFormers' files have no place for an embedding"),
    ("mindformers", lora({"x": dense(2), "y": dense(3)}), "one rank for all layers, but x has 2 and y has 3"),
    ("mindformers", lora({"x": dense(2, 4), "y": dense(2, 5)}), "one alpha for all layers, but x has 4 and y has 5"),
    ("mindformers", lora({"x": dense(4, 4), "y": dense(4, 4, use_rslora=True)}), "x has 4 and y has 8.0"),
    ("mindformers", lora({"x": dense(lora_dropout=0.1), "y": dense()}), "one dropout .* x has 0.1 and y has 0.0"),
    ("mindformers", lora({"x.y": dense()}, trained=TRAINED), "head.weight: MindFormers' files have no place"),
    ("mindformers", lora({"x.y": UNKNOWN}), "x.y: rank and alpha are not known"),
    ("kohya", lora({"x.y": embedding()}), "x.y: kohya's files have no place for an embedding's factor B"),
    ("kohya", lora({"x.y": BIASED}), "x.y: kohya's files cannot say lora_bias=True"),
    ("kohya", lora({"x.y": dense()}, trained=TRAINED), "head.weight: kohya's files have no place"),
    ("kohya", lora({"x.y": UNKNOWN}), "x.y: rank and alpha are not known"),
    ("kohya", lora({"x.y": dense(some_new_setting=3)}), "x.y: kohya's files cannot say some_new_setting=3"),
    ("kohya", lora({"x.y": LayerState(dense(use_dora=True).tensors, dense().settings)}), "x.y: use_dora=None"),
    ("kohya", lora({"x.y": LayerState({A: tensor((2, 3))}, dense().settings)}), "x.y lacks factor B"),
    ("kohya", lora({"x.y": dense(), "x_y": dense()}), "x_y and x.y would have one name, lora_unet_x_y"),
    ("kohya", lora({"": dense()}), "no name for the net itself"),
    ("kohya", lora({"transformer_2.x": dense()}), "no name for transformer_2"),
    ("kohya", AdapterState("bitfit", {"x": dense()}), "kohya's files hold LoRA only, .* of method 'bitfit'"),
    ("mindformers", AdapterState("adapter", {"x": dense()}), "hold LoRA only, .* of method 'adapter'"),
    ("kohya", lora({}), "it holds no layer"),
]


@pytest.mark.parametrize("codec, state, message", CANNOT, ids=[f"{codec}: {text[:40]}" for codec, _, text in CANNOT])
def test_what_a_format_cannot_hold(codec, state, message):
    with pytest.raises(ValueError, match=message):
        CODECS[codec](state)


DOWN, UP = (value for value in dense(2, 4).tensors.values())
LAYER = {"lora_unet_x.lora_down.weight": DOWN, "lora_unet_x.lora_up.weight": UP}
BAD_KOHYA = [
    ({}, "it holds no tensor"),
    ({"lora_down.weight": DOWN}, "lora_down.weight is no key of kohya's: they start with lora_unet, lycoris, lora_te"),
    ({"lora_control_x.lora_down.weight": DOWN}, "is no key of kohya's"),
    ({**LAYER, "lora_unet_x.lora_mid.weight": DOWN}, "lora_mid.weight is LoCon with a third factor"),
    ({"lora_unet_x.hada_w1_a": DOWN}, "x lacks hada_w1_b and hada_w2_a and hada_w2_b"),
    ({"lora_unet_x.lokr_w1": DOWN}, "x has lokr_w1: expected lokr_w1, or lokr_w1_a and lokr_w1_b; and lokr_w2"),
    ({"lora_unet_x.lokr_w9": DOWN}, "lokr_w9 is a part that LoKr does not have"),
    ({**LAYER, "lora_unet_x.lokr_w1": DOWN}, "x has parts of several methods: lora_down.weight, lora_up.weight, lokr"),
    ({"lora_unet_x.oft_blocks": DOWN}, "is OFT"),
    ({"lora_unet_x.diff": DOWN}, "is a full difference of weights"),
    ({"lora_unet_x.lora_up.weight": UP}, "x lacks lora_down.weight"),
    ({"lora_unet_x.alpha": UP}, "x lacks lora_down.weight and lora_up.weight"),
    ({**LAYER, "lora_unet_x.lora_up.weight": DOWN}, "do not belong together"),
    ({**LAYER, "lora_unet_x.lora_up.weight": np.float32(1)}, "do not belong together"),
    ({**LAYER, "lora_unet_x.alpha": np.asarray(-1.0)}, "x: alpha must be one positive number"),
    ({**LAYER, "lora_unet_x.alpha": np.asarray(np.inf)}, "x: alpha must be one positive number"),
    ({**LAYER, "lora_unet_x.alpha": np.asarray(True)}, "x: alpha must be one positive number"),
    ({**LAYER, "lora_unet_x.dora_scale": tensor((1, 3))}, r"dora_scale of shape \(1, 3\).*wd_on_out=False"),
    ({name.replace("_x", "_my_net_fc"): value for name, value in LAYER.items()},
     "lora_unet_my_net_fc: the underscores do not say which are dots"),
]


@pytest.mark.parametrize("tensors, message", BAD_KOHYA, ids=[message[:40] for _, message in BAD_KOHYA])
def test_what_is_wrong_with_a_file_of_kohyas(tensors, message):
    with pytest.raises(ValueError, match=message):
        kohya.decode(tensors, {}, ["x"])


@pytest.mark.parametrize("entry", ["{", "[]", '{"layers": {}}', '{"layers": [], "config": {}}',
                                   '{"layers": {"lora_unet_x": {"path": 3, "settings": {}}}, "config": {}}',
                                   '{"layers": {"lora_unet_x": {"path": "x"}}, "config": {}}',
                                   '{"layers": {}, "config": 3}', "[" * 100_000])
def test_a_damaged_entry(entry):
    with pytest.raises(ValueError, match="its entry 'mindpet_lite' is damaged"):
        kohya.decode(LAYER, {"mindpet_lite": entry})
    if entry.startswith("{") and entry != "{":
        with pytest.raises(ValueError, match="its entry 'mindpet_lite' is damaged"):
            mindformers.decode({f"x.{A}": DOWN, f"x.{B}": UP}, {"r": 2, "lora_alpha": 4,
                                                                "mindpet_lite": json.loads(entry)})


def test_paths_of_folders_in_our_entry_are_refused():
    found = kohya.encode(lora({"x": dense()}))
    entry = json.loads(found[1]["mindpet_lite"])
    entry["layers"]["lora_unet_x"]["path"] = "../../x"
    with pytest.raises(ValueError, match="is a path of folders"):
        kohya.decode(found[0], {"mindpet_lite": json.dumps(entry)})
    entry = {"../x": {"method": "lora", "settings": {}, "parameters": {"mindpet_delta_lora_a": "x"}}}
    with pytest.raises(ValueError, match="is a path of folders"):
        mindpet.decode({"x": np.ones((2, 4), np.float32)}, json.dumps(entry), ["lora"])


def test_settings_that_make_no_sense_are_not_ours():
    for own in ({"lora_rank": "2", "lora_alpha": 2}, {"lora_rank": 2, "lora_alpha": None}, {},
                {"lora_rank": 2, "lora_alpha": 1, "use_rslora": True}, {"lora_rank": [], "lora_alpha": 2}):
        entry = json.dumps({"layers": {"lora_unet_x": {"path": "x", "settings": own}}, "config": {}})
        found = kohya.decode(LAYER, {"mindpet_lite": entry})
        assert found.layers["x"].settings == {"lora_rank": 2, "lora_alpha": 2, "lora_dropout": 0.0}


PAIR = {f"x.{A}": DOWN, f"x.{B}": UP}
GOOD = {"r": 2, "lora_alpha": 4}
BAD_MINDFORMERS = [
    ({}, GOOD, "it holds no tensor"),
    ({"x.weight": DOWN}, GOOD, "x.weight is no tensor of a LoRA layer"),
    ({"x.experts.weight1_lora_a": DOWN}, GOOD, "weight1_lora_a is no tensor of a LoRA layer"),
    ({f"x.{A}": DOWN}, GOOD, "x lacks factor B"),
    (PAIR | {"x.lora_a": DOWN}, GOOD, "x.lora_a stands twice in the file, in two spellings"),
    (PAIR, {"r": 3, "lora_alpha": 4}, "x has rank 2, but the config says 3"),
    (PAIR, {"r": True, "lora_alpha": 4}, "r must be a positive integer"),
    (PAIR, {"r": 10 ** 9, "lora_alpha": 4}, "x has rank 2, but the config says 1000000000"),
    (PAIR, {"r": 2}, "lora_alpha must be a positive number"),
    (PAIR, {"r": 2, "lora_alpha": "4"}, "lora_alpha must be a positive number"),
    (PAIR, {"r": 2, "lora_alpha": -4}, "lora_alpha must be a positive number"),
    (PAIR, {**GOOD, "lora_dropout": 1.5}, "lora_dropout must be a number from 0 to 1"),
    (PAIR, {**GOOD, "use_rslora": True}, "use_rslora = True is not known to MindFormers"),
    (PAIR, {**GOOD, "alpha_pattern": {"x": 3}}, "alpha_pattern = "),
]


@pytest.mark.parametrize("tensors, config, message", BAD_MINDFORMERS, ids=[text[:40] for _, _, text in BAD_MINDFORMERS])
def test_what_is_wrong_with_mindformers_files(tensors, config, message):
    with pytest.raises(ValueError, match=message):
        mindformers.decode(tensors, config)


@pytest.mark.parametrize("entry", ['{"trained": [], "layers": {}}', '{"trained": [3], "layers": {}, "config": {}}',
                                   '{"trained": [], "layers": {}, "config": []}',
                                   '{"x": {"method": "lora", "settings": {}, "parameters": {"a": []}}}'])
def test_a_damaged_entry_of_a_checkpoint(entry):
    with pytest.raises(ValueError, match="its settings under 'mindpet_lite' are damaged"):
        mindpet.decode(PAIR, entry, ["lora"])


def test_a_base_parameter_that_should_be_there():
    tensors, metadata = mindpet.encode(lora({"x": dense()}, trained=TRAINED))
    del tensors["head.weight"]
    with pytest.raises(ValueError, match="head.weight, a base parameter that trained, is missing"):
        mindpet.decode(tensors, metadata["mindpet_lite"], ["lora"])


def test_magnitudes_stay_what_they_are():
    layer = conv(use_dora=True, sizes=(3, 5))
    tensors, _ = kohya.encode(lora({"x": layer}))
    found = kohya.decode(tensors, {}, ["x"]).layers["x"].tensors[MAGNITUDE]
    assert found.shape == (1, 5, 1, 1) and found.tobytes() == layer.tensors[MAGNITUDE].tobytes()
