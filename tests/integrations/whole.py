"""What every library's model goes through: adapt, train, save, load, switch off, merge and take back."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

import mindpet_lite as mp
from mindpet_lite.graph.adapters import deltas


class Called(nn.Cell):
    """A net called as its own users call it."""

    def __init__(self, net: nn.Cell, call: Callable) -> None:
        super().__init__(auto_prefix=False)
        self.net, self.call = net, call

    def construct(self, *inputs):
        return self.call(self.net, *inputs)


class Loss(Called):
    """A loss of which every output has a gradient."""

    def construct(self, *inputs):
        y = self.call(self.net, *inputs)
        return ((y - 0.3) ** 2).mean() + (y * y * y).mean()


def fresh(make: Callable[[], nn.Cell]) -> nn.Cell:
    """Return the net with the same values every time, in evaluation."""
    net = make().set_train(False)
    for place, item in enumerate(net.get_parameters()):
        value = np.random.default_rng(place).standard_normal(item.shape) * 0.1
        # Norms' weights, and running variances, stay near 1.
        item.set_data(Tensor((value * (item.ndim > 1) + (item.ndim == 1) * (1 + 0 * value)).astype(np.float32)))
    return net


def go_through(make: Callable[[], nn.Cell], call: Callable, inputs: tuple, config: Any, folder: Path, count: int,
               moves: float = 1e-4, bound: float = 1e-4) -> None:
    """Assert the laws of an adapted net; `count` layers are adapted.

    Args:
        make: makes the library's net.
        call: calls it: (net, *inputs) -> Tensor.
        inputs: of the call.
        config: of the method.
        folder: for files.
        count: of the layers that it adapts.
        moves: how far three steps of training move the output at least.
        bound: how far a merge may move it, of the largest output.
    """
    net = fresh(make)
    whole = Called(net, call)
    before = whole(*inputs).asnumpy()
    base = [(item, item.name, item.asnumpy().copy()) for item in net.get_parameters()]
    mp.get_pet_model(net, config)
    assert len(deltas(net)) == count
    assert np.array_equal(whole(*inputs).asnumpy(), before), "starts as its base"
    step = nn.TrainOneStepCell(Loss(net, call), nn.Adam(net.trainable_params(), 1e-2)).set_train(False)
    losses = [float(step(*inputs).asnumpy()) for _ in range(3)]
    assert losses[-1] < losses[0]
    own = {id(item) for delta in deltas(net).values() for item in delta.delta_parameters().values()}
    assert {id(item) for item in net.trainable_params()} == own
    assert all(np.array_equal(item.asnumpy(), value) for item, _, value in base), "only what was added trains"
    y = whole(*inputs).asnumpy()
    assert np.abs(y - before).max() > moves
    mp.save_adapter(net, folder / "adapter")
    assert np.array_equal(Called(mp.load_adapter(fresh(make), folder / "adapter"), call)(*inputs).asnumpy(), y)
    with mp.adapters_disabled(net):
        assert np.array_equal(whole(*inputs).asnumpy(), before)
    mp.merge(net)
    np.testing.assert_allclose(whole(*inputs).asnumpy(), y, rtol=0, atol=bound * np.abs(y).max())
    assert [item.name for item in net.get_parameters()] == [name for _, name, _ in base]
    mp.unmerge(net)
    assert np.array_equal(whole(*inputs).asnumpy(), y)
    assert all(np.array_equal(item.asnumpy(), value) for item, _, value in base)


def pictures(*shape: int) -> Tensor:
    return Tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def tokens(*shape: int) -> Tensor:
    return Tensor(np.random.default_rng(0).integers(1, 90, shape), ms.int32)
