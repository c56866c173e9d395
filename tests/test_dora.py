"""DoRA where the squares of a row's weights vanish or overflow: the start is the base, and nothing is NaN."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from nets import MERGED, inputs, numbers, randomise
from safetensors.numpy import save_file

import mindpet_lite as mp
from mindpet_lite.offline.changes import LowRank

DORA = {"lora_rank": 2, "lora_alpha": 4, "use_dora": True}


def rows(scale: float, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((6, width)) * scale


def with_first_row(factor: float, scale: float = 1.0) -> np.ndarray:
    value = rows(scale)
    value[0] *= factor
    return value


WEIGHTS = {
    "float32, a row of zeros": (with_first_row(0), ms.float32),
    "float32, all zeros": (np.zeros((6, 8)), ms.float32),
    "float32, a row of 1e-23": (with_first_row(1e-23), ms.float32),
    "float16, a row of zeros": (with_first_row(0), ms.float16),
    "float16, a row of 2e-5": (with_first_row(1e-3, 0.02), ms.float16),
    "float16, weights of 0.001": (rows(0.001), ms.float16),
    "float16, norms of 300": (rows(120), ms.float16),
    "float16, 4096 inputs": (rows(0.02, 4096), ms.float16),
}


def net_of(weight: np.ndarray, dtype) -> nn.SequentialCell:
    dense = nn.Dense(weight.shape[1], weight.shape[0], has_bias=False, dtype=dtype)
    dense.weight.set_data(Tensor(weight.astype(np.float32)).astype(dtype))
    return nn.SequentialCell(dense)


class Distance(nn.Cell):
    """The mean distance from 1 in float32: squares of such outputs leave float16 by themselves."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__()
        self.net = net

    def construct(self, x):
        return ops.abs(ops.cast(self.net(x), ms.float32) - 1).mean()


def expected(layer: nn.Cell, x: Tensor) -> np.ndarray:
    """Return the paper's formula in float64; a row of norm 0 keeps its factor 1."""
    whole = numbers(layer.weight) + 2 * numbers(layer.mindpet_delta_lora_b) @ numbers(layer.mindpet_delta_lora_a)
    norm = np.linalg.norm(whole, axis=1)
    magnitude = numbers(layer.mindpet_delta_lora_magnitude)
    factor = np.where(norm == 0, 1, magnitude / np.where(norm == 0, 1, norm))
    return numbers(x) @ (factor[:, None] * whole).T


@pytest.mark.parametrize("name", WEIGHTS)
def test_starts_as_its_base_trains_and_merges_without_nan(name, mode):
    weight, dtype = WEIGHTS[name]
    net, x = net_of(weight, dtype), inputs(3, weight.shape[1], dtype=dtype)
    base = net(x).asnumpy()
    mp.get_pet_model(net, mp.LoraConfig(**DORA, target_modules=["0"], param_init_type=ms.float32))
    assert np.array_equal(net(x).asnumpy(), base)
    np.testing.assert_allclose(numbers(net[0].mindpet_delta_lora_magnitude),
                               np.linalg.norm(numbers(net[0].weight), axis=1), rtol=1e-6)
    step = nn.TrainOneStepCell(Distance(net), nn.Adam(net.trainable_params(), 1e-3)).set_train()
    losses = [float(step(x).asnumpy()) for _ in range(4)]
    assert np.isfinite(losses).all() and all(np.isfinite(item.asnumpy()).all() for item in net.trainable_params())
    assert np.any(net[0].mindpet_delta_lora_b.asnumpy()[0])
    net.set_train(False)
    y = numbers(net(x))
    scale = np.abs(expected(net[0], x)).max() + 1e-30
    np.testing.assert_allclose(y / scale, expected(net[0], x) / scale, rtol=5e-3 if dtype == ms.float16 else 1e-5,
                               atol=2e-3 if dtype == ms.float16 else 1e-6)
    mp.merge(net)
    assert np.isfinite(net[0].weight.asnumpy()).all()
    np.testing.assert_allclose(numbers(net(x)) / scale, y / scale, **MERGED[dtype])


