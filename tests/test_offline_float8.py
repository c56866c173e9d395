"""Bases in float8: every code, copied as it is, merged with its scale, refused where that is missing."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from offline_bases import A, B, lora, write_adapter

from mindpet_lite.formats.files import BF16, read_tensors, to_bytes
from mindpet_lite.formats.float8 import F8_E4M3, F8_E5M2, F8_E8M0, float8_values
from mindpet_lite.formats.state import AdapterState
from mindpet_lite.offline.float8 import encode
from mindpet_lite.offline.merge import merge
from mindpet_lite.offline.numbers import rounded, widened

Q, K = "layers.0.q", "layers.0.k"


@pytest.mark.parametrize("dtype, exponents, bias", [(F8_E4M3, 4, 7), (F8_E5M2, 5, 15)])
def test_every_code(dtype, exponents, bias):
    digits = 7 - exponents
    for code, found in enumerate(float8_values(dtype)):
        bits = f"{code:08b}"
        exponent, fraction = int(bits[1:1 + exponents], 2), int(bits[1 + exponents:], 2) / 2 ** digits
        wanted = 2.0 ** (exponent - bias) * (1 + fraction) if exponent else 2.0 ** (1 - bias) * fraction
        if dtype == F8_E4M3 and code & 127 == 127 or dtype == F8_E5M2 and exponent == 31:
            assert np.isnan(found) or dtype == F8_E5M2 and not fraction and np.isinf(found)
            continue
        assert found == (-wanted if code > 127 else wanted) and np.signbit(found) == (code > 127)
        assert encode(np.array([[found]]), dtype).view(np.uint8)[0, 0] == code
    assert np.nanmax(float8_values(dtype)[np.isfinite(float8_values(dtype))]) == (448 if dtype == F8_E4M3 else 57344)


def test_float16_is_the_reference_of_e5m2():
    codes = np.arange(256, dtype=np.uint8)
    wanted = (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    assert np.array_equal(float8_values(F8_E5M2), wanted, equal_nan=True)


@pytest.mark.parametrize("dtype", [F8_E4M3, F8_E5M2])
def test_rounding_is_to_the_nearest_and_ties_to_even(dtype):
    numbers = float8_values(dtype)[np.isfinite(float8_values(dtype))].astype(np.float64)
    values = np.concatenate([np.random.default_rng(0).standard_normal(2000) * 10.0 ** np.linspace(-6, 2, 2000),
                             (np.sort(numbers)[1:] + np.sort(numbers)[:-1]) / 2, [1e9, -1e9]]).astype(np.float32)
    codes = encode(values[None], dtype)[0]
    error = np.abs(widened(codes).astype(np.float64) - values)
    distance = np.abs(values[:, None].astype(np.float64) - numbers)
    assert np.array_equal(error, distance.min(1))
    tied = (distance == distance.min(1)[:, None]).sum(1) > 1
    assert tied.any() and not (codes[tied & (values != 0)].view(np.uint8) % 2).any()


def write_base(scale: dict[str, np.ndarray], config: dict | None = None, shape=(8, 8), dtype=F8_E4M3) -> None:
    rng = np.random.default_rng(0)
    Path("base").mkdir(exist_ok=True)
    tensors = {f"{Q}.weight": encode(rng.standard_normal(shape).astype(np.float32) * 100, dtype),
               f"{K}.weight": rounded(rng.standard_normal((8, 8)).astype(np.float32), BF16), **scale}
    Path("base/model.safetensors").write_bytes(to_bytes(tensors))
    Path("base/config.json").write_text(json.dumps(config or {}))


def merged(state: AdapterState, out: str = "out") -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    done = merge(Path("base"), write_adapter(Path("adapter"), state), Path(out), quiet=True)
    return read_tensors(Path(out, "model.safetensors")), done.changed


def test_copied_where_only_copied():
    write_base({}, {"quantization_config": {"quant_method": "fp8"}})
    before = read_tensors(Path("base/model.safetensors"))
    after, changed = merged(lora({K: (8, 8)}))
    assert changed == (f"{K}.weight",) and after[f"{Q}.weight"].tobytes() == before[f"{Q}.weight"].tobytes()


def blocks(rows: int, columns: int, size: int) -> np.ndarray:
    exponents = np.random.default_rng(1).integers(-12, -8, (-(-rows // size), -(-columns // size)))
    return np.exp2(exponents).astype(np.float32)


CASES = {
    "DeepSeek's blocks": ((200, 130), {"weight_scale_inv": blocks(200, 130, 128)}, {}),
    "blocks of 4 by the config": ((10, 6), {"weight_scale_inv": blocks(10, 6, 4)}, {"text_config": {
        "quantization_config": {"weight_block_size": [4, 4]}}}),
    "one for the tensor": ((8, 8), {"weight_scale": np.array(0.01, np.float32)}, {}),
    "one for each row": ((8, 6), {"weight_scale": rounded(np.linspace(0.01, 1, 8)[:, None], BF16)}, {}),
    "powers of two": ((8, 8), {"weight_scale": np.full((1, 1), 120, np.uint8).view(F8_E8M0)}, {}),
}


@pytest.mark.parametrize("alpha", [0.03, 30000], ids=["the scale is kept", "the scale grows"])
@pytest.mark.parametrize("dtype", [F8_E4M3, F8_E5M2], ids=["E4M3", "E5M2"])
@pytest.mark.parametrize("case", CASES)
def test_merged_with_the_scale(case, dtype, alpha):
    shape, scale, config = CASES[case]
    write_base({f"{Q}.{name}": value for name, value in scale.items()}, config, shape, dtype)
    before = read_tensors(Path("base/model.safetensors"))
    (name, _), = scale.items()

    def values(tensors):
        factor = widened(tensors[f"{Q}.{name}"]).astype(np.float64)
        if factor.ndim == 2 and factor.size > 1 and factor.shape[1:] != (1,) or "block" in case:
            size = 4 if config else 128
            factor = np.repeat(np.repeat(factor, size, 0), size, 1)[:shape[0], :shape[1]]
        return widened(tensors[f"{Q}.weight"]) * factor, np.broadcast_to(factor, shape)

    state = lora({Q: shape}, alpha=alpha)
    layer = state.layers[Q].tensors
    wanted = values(before)[0] + alpha / 3 * layer[B].astype(np.float64) @ layer[A]
    with pytest.warns(UserWarning, match="float8, and what they become is rounded to it again"):
        after, changed = merged(state)
    found, factor = values(after)
    # Half the distance between neighbours, and that of the smallest numbers.
    half, least = (2 ** -4, 2 ** -10) if dtype == F8_E4M3 else (2 ** -3, 2 ** -17)
    assert np.all(np.abs(found - wanted) <= np.abs(wanted) * half * 1.001 + least * factor * 1.001)
    old = values(before)[1]
    grown = f"{Q}.{name}" in changed
    assert grown == bool((factor != old).any()) and np.all(np.log2(factor / old) % 1 == 0)
    assert dtype == F8_E5M2 or grown == (alpha > 1)
    assert after[f"{K}.weight"].tobytes() == before[f"{K}.weight"].tobytes()


def test_dora_and_values_that_trained():
    write_base({f"{Q}.weight_scale": np.ones((), np.float32)})
    before = widened(read_tensors(Path("base/model.safetensors"))[f"{Q}.weight"])
    state = lora({Q: (8, 8)}, use_dora=True)
    layer, size = state.layers[Q].tensors, np.linspace(100, 200, 8, dtype=np.float32)
    layer["mindpet_delta_lora_magnitude"] = size
    wanted = before + 5 / 3 * layer[B] @ layer[A]
    wanted *= (size / np.linalg.norm(wanted, axis=1))[:, None]
    with pytest.warns(UserWarning, match="float8"):
        after, _ = merged(state)
    assert np.all(np.abs(widened(after[f"{Q}.weight"]) - wanted) <= np.abs(wanted) * 2 ** -4 * 1.001 + 2 ** -10)
    value = np.full((8, 8), 2000, np.float32)
    with pytest.warns(UserWarning, match="float8"):
        after, _ = merged(AdapterState("lora", lora({K: (8, 8)}).layers, {f"{Q}.weight": value}), "other")
    assert after[f"{Q}.weight_scale"] == 8 and np.array_equal(
        widened(after[f"{Q}.weight"]) * 8, widened(encode(value / 8, F8_E4M3)) * 8)


@pytest.mark.parametrize("scale, message", [
    ({}, rf"{Q}.weight is F8_E4M3, and its scale is not in the base"),
    ({"weight_scale_2": np.ones((), np.float32), "input_scale": np.ones((), np.float32)},
     rf"its scale is not in the base .*only {Q}.input_scale, {Q}.weight_scale_2"),
    ({"weight_scale": np.ones((3, 2), np.float32)}, r"shape \(3, 2\) is no scale"),
    ({"weight_scale": np.zeros((), np.float32)}, "must hold positive numbers"),
    ({"weight_scale": np.ones((), np.int32)}, "must hold positive numbers")])
def test_refused_where_the_values_are_not_known(scale, message):
    write_base({f"{Q}.{name}": value for name, value in scale.items()})
    with pytest.raises(ValueError, match=message):
        merged(lora({Q: (8, 8)}))
    assert not Path("out").exists()


def test_a_quantised_config_without_a_quantised_tensor_is_refused():
    Path("base").mkdir()
    Path("base/model.safetensors").write_bytes(to_bytes({f"{K}.weight": np.ones((8, 8), np.float32)}))
    Path("base/config.json").write_text(json.dumps({"text_config": {"quantization_config": {"quant_method": "fp8"}}}))
    with pytest.raises(ValueError, match="quantization_config, though none of its tensors is"):
        merged(lora({K: (8, 8)}))
