"""Codes that are chosen by what a layer is given: GPTQ, beside the least squares that it stands for."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from nets import unchanged
from test_quantised import KINDS, Net, filled, normal_float_4

import mindpet_lite as mp
from mindpet_lite.formats import quantised

RNG = np.random.default_rng(7)


def given(rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    """Rows in which some inputs are large, and all depend on a few."""
    rng = np.random.default_rng(seed)
    mixed = np.random.default_rng(99).standard_normal((inputs // 4, inputs)) * np.linspace(0.2, 3, inputs)
    return (rng.standard_normal((rows, inputs // 4)) @ mixed + 0.1 * rng.standard_normal((rows, inputs))).astype(
        np.float32)


def scales(kind: str, tensors: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The scale of each number, from what the codes of one make of it."""
    ones = {**tensors, "weight": np.ones_like(tensors["weight"]) if kind != "nf4" else np.full_like(
        tensors["weight"], 0xff)}
    return quantised.dequantise(kind, ones, shape).astype(np.float64)


def least_squares(kind: str, weight: np.ndarray, scale: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """The rounded weight: column by column, each time the columns that are free are the best for those that are not."""
    steps = normal_float_4() if kind == "nf4" else np.arange(-127.0, 128)
    sums = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    order = np.argsort(-np.diag(gram), kind="stable")
    found = np.zeros_like(weight)
    for count, column in enumerate(order):
        fixed, free = order[:count], order[count:]
        lost = (weight - found)[:, fixed]
        best = weight[:, free] + np.linalg.solve(sums[np.ix_(free, free)], sums[np.ix_(free, fixed)] @ lost.T).T
        own = best[:, 0] / scale[:, column]
        found[:, column] = steps[np.abs(own[:, None] - steps).argmin(1)] * scale[:, column]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7, 64), (5, 96), (6, 288)])