@pytest.mark.parametrize("make, x", [
    (lambda: nn.Conv2d(2, 3, 3, weight_init="zeros", has_bias=True), inputs(1, 2, 5, 5)),
    (lambda: nn.Embedding(6, 4, embedding_table="zeros"), Tensor(np.array([1, 3], np.int32)))],
    ids=["convolution", "embedding"])
def test_zeros_in_other_kinds_of_layers(make, x, mode):
    net = nn.SequentialCell(make())
    base = net(x).asnumpy()
    mp.get_pet_model(net, mp.LoraConfig(**DORA, target_modules=["0"]))
    assert np.array_equal(net(x).asnumpy(), base)
    randomise(net)
    y = net(x).asnumpy()
    assert np.isfinite(y).all()
    mp.merge(net)
    np.testing.assert_allclose(net(x).asnumpy(), y, **MERGED[ms.float32])


@pytest.mark.parametrize("in_rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("factor", [0, 1e-23])
def test_files_are_merged_by_the_same_rule(factor, in_rows):
    weight = with_first_row(factor).astype(np.float32)
    magnitude = np.linalg.norm(weight.astype(np.float64), axis=1).astype(np.float32)
    merged = weight.copy() if in_rows else weight.T.copy()
    change = LowRank(np.zeros((len(merged), 2), np.float32), np.zeros((2, merged.shape[1]), np.float32), magnitude,
                     in_rows)
    change.start(lambda: merged.copy())(merged, 0)
    np.testing.assert_allclose(merged if in_rows else merged.T, weight, rtol=1e-6)


def test_a_zero_row_goes_through_a_file(tmp_path, graph_mode):
    net = mp.get_pet_model(net_of(with_first_row(0), ms.float32), mp.LoraConfig(**DORA, target_modules=["0"]))
    net[0].mindpet_delta_lora_b.set_data(Tensor(np.arange(12).reshape(6, 2) * np.array([[0]] + [[1]] * 5), ms.float32))
    save_file({"0.weight": net[0].weight.asnumpy()}, tmp_path / "base.safetensors")
    mp.save_adapter(net, tmp_path / "adapter")
    fresh = mp.load_adapter(net_of(with_first_row(0), ms.float32), tmp_path / "adapter")
    assert np.array_equal(fresh(inputs(3, 8)).asnumpy(), net(inputs(3, 8)).asnumpy())
    assert not np.any(net(inputs(3, 8)).asnumpy()[:, 0])


def test_the_magnitudes_gradient_in_float16_is_finite(mode):
    """Sums of products over many rows, of which float16 holds the result and not the way to it."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((4, 64)) * 500).astype(np.float16)
    layer = nn.Dense(64, 4, has_bias=False, dtype=ms.float16)
    layer.weight.set_data(Tensor(weight))
    net = nn.SequentialCell(layer)
    mp.get_pet_model(net, mp.LoraConfig(lora_rank=2, lora_alpha=4, target_modules=["0"], use_dora=True))
    x = rng.standard_normal((64, 64)).astype(np.float16) / 8
    slopes = (rng.standard_normal((64, 4)) * 60).astype(np.float16)
    magnitude = net[0].mindpet_delta_lora_magnitude

    def loss(x):
        return (net(x).astype(ms.float32) * Tensor(slopes.astype(np.float32))).sum()

    found = ms.grad(loss, None, [magnitude])(Tensor(x))[0].asnumpy().reshape(-1)
    rows = weight.astype(np.float64)
    wanted = (slopes.astype(np.float64) * (x.astype(np.float64) @ rows.T)).sum(0) / np.linalg.norm(rows, axis=1)
    # The layer's own output is rounded to float16 before.
    np.testing.assert_allclose(found, wanted, rtol=5e-3, atol=5e-2)
