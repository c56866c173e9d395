"""Dropout in recomputed blocks: the backward pass has the masks of the forward pass, and these are dropout's."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from nets import config

import mindpet_lite as mp

WIDTH = 16


class Masks(nn.Cell):
    """A block whose output is its masks: ours and the base's own. Each runs twice, as a shared layer does."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.layer = nn.Dense(WIDTH, WIDTH, has_bias=False, weight_init="zeros")
        self.drop = nn.Dropout(p=rate)

    def construct(self, x):
        return self.layer(x), self.layer(x), self.drop(x), self.drop(x)


class Blocks(nn.Cell):
    """Several blocks, the first of which is called twice."""

    def __init__(self, layers: int, rate: float) -> None:
        super().__init__()
        self.blocks = nn.CellList([Masks(rate) for _ in range(layers)])
        self.order = [*self.blocks, self.blocks[0]]

    def construct(self, x):
        found = []
        for block in self.order:
            a, b, c, d = block(x)
            found += [a, b, c, d]
        return ops.stack(found)


def build(layers: int, rate: float, dtype: ms.dtype = ms.float32, after: bool = False) -> nn.Cell:
    """Return a recomputed net that gives its masks: A and B are the unit matrix, the weight is 0."""
    net = Blocks(layers, rate)
    if not after:
        mp.net_recompute(net, r"blocks\.\d+")
    mp.get_pet_model(net, config(["layer"], lora_rank=WIDTH, lora_alpha=WIDTH, lora_dropout=rate,
                                 param_init_type=dtype))
    if after:
        mp.net_recompute(net, r"blocks\.\d+")
    for parameter in net.trainable_params():
        parameter.set_data(Tensor(np.eye(WIDTH), dtype))
    return net.set_train()


def masks(net: nn.Cell, calls: int, dtype: ms.dtype = ms.float32) -> tuple[np.ndarray, np.ndarray]:
    """Return of each call the masks of the forward pass (calls, blocks, of a block, width) and what the backward saw.

    The gradient of the block's input is the sum of its masks, that of B the sum of our two.
    """
    count = len(net.order)

    def loss(x):
        given = net(x)
        return given.sum(), given

    chosen = ms.ParameterTuple([block.layer.mindpet_delta_lora_b for block in net.blocks])
    step = ms.value_and_grad(loss, 0, chosen, has_aux=True)
    ones = Tensor(np.ones((1, WIDTH)), dtype)
    forward, backward = [], []
    for _ in range(calls):
        (_, given), (inputs, factors) = step(ones)
        given = given.astype(ms.float32).asnumpy().reshape(count, 4, WIDTH)
        forward.append(given)
        wanted = given[:-1, :2].sum(axis=1)
        wanted[0] += given[-1, :2].sum(axis=0)
        backward.append([np.abs(inputs.astype(ms.float32).asnumpy()[0] - given.sum(axis=(0, 1))).max(),
                         *(np.abs(factor.astype(ms.float32).asnumpy()[0] - want).max()
                           for factor, want in zip(factors, wanted))])
    return np.array(forward), np.array(backward)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_the_backward_pass_has_the_masks_of_the_forward_pass(mode, after):
    layers = 16 if mode == "graph" else 3
    forward, differences = masks(build(layers, 0.5, after=after), calls=30)
    assert differences.max() < 1e-4
    assert set(np.unique(forward)) == {0, 2}


def test_what_is_dropped_is_p_of_it_and_other_each_time(mode):
    layers, calls, rate = 3, 40, 0.3
    forward, differences = masks(build(layers, rate), calls)
    assert differences.max() < 1e-4
    dropped = forward == 0
    # Five standard deviations of the mean.
    bound = 5 * np.sqrt(rate * (1 - rate) / dropped.size)
    assert abs(dropped.mean() - rate) < bound
    # Of two masks that know nothing of one another the share that differs is 2 p (1 - p).
    # (A graph gives the calls of one dropout cell in one step the same mask, recomputed or not.)
    for one, other in ((dropped[1:], dropped[:-1]), (dropped[:, 1:layers], dropped[:, :layers - 1]),
                       (dropped[:, :, 2], dropped[:, :, 1]), (dropped[..., 1:], dropped[..., :-1])):
        share = (one != other).mean()
        assert abs(share - 2 * rate * (1 - rate)) < 5 / np.sqrt(one.size)


