"""Clipping by the global norm against Pascanu et al.'s formula in float64."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import mindpet_lite as mp


class Clip(nn.Cell):
    def __init__(self, max_norm):
        super().__init__()
        self.max_norm = max_norm

    def construct(self, *gradients):
        return mp.clip_global_norm(gradients, self.max_norm)


def reference(gradients, max_norm):
    values = [item.astype(np.float64) for item in gradients]
    norm = np.sqrt(sum(np.square(item).sum() for item in values))
    return [item * (max_norm / norm if norm >= max_norm else 1.0) for item in values], norm


def arrays(scale=1.0, dtypes=(np.float32, np.float32, np.float32)):
    rng = np.random.default_rng(0)
    return [(scale * rng.standard_normal(shape)).astype(dtype)
            for shape, dtype in zip(((3, 4), (5,), (2, 1, 3)), dtypes)]


@pytest.mark.parametrize(("max_norm", "scale"), [(1.0, 1.0), (0.05, 1e4), (1e-8, 1e-4)])
def test_every_element(mode, max_norm, scale):
    gradients = arrays(scale)
    clipped, norm = Clip(max_norm)(*map(Tensor, gradients))
    expected, expected_norm = reference(gradients, max_norm)
    np.testing.assert_allclose(norm.asnumpy(), expected_norm, rtol=1e-6)
    for one, other in zip(clipped, expected):
        assert one.dtype == ms.float32
        np.testing.assert_allclose(one.asnumpy(), other, rtol=2e-6, atol=0)


def test_below_the_norm_nothing_changes(mode):
    gradients = arrays(1.0, (np.float16, np.float32, np.float16))
    norm = float(reference(gradients, 1.0)[1])
    clipped, _ = Clip(norm * 1.001)(*map(Tensor, gradients))
    for one, other in zip(clipped, gradients):
        assert one.asnumpy().dtype == other.dtype and one.asnumpy().tobytes() == other.tobytes()


def test_float16_in_float32(mode):
    """Squares of 300 overflow float16, and the factor is below its smallest number."""
    gradients = [np.full((40, 50), 6e4, np.float16), np.array([1e4], np.float16)]
    clipped, norm = Clip(1e-2)(*map(Tensor, gradients))
    expected, expected_norm = reference(gradients, 1e-2)
    np.testing.assert_allclose(norm.asnumpy(), expected_norm, rtol=1e-6)
    for one, other in zip(clipped, expected):
        np.testing.assert_allclose(one.asnumpy(), other, rtol=5e-3)


def test_zeros_one_tensor_and_what_is_not_finite(mode):
    clip = Clip(1.0)
    zero, norm = clip(Tensor(np.zeros((2, 2), np.float32)))
    assert not zero[0].asnumpy().any() and norm.asnumpy() == 0
    (infinite, other), norm = Clip(1.0)(Tensor(np.array([np.inf, 1], np.float32)), Tensor(np.ones(2, np.float32)))
    assert np.isinf(norm.asnumpy()) and np.isnan(infinite.asnumpy()[0]) and not other.asnumpy().any()
    (one, other), norm = Clip(1.0)(Tensor(np.array([np.nan, 1], np.float32)), Tensor(np.ones(2, np.float32)))
    assert np.isnan(norm.asnumpy()) and np.isnan(one.asnumpy()).all() and np.isnan(other.asnumpy()).all()
