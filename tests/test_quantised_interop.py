"""bitsandbytes' NF4 and PEFT's QLoRA on it give our numbers, within the rounding of their float32."""
from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import mindpet_lite as mp
from mindpet_lite.formats.quantised import DYNAMIC, NF4, dequantise, nf4_scales, quantise

MISSING = [name for name in ("torch", "peft", "bitsandbytes") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.interop, pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'mindpet_lite[interop]'")]
SHAPES = {"layer": (96, 64), "square": (256, 256), "large": (512, 384), "uneven": (3, 40)}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bnb")
    rng = np.random.default_rng(0)
    weights = {name: (rng.standard_normal(shape) * 0.02).astype(np.float32) for name, shape in SHAPES.items()}
    np.savez(folder / "weights.npz", **weights)
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("bnb_side.py")),
                           *(str(folder / name) for name in ("weights.npz", "out.npz", "adapter"))],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return weights, dict(np.load(folder / "out.npz")), folder / "adapter"


@pytest.mark.parametrize("name", SHAPES)
def test_codes_scales_and_numbers_are_those_of_bitsandbytes(theirs, name):
    weights, found, _ = theirs
    weight = weights[name]
    np.testing.assert_array_equal(found[f"{name}/values"], NF4)
    np.testing.assert_allclose(found[f"{name}/dynamic"], DYNAMIC, rtol=1e-6, atol=1e-9)
    own = quantise("nf4", weight)
    # Theirs has no bytes for what fills up the last block.
    size = -(-weight.size // 2)
    wrong = own["weight"][:size] != found[f"{name}/codes"][:size]
    assert wrong.mean() <= 1e-3, "a number on the border of two codes falls on either side"
    steps = own["weight_scale"].astype(int) - found[f"{name}/scale"].astype(int)
    assert np.abs(steps).max() <= 1 and (steps != 0).mean() <= 0.01
    np.testing.assert_allclose(own["weight_scale_scale"], found[f"{name}/scale_scale"], rtol=1e-5)
    np.testing.assert_allclose(own["weight_scale_mean"], found[f"{name}/mean"], rtol=1e-6)
    mine = dequantise("nf4", own, weight.shape)
    same = np.abs(mine - found[f"{name}/numbers"]) <= 1e-6 * np.abs(weight).max()
    assert same.mean() > 0.99
    # Elsewhere by one step of a code, or of a scale's.
    assert np.abs(mine - found[f"{name}/numbers"]).max() <= 0.31 * nf4_scales(own).max()


def test_peft_s_qlora_layer_computes_the_same(theirs, mode):
    weights, found, adapter = theirs

    class Net(nn.Cell):
        """The layer below a net."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Dense(64, 96)

        def construct(self, x):
            return self.layer(x)

    net = Net()
    net.layer.weight.set_data(Tensor(weights["layer"]))
    net.layer.bias.set_data(Tensor(np.zeros(96, np.float32)))
    mp.load_adapter(mp.quantize_base(net, "nf4"), adapter)
    factor = Tensor(np.arange(5 * 96, dtype=np.float32).reshape(5, 96))

    def loss(x):
        y = net(x)
        return (y * factor).sum(), y

    (_, y), slope = ms.value_and_grad(loss, 0, None, has_aux=True)(Tensor(found["x"]))
    np.testing.assert_allclose(y.asnumpy(), found["y"], atol=2e-4 * np.abs(found["y"]).max())
    np.testing.assert_allclose(slope.asnumpy(), found["slope"], atol=2e-4 * np.abs(found["slope"]).max())