def test_in_float16(mode):
    _, differences = masks(build(2, 0.5, ms.float16), 10, ms.float16)
    assert differences.max() == 0


def test_a_compiled_step_in_pynative(pynative_mode):
    net = build(6, 0.5)

    @ms.jit
    def given(x):
        return net(x)

    assert set(np.unique(given(Tensor(np.ones((1, WIDTH)), ms.float32)).asnumpy())) == {0, 2}


def test_calls_without_a_backward_pass_between(mode):
    net = build(2, 0.5)
    ones = Tensor(np.ones((1, WIDTH)), ms.float32)
    for _ in range(3):
        net(ones)
        _, differences = masks(net, 2)
        assert differences.max() < 1e-4
    net.set_train(False)
    assert set(np.unique(net(ones).asnumpy())) == {1}


def test_undo_puts_the_plain_operator_back():
    net = build(1, 0.5)
    block = net.blocks[0]
    kept = (block.drop.dropout, block.layer.lora_dropout.dropout)
    assert all(item.attrs["recompute"] is False for item in kept)
    mp.undo_recompute(net)
    # The one of the delta is always its own.
    assert block.layer.lora_dropout.dropout is kept[1]
    for cell, old in ((block.drop, kept[0]),):
        assert type(cell.dropout) is ops.Dropout
        assert "recompute" not in cell.dropout.attrs
        assert (cell.dropout.keep_prob, cell.dropout.Seed0) == (old.keep_prob, old.Seed0)


def test_a_dropout_that_draws_anew_is_warned_of():
    net = nn.SequentialCell(nn.SequentialCell(nn.Dense(4, 4), nn.Dropout2d(p=0.5)))
    with pytest.warns(UserWarning, match=r"^0\.1 \(Dropout2d\) may draw another mask .* use nn.Dropout"):
        mp.net_recompute(net, "0")


class Functional(nn.Cell):
    def construct(self, x):
        return ops.dropout(x, 0.5, self.training)


class Block(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.draw, self.dropout = Functional(), nn.Dropout(p=0.5)

    def construct(self, x):
        return self.dropout(self.draw(x))


def test_a_function_that_draws_is_warned_of():
    with pytest.warns(UserWarning, match=r"^blocks.0.draw \(ops.dropout\) may draw another mask"):
        net = nn.Cell()
        net.blocks = nn.CellList([Block()])
        mp.net_recompute(net, r"blocks\.\d+")


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_mindspores_own_recompute(before, mode):
    net = Blocks(2, 0.5)
    for block in net.blocks if before else ():
        block.recompute()
    mp.get_pet_model(net, config(["layer"], lora_rank=WIDTH, lora_alpha=WIDTH, lora_dropout=0.5))
    for block in () if before else net.blocks:
        block.recompute()
    for parameter in net.trainable_params():
        parameter.set_data(Tensor(np.eye(WIDTH), ms.float32))
    net.set_train()

    def ours(x):
        # The delta's masks alone: the base's own dropout is MindSpore's.
        return net(x)[:2].sum()

    x = Tensor(np.ones((1, WIDTH)), ms.float32)
    step = ms.value_and_grad(ours, 0)
    if mode == "pynative" and not before:
        with pytest.raises(RuntimeError, match=r"net_recompute\(net, pattern\) instead, which keeps the masks"):
            step(x)
        return
    for _ in range(4):
        value, gradient = step(x)
        # Of ones and unit matrices, the sum of the masks is the sum of their gradients.
        np.testing.assert_allclose(gradient.asnumpy().sum(), value.asnumpy(), rtol=1e-6)