def test_codes_are_those_of_the_least_squares(kind, shape):
    weight, rows = (RNG.standard_normal(shape) * 0.02).astype(np.float32), given(400, shape[1])
    gram = rows.T.astype(np.float64) @ rows
    plain = quantised.quantise(kind, weight)
    found = quantised.quantise(kind, weight, gram)
    assert all(np.array_equal(found[name], plain[name]) for name in plain if name not in ("weight", "weight_error"))
    numbers = quantised.dequantise(kind, found, shape)
    wanted = least_squares(kind, weight.astype(np.float64), scales(kind, plain, shape), gram)
    np.testing.assert_allclose(numbers, wanted, atol=1e-6 * np.abs(weight).max())
    error = np.linalg.norm(numbers - weight) / np.linalg.norm(weight)
    np.testing.assert_allclose(found["weight_error"], error, rtol=1e-4)

    def lost(tensors: dict[str, np.ndarray]) -> float:
        return float(np.linalg.norm((quantised.dequantise(kind, tensors, shape) - weight) @ given(400, shape[1], 1).T))

    # On rows that were not there.
    assert lost(found) < 0.7 * lost(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_given_zeros_takes_the_nearest_codes(kind):
    weight = (RNG.standard_normal((4, 64)) * 0.02).astype(np.float32)
    weight[1] = 0
    found = quantised.quantise(kind, weight, np.zeros((64, 64)))
    # nf4's scales are rounded after its codes were chosen by them: a number on a border may take the next code.
    far = quantised.dequantise(kind, found, (4, 64)) != quantised.dequantise(kind, quantised.quantise(kind, weight),
                                                                            (4, 64))
    assert far.mean() <= (0.02 if kind == "nf4" else 0)
    assert not quantised.dequantise(kind, found, (4, 64))[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_net_is_rounded_by_what_its_layers_are_given(kind, mode):
    rng = np.random.default_rng(3)
    batches = [rng.standard_normal((2, 9, 64)).astype(np.float32), rng.standard_normal((1, 30, 64)).astype(np.float32)]
    plain = filled()
    calls = {"one argument": ([Tensor(one) for one in batches], None),
             "a tuple": ([(Tensor(one),) for one in batches], None),
             "by name": ([{"x": Tensor(one)} for one in batches], None),
             "its own": (batches, lambda own, one: own(Tensor(one)))}
    rows = np.concatenate([one.reshape(-1, 64) for one in batches])
    middle = plain.up(Tensor(rows)).asnumpy()
    for name, (data, forward) in calls.items():
        own = filled().set_train(True)
        assert mp.quantize_base(own, kind, batches=data, forward=forward) is own
        assert own.training and own.up.training and ms.get_context("mode") == (
            ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE), name
        for layer, given_rows, weight in ((own.up, rows, plain.up.weight), (own.down, middle, plain.down.weight)):
            wanted = quantised.quantise(kind, weight.asnumpy(), given_rows.T.astype(np.float64) @ given_rows)
            found = {part: getattr(layer, part).asnumpy() for part in wanted}
            # The sums are made in float32, so a number on the border of two codes may fall on either side.
            other = quantised.dequantise(kind, found, weight.shape) != quantised.dequantise(kind, wanted, weight.shape)
            assert other.mean() < 0.02, name
    nearest = mp.quantize_base(filled(), kind)
    x = Tensor(rng.standard_normal((20, 64)).astype(np.float32))
    wanted = plain(x).asnumpy()
    assert np.linalg.norm(own(x).asnumpy() - wanted) < 0.9 * np.linalg.norm(nearest(x).asnumpy() - wanted)


class Shared(nn.Cell):
    """Two layers that are given one tensor, one that is given another, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o, self.idle = (nn.Dense(32, 32, has_bias=False) for _ in range(4))

    def construct(self, x):
        return self.o(self.q(x) * self.k(x))


def test_layers_that_share_their_input_are_rounded_by_all_batches(pynative_mode):
    net = Shared()
    weights = {name: getattr(net, name).weight.asnumpy() for name in ("q", "k", "o")}
    batches = [given(50, 32, seed) for seed in range(3)]
    mp.quantize_base(net, "nf4", ["q", "k", "o"], [Tensor(one) for one in batches])
    rows = np.concatenate(batches).astype(np.float64)
    inner = (rows @ weights["q"].T) * (rows @ weights["k"].T)
    for name, own in (("q", rows), ("k", rows), ("o", inner)):
        wanted = quantised.dequantise("nf4", quantised.quantise("nf4", weights[name], own.T @ own), (32, 32))
        # As above: a number on a border.
        assert (getattr(net, name).weight_numbers() != wanted).mean() < 0.02


class Rows(nn.Cell):
    """Makes rows of what it gets, as some nets do; layers see the batch's shape or rows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = (nn.Dense(32, 32, has_bias=False) for _ in range(2))

    def construct(self, x, attention_mask=None):
        return self.o(self.q(x).reshape(-1, 32))


def test_masked_places_do_not_count(pynative_mode):
    net = Rows()
    weights = {name: getattr(net, name).weight.asnumpy() for name in ("q", "o")}
    batches = [given(10, 32, seed).reshape(2, 5, 32) for seed in range(3)]
    masks = [np.arange(5)[None, :] < np.array([[5], [seed]]) for seed in range(3)]
    mp.quantize_base(net, "nf4", ["q", "o"], [{"x": Tensor(one), "attention_mask": Tensor(mask.astype(np.int32))}
                                              for one, mask in zip(batches, masks)])
    rows = np.concatenate([one[mask] for one, mask in zip(batches, masks)]).astype(np.float64)
    assert len(rows) == 15 + 0 + 1 + 2
    for name, own in (("q", rows), ("o", rows @ weights["q"].T)):
        wanted = quantised.dequantise("nf4", quantised.quantise("nf4", weights[name], own.T @ own), (32, 32))
        # As above: a number on a border.
        assert (getattr(net, name).weight_numbers() != wanted).mean() < 0.02
    with unchanged(net := Rows()), pytest.raises(ValueError, match=r"q: the mask of the batch has the shape \(2, 4\)"):
        mp.quantize_base(net, "nf4", batches=[{"x": Tensor(batches[0]), "attention_mask": np.ones((2, 4))}],
                         forward=lambda net, batch: net(batch["x"]))


def test_one_tensor_under_two_masks_counts_under_each(pynative_mode):
    net, x = Rows(), Tensor(given(10, 32).reshape(2, 5, 32))
    weight = net.q.weight.asnumpy()
    masks = [np.arange(10).reshape(2, 5) < 3, np.arange(10).reshape(2, 5) >= 8]
    mp.quantize_base(net, "int8", ["q"], [{"x": x, "attention_mask": mask} for mask in masks],
                     lambda net, batch: net(batch["x"]))
    own = x.asnumpy()[masks[0] | masks[1]].astype(np.float64)
    wanted = quantised.dequantise("int8", quantised.quantise("int8", weight, own.T @ own), (32, 32))
    # As above: a number on a border.
    assert (net.q.weight_numbers() != wanted).mean() < 0.02


def test_batches_that_cannot_be_used_are_refused_and_nothing_changes(pynative_mode):
    def refused(net, message, batches, **more):
        with unchanged(net), pytest.raises(ValueError, match=message):
            mp.quantize_base(net, "nf4", batches=batches, **more)

    x = Tensor(np.ones((2, 64), np.float32))
    refused(filled(), "There is no batch", [])
    refused(filled(), "forward runs the net on batches", None, forward=lambda net, one: net(one))
    refused(filled(), "up: it is given NaN or infinite values", [Tensor(np.full((2, 64), np.inf, np.float32))])
    refused(filled(), "down: no batch gave it anything", [x], forward=lambda net, one: net.up(one))
    refused(Shared(), "idle: no batch gave it anything", [Tensor(np.ones((2, 32), np.float32))])
    with nn.utils.no_init_parameters():
        empty = Net()
    with pytest.raises(ValueError, match="up: up.weight has no numbers yet"):
        mp.quantize_base(empty, "nf4", batches=[x])
