"""Whole adapters of strangers: their configs, their types, and what is never opened, executed or allocated."""
from __future__ import annotations

import json
import pickle
import sys
import warnings
from pathlib import Path

import files
import numpy as np
import pytest
from files import Dangerous
from mindspore import nn
from nets import unchanged
from safetensors import deserialize

import mindpet_lite as mp
from mindpet_lite.delta import METHODS
from mindpet_lite.formats import directory
from mindpet_lite.formats.files import BF16, as_float
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.formats.strict_json import parse_object
from mindpet_lite.names.expressions import compile_end

# JSON and patterns

@pytest.mark.parametrize("text, expected", [
    ("{}", {}), (' {"a": [1, 2.5, null, true, "\\u00e9"]} ', {"a": [1, 2.5, None, True, "é"]}),
    ('{"a": {"a": 1}}', {"a": {"a": 1}}), ('{"a": 12345678901234567890}', {"a": 12345678901234567890})])
def test_json_objects_are_read(text, expected):
    assert parse_object(text.encode()) == expected


@pytest.mark.parametrize("text, message", [
    ("", "is not valid JSON"), ("[1]", "must hold a JSON object, but holds a list"), ("null", "holds a NoneType"),
    ('{"a": 1e400}', "a must be made of finite numbers, but is inf"),
    ('{"a": [[-Infinity]]}', "a must be made of finite"), ("\ufeff{}", "is not valid JSON"),
    ('{"a": {"b": NaN}}', "b must be made of finite"), ('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' stands twice"),
    ("[" * 50_000, "nested too deeply"), ('{"a": ' + "1" * 21 + "}", "has 21 digits")])
def test_json_that_is_none_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_object(text.encode())


@pytest.mark.parametrize("pattern, path, expected", [
    ("q_proj", "model.layers.0.q_proj", True), ("q_proj", "model.layers.0.xq_proj", False), ("a.b", "a.b", True),
    (r"^a\.b$", "a.b", True), (r"^a\.b$", "x.a.b", False),
    (r".*\.layers\.(0|1|12)\..*(q|k)_proj", "m.layers.12.x.k_proj", True),
    (r"layers\.\d+\..*proj", "m.layers.3.self_attn.q_proj", True),
    ("|".join(f"l{place}" for place in range(300)), "a.l299", True)])
def test_patterns_match_the_end_of_paths(pattern, path, expected):
    assert bool(compile_end(pattern).fullmatch(path)) is expected


@pytest.mark.parametrize("pattern, message", [
    ("(a+)+", "could take too long"), ("(a|a)*" * 9, "could take too long"), (".*" * 9, "could take too long"),
    ("a?" * 40 + "b", "could take too long"), ("(?:a{0,50}){0,50}", "too long"), ("(?=(a+)+b)", "too long"),
    ("(?>(a+)+b)" if sys.version_info >= (3, 11) else "(a*)*", "too long"), ("(", "is no regular expression"),
    ("x)(y", "no regular expression"), ("(?i)q", "no regular expression"),
    ("a{99999999999999}", "no regular expression")])
def test_patterns_that_never_end_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        compile_end(pattern)


# Whole adapters

def lora(dtype=np.float32, fill: float = 1.0) -> AdapterState:
    return AdapterState("lora", {"to_q": LayerState(
        {"mindpet_delta_lora_a": np.full((2, 6), fill).astype(dtype),
         "mindpet_delta_lora_b": np.full((6, 2), fill).astype(dtype)},
        {"lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.0})})


class Net(nn.Cell):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Dense(6, 6)


@pytest.mark.parametrize("dtype, warning", [(np.float64, "as float64: they are rounded to float32"),
                                            (np.float16, None), (np.float32, None)])
def test_factors_of_other_float_types_are_read(dtype, warning):
    files.save(lora(dtype, 1.5), Path("adapter"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        net = mp.load_adapter(Net(), "adapter")
    assert [warning in str(item.message) for item in said] == ([True] if warning else [])
    assert (net.to_q.mindpet_delta_lora_b.asnumpy() == 1.5).all()


def test_bfloat16_adapters_keep_their_bits_through_files_and_say_once_that_they_are_float32():
    bits = np.arange(0x3f80, 0x3f8c, dtype=np.uint16).view(BF16)
    state = lora()
    state.layers["to_q"].tensors.update(mindpet_delta_lora_a=bits.reshape(2, 6),
                                        mindpet_delta_lora_b=bits.reshape(6, 2))
    files.save(state, Path("adapter"))
    files.save(files.load(Path("adapter")), Path("again"))
    assert Path("adapter", directory.TENSOR_FILE).read_bytes() == Path("again", directory.TENSOR_FILE).read_bytes()
    stored = deserialize(Path("again", directory.TENSOR_FILE).read_bytes())
    assert {entry["dtype"] for _, entry in stored} == {"BF16"} and bytes(stored[0][1]["data"]) == bits.tobytes()
    with pytest.warns(UserWarning, match="adapter stores values as bfloat16: they are read as float32") as said:
        net = mp.load_adapter(Net(), "adapter")
    assert len(said) == 1 and said[0].filename == __file__
    assert np.array_equal(net.to_q.mindpet_delta_lora_a.asnumpy(), as_float(bits).reshape(2, 6))


@pytest.mark.parametrize("dtype", [np.int32, np.bool_, np.complex64, np.uint8])
def test_factors_that_are_no_floats_are_refused(dtype):
    files.save(lora(dtype), Path("adapter"))
    net = Net()
    message = "to_q.mindpet_delta_lora_a is of type (I32|BOOL|C64|U8), but LoRA's tensors are F32, F16, BF16 or F64"
    with unchanged(net), pytest.raises(ValueError, match=message):
        mp.load_adapter(net, "adapter")


@pytest.mark.parametrize("dtype, value", [(np.float32, np.nan), (np.float16, np.inf), (np.float64, 1e300)])
@pytest.mark.filterwarnings("ignore:.*float64")
def test_values_that_are_not_finite_are_refused(dtype, value):
    files.save(lora(dtype, value), Path("adapter"))
    net = Net()
    with unchanged(net), pytest.raises(ValueError, match="not finite: to_q.mindpet_delta_lora_a holds NaN or infinite"):
        mp.load_adapter(net, "adapter")


CONFIG_TEXTS = [
    ('{"r": 1000000000}', "do not fit rank 1000000000|must be a positive number"),
    ('{"lora_alpha": 1e400}', "lora_alpha must be"),
    ('{"r": 2, "r": 2}', "the key 'r' stands twice"), ('{"r": "2"}', "r must be a positive number"),
    ('{"rank_pattern": {"(a+)+": 2}}', "could take too long"),
    ('{"alpha_pattern": {"(?i)q": 2}}', "no regular expression"),
    ('{"lora_dropout": [0]}', "lora_dropout"), ('{"r": ' + "9" * 30 + "}", "30 digits"),
    ('{"r": {"a": [NaN]}}', "a must be"),
    (json.dumps({"rank_pattern": {f"l{number}": 2 for number in range(10_001)}}), "10001 patterns; up to 10000")]


@pytest.mark.parametrize("text, message", CONFIG_TEXTS, ids=[text[:30] for text, _ in CONFIG_TEXTS])
def test_configs_of_strangers_are_refused(text, message):
    files.save(lora(), Path("adapter"))
    path = Path("adapter", directory.CONFIG_FILE)
    own = json.loads(path.read_text())
    for name in json.loads(text.replace("NaN", "0").replace("1e400", "0")):
        own.pop(name)
    path.write_text(text[:-1] + "," + json.dumps(own)[1:])
    net = Net()
    with unchanged(net), pytest.raises(ValueError, match=message):
        mp.load_adapter(net, "adapter")


def test_paths_in_a_config_are_text_that_nothing_opens():
    files.save(lora(), Path("adapter"))
    path = Path("adapter", directory.CONFIG_FILE)
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "../../../../etc/passwd"}))
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    mp.load_adapter(Net(), "adapter")
    assert any("adapter_model" in name for name in opened) and not any("passwd" in name for name in opened)


def test_a_config_of_20_megabytes_is_refused():
    files.save(lora(), Path("adapter"))
    Path("adapter", directory.CONFIG_FILE).write_text(" " * 20_000_001)
    with pytest.raises(ValueError, match="adapter_config.json is larger than 20000000 bytes"):
        files.load(Path("adapter"))


@pytest.mark.parametrize("method, size", [("lora", "lora_rank"), ("adapter", "bottleneck_size"),
                                          ("low_rank_adapter", "low_rank_size")])
def test_sizes_beyond_what_the_file_holds_take_no_memory(method, size):
    kind = METHODS[method]
    net = mp.get_pet_model(Net(), kind(target_modules=["to_q"], **{size: 2}))
    mp.save_adapter(net, "adapter")
    path = Path("adapter", directory.CONFIG_FILE)
    text = path.read_text()
    assert f'"{size}": 2' in text or method == "lora"
    path.write_text(text.replace(f'"{size}": 2', f'"{size}": 1000000000').replace('"r": 2', '"r": 1000000000'))
    plain = Net()
    with unchanged(plain), pytest.raises(ValueError, match="1000000000"):
        mp.load_adapter(plain, "adapter")


def test_pefts_pickles_are_named():
    Path("adapter").mkdir()
    Path("adapter", directory.CONFIG_FILE).write_text("{}")
    Path("adapter/adapter_model.bin").write_bytes(pickle.dumps(Dangerous()))
    with pytest.raises(FileNotFoundError, match="adapter_model.bin is a pickle.*safe_serialization=True"):
        mp.load_adapter(Net(), "adapter")
    assert not Path("executed").exists()


def test_a_model_of_mindnlp_is_told_what_to_do():
    module = type("Module", (), {"__module__": "mindtorch.nn.modules.module"})
    model = type("LlamaForCausalLM", (module,), {"__module__": "transformers.models.llama.modeling_llama"})()
    with pytest.raises(TypeError, match="LlamaForCausalLM is a model of mindnlp.*with mindnlp.peft.*mindone"):
        mp.get_pet_model(model, mp.LoraConfig(2, 4, target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="must be a mindspore.nn.Cell, but got int"):
        mp.get_pet_model(3, mp.LoraConfig(2, 4, target_modules=["q_proj"]))
