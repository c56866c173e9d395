"""LoRADense on few, many and unknown rows: values and gradients beside the reference, and recomputed."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import reference
from mindspore import Tensor, nn, ops
from nets import TOLERANCE, numbers, randomise

from mindpet_lite.delta import LoRADense


class Weighted(nn.Cell):
    """sum(layer(x) · upstream): its gradient by the layer's output is `upstream`."""

    def __init__(self, layer: nn.Cell, upstream: np.ndarray) -> None:
        super().__init__()
        self.layer, self.upstream = layer, Tensor(upstream)

    def construct(self, x):
        return (self.layer(x) * self.upstream).sum()


def make(rng: np.random.Generator, **settings) -> LoRADense:
    layer = LoRADense(6, 5, 2, 6, **settings)
    randomise(layer, int(rng.integers(100)))
    return layer


def values_of(layer: LoRADense) -> tuple:
    return (numbers(layer.weight), numbers(layer.bias) if layer.has_bias else None,
            numbers(layer.mindpet_delta_lora_a), numbers(layer.mindpet_delta_lora_b))


@pytest.mark.parametrize("settings", [{}, {"activation": "relu"}, {"has_bias": False, "use_rslora": True}], ids=str)
@pytest.mark.parametrize("shape", [(40, 6), (2, 20, 6), (2, 6)], ids=["rows", "batch", "few rows"])
def test_output_and_every_gradient_equal_the_reference(mode, shape, settings):
    rng = np.random.default_rng(3)
    layer = make(rng, **settings)
    scale, activation = float(layer.scaling.asnumpy()), settings.get("activation")
    x = rng.standard_normal(shape).astype(np.float32)
    upstream = rng.standard_normal((*shape[:-1], 5)).astype(np.float32)
    np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), reference.forward(x, *values_of(layer), scale, activation),
                               **TOLERANCE[ms.float32])
    # The weight trains too: nothing in the layer takes it for frozen.
    names = ["weight", *(["bias"] if layer.has_bias else []), "mindpet_delta_lora_a", "mindpet_delta_lora_b"]
    found = ops.grad(Weighted(layer, upstream), 0, [getattr(layer, name) for name in names])(Tensor(x))
    wanted = reference.gradients(x, *values_of(layer), scale, upstream, activation)
    for name, value in zip(["x", *names], [found[0], *found[1]]):
        np.testing.assert_allclose(value.asnumpy(), wanted[name.removeprefix("mindpet_delta_lora_")],
                                   **TOLERANCE[ms.float32], err_msg=name)


def test_many_rows_at_the_start_equal_the_plain_layer_bit_for_bit(mode):
    plain = nn.Dense(6, 5)
    layer = LoRADense.from_dense(plain, 2, 6)
    x = Tensor(np.random.default_rng(4).standard_normal((64, 6)), ms.float32)
    np.testing.assert_array_equal(layer(x).asnumpy(), plain(x).asnumpy())


def test_the_strength_stays_live_without_a_second_compile(graph_mode):
    rng = np.random.default_rng(5)
    layer = make(rng)
    x = rng.standard_normal((64, 6)).astype(np.float32)
    for strength in (1.0, 0.25, 0.0):
        layer.strength = strength
        layer.refresh()
        np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), reference.forward(
            x, *values_of(layer), 3 * strength), **TOLERANCE[ms.float32])
    assert len(layer.compile_cache) == 1


def test_rows_that_are_not_known_when_the_graph_is_made(graph_mode):
    rng = np.random.default_rng(7)
    layer = make(rng)
    layer.set_inputs(Tensor(shape=[None, 6], dtype=ms.float32))
    for rows in (2, 64):
        x = rng.standard_normal((rows, 6)).astype(np.float32)
        np.testing.assert_allclose(layer(Tensor(x)).asnumpy(), reference.forward(x, *values_of(layer), 3),
                                   **TOLERANCE[ms.float32])


def test_recomputed_gradients_are_the_same(graph_mode):
    rng = np.random.default_rng(8)
    layer = make(rng)
    x, upstream = Tensor(rng.standard_normal((64, 6)), ms.float32), rng.standard_normal((64, 5)).astype(np.float32)
    plain = ops.grad(Weighted(layer, upstream), 0, layer.trainable_params())(x)
    layer.recompute()
    again = ops.grad(Weighted(layer, upstream), 0, layer.trainable_params())(x)
    for one, other in zip([plain[0], *plain[1]], [again[0], *again[1]]):
        np.testing.assert_array_equal(one.asnumpy(), other.asnumpy())
