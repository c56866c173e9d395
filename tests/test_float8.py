"""8 bit floats: every code's number, their place in files, and where they are refused by name."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from adapters import A, B
from files import same
from safetensors import TensorSpec, serialize

from mindpet_lite.formats import adapters, kohya
from mindpet_lite.formats.files import as_float, read_tensors, to_bytes, type_name
from mindpet_lite.formats.float8 import F8_E4M3, F8_E5M2, F8_E8M0, FLOAT8
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.formats.values import in_float32
from mindpet_lite.offline.convert import convert
from mindpet_lite.offline.merge import merge

CODES = np.arange(256, dtype=np.uint8)
# PyTorch's float8_e4m3fn of the codes 0 to 127, as the bits of float16, which holds all of them.
E4M3 = """
    0000 1800 1c00 1e00 2000 2100 2200 2300 2400 2480 2500 2580 2600 2680 2700 2780 2800 2880 2900 2980 2a00 2a80 2b00
    2b80 2c00 2c80 2d00 2d80 2e00 2e80 2f00 2f80 3000 3080 3100 3180 3200 3280 3300 3380 3400 3480 3500 3580 3600 3680
    3700 3780 3800 3880 3900 3980 3a00 3a80 3b00 3b80 3c00 3c80 3d00 3d80 3e00 3e80 3f00 3f80 4000 4080 4100 4180 4200
    4280 4300 4380 4400 4480 4500 4580 4600 4680 4700 4780 4800 4880 4900 4980 4a00 4a80 4b00 4b80 4c00 4c80 4d00 4d80
    4e00 4e80 4f00 4f80 5000 5080 5100 5180 5200 5280 5300 5380 5400 5480 5500 5580 5600 5680 5700 5780 5800 5880 5900
    5980 5a00 5a80 5b00 5b80 5c00 5c80 5d00 5d80 5e00 5e80 5f00 7e00"""
NAMES = {F8_E4M3: "float8_e4m3fn", F8_E5M2: "float8_e5m2", F8_E8M0: "float8_e8m0fnu"}


def same_numbers(found, wanted):
    assert found.dtype == np.float32
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    there = ~np.isnan(wanted)
    assert np.array_equal(found[there].view(np.uint32), wanted.astype(np.float32)[there].view(np.uint32))


def test_every_code_of_e4m3():
    positive = np.array([int(word, 16) for word in E4M3.split()], "<u2").view("<f2").astype(np.float32)
    same_numbers(as_float(CODES.view(F8_E4M3)), np.concatenate([positive, -positive]))


def test_every_code_of_e5m2_is_the_upper_half_of_a_float16():
    same_numbers(as_float(CODES.view(F8_E5M2)), (CODES.astype("<u2") << 8).view("<f2").astype(np.float32))


def test_every_code_of_e8m0_is_a_power_of_two():
    same_numbers(as_float(CODES.view(F8_E8M0)), np.array([2.0 ** (code - 127) for code in range(255)] + [np.nan]))


def test_files_are_those_of_the_safetensors_library_and_read_again():
    tensors = {"a": CODES.view(F8_E5M2).reshape(16, 16), "b": CODES[:6].view(F8_E4M3).reshape(2, 3),
               "c": CODES[:2].view(F8_E8M0), "i8": np.arange(3, dtype=np.int8), "u8": CODES,
               "h": np.ones(2, np.float16)}
    specs = {name: TensorSpec(dtype=NAMES.get(value.dtype, value.dtype.name), shape=value.shape,
                              data_ptr=value.ctypes.data, data_len=value.nbytes) for name, value in tensors.items()}
    assert to_bytes(tensors) == bytes(serialize(specs, {"format": "pt"}))
    Path("x.safetensors").write_bytes(to_bytes(tensors))
    found = read_tensors(Path("x.safetensors"))
    assert all(same(found[name], value) for name, value in tensors.items())
    assert [type_name(found[name].dtype) for name in "abc"] == ["F8_E5M2", "F8_E4M3", "F8_E8M0"]


def eight_bits(dtype=F8_E4M3):
    tensors = {A: CODES[8:24].view(dtype).reshape(2, 8), B: CODES[8:20].view(dtype).reshape(6, 2)}
    return AdapterState("lora", {"q": LayerState(tensors, {"lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.0})})


@pytest.mark.parametrize("dtype", FLOAT8[:2], ids=["E4M3", "E5M2"])
def test_factors_are_copied_but_not_used(dtype):
    source, base = Path("a.safetensors"), Path("base.safetensors")
    adapters.write_files(adapters.to_files(eight_bits(dtype), "kohya", source))
    base.write_bytes(to_bytes({"q.weight": np.ones((6, 8), np.float32)}))
    convert(source, Path("adapter"), "peft", base=base)
    found = adapters.read_adapter(Path("adapter")).state
    wanted = eight_bits(dtype).layers["q"].tensors
    assert all(same(found.layers["q"].tensors[name], value) for name, value in wanted.items())
    with pytest.raises(ValueError, match=f"q.{A} is of type {type_name(dtype)}, an 8 bit float, and the scale"):
        in_float32(found, "adapter")
    with pytest.raises(ValueError, match=f"q.{B} is of type {type_name(dtype)}, an 8 bit float, and the scale"):
        merge(base, Path("adapter"), Path("out"), quiet=True)
    assert not Path("out").exists() and kohya.encode(found)[0]["lora_unet_q.lora_up.weight"].dtype == dtype


def test_a_base_is_copied_where_it_is_8_bit_and_merged_where_it_is_not():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 8)).astype(np.float32)
    base = {"q.weight": weight, "k.weight": CODES[:48].view(F8_E4M3).reshape(6, 8),
            "k.weight_scale": np.ones(1, np.float32)}
    Path("base.safetensors").write_bytes(to_bytes(base))
    a, b = rng.standard_normal((2, 8)).astype(np.float32), rng.standard_normal((6, 2)).astype(np.float32)
    state = AdapterState("lora", {"q": LayerState({A: a, B: b}, {"lora_rank": 2, "lora_alpha": 4})})
    adapters.write_files(adapters.to_files(state, "kohya", Path("a.safetensors")))
    assert merge(Path("base.safetensors"), Path("a.safetensors"), Path("out"), quiet=True).changed == ("q.weight",)
    found = read_tensors(Path("out/base.safetensors"))
    np.testing.assert_allclose(found["q.weight"], weight + 2 * b.astype(np.float64) @ a, rtol=1e-6, atol=1e-6)
    assert same(found["k.weight"], base["k.weight"]) and same(found["k.weight_scale"], base["k.weight_scale"])
