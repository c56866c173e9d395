"""Gradient accumulation: n micro-batches are one big batch, in both modes, with loss scaling, clipping and averages."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from nets import Attention, compile_count, config, inputs, load_values, randomise

import mindpet_lite as mp


def adapted(**fields) -> Attention:
    net = mp.get_pet_model(Attention(), config(["to_q", "blocks.1.0"], **fields))
    randomise(net)
    return net


def twins() -> tuple[Attention, Attention]:
    one, other = adapted(), adapted()
    load_values(other, one)
    return one, other


def with_loss(net: nn.Cell) -> nn.Cell:
    return nn.WithLossCell(net, nn.MSELoss())


def values(net: nn.Cell) -> dict[str, np.ndarray]:
    return {item.name: item.asnumpy().copy() for item in net.trainable_params()}


def test_four_micro_batches_are_one_big_batch(mode):
    """Through clipping, a dynamic loss scale, Adam's state, weight decay, LoRA+ rates and averages."""
    big, small = twins()
    x, y = inputs(8, 6), inputs(8, 6, seed=1)
    steps = {}
    for net, count, scaler in ((big, 1, None), (small, 4, ms.amp.DynamicLossScaler(1024.0, 2, 2))):
        optimizer = nn.AdamWeightDecay(mp.lora_plus_groups(net, [0.01, 0.02, 0.03], 4), weight_decay=0.1)
        steps[net] = mp.GradientAccumulation(with_loss(net), optimizer, count, max_norm=0.1, loss_scaler=scaler,
                                             ema=mp.DeltaEMA(net, 0.5))
    for _ in range(3):
        loss = steps[big](x, y)
        parts = [steps[small](x[start:start + 2], y[start:start + 2]) for start in range(0, 8, 2)]
        np.testing.assert_allclose(np.mean([float(part.asnumpy()) for part in parts]), loss.asnumpy(), rtol=1e-5)
    for one, other in zip((*big.trainable_params(), *steps[big].ema.averages),
                          (*small.trainable_params(), *steps[small].ema.averages)):
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), rtol=1e-5, atol=1e-6, err_msg=one.name)
    assert scaler.scale_value.asnumpy() == 2048 and steps[small].ema.updates.asnumpy() == 3


class Product(nn.Cell):
    """The mean of x · w: its gradient by w is the mean of x."""

    def __init__(self, dtype=ms.float32):
        super().__init__()
        self.w = ms.Parameter(Tensor(np.zeros(3, np.float32)).astype(dtype), name="w")
        self.frozen = ms.Parameter(Tensor(np.ones(3, np.float32)), name="frozen", requires_grad=False)

    def construct(self, x):
        return ops.ReduceMean()(ops.ReduceSum()(x * self.w * self.frozen.astype(self.w.dtype), -1))


def test_exact_where_the_numbers_are(mode):
    """Whole numbers and powers of two: not a bit differs from the big batch, and only each fourth call moves."""
    big, small = Product(), Product()
    x = np.random.default_rng(0).integers(-8, 8, (8, 3)).astype(np.float32)
    one = mp.GradientAccumulation(big, nn.SGD(big.trainable_params(), 0.5), 1)
    four = mp.GradientAccumulation(small, nn.SGD(small.trainable_params(), 0.5), 4)
    for turn in range(2):
        one(Tensor(x))
        for index, rows in enumerate(np.split(x, 4)):
            before = small.w.asnumpy().copy()
            four(Tensor(rows))
            assert np.array_equal(small.w.asnumpy(), before) == (index < 3)
            assert four.count.asnumpy() == (index + 1) % 4
        assert small.w.asnumpy().tobytes() == big.w.asnumpy().tobytes()
        assert np.array_equal(small.w.asnumpy(), -0.5 * (turn + 1) * x.mean(0))


def test_float16_sums_are_float32(mode):
    """2048 + 1 is 2048 in float16: sums of that type would lose the small gradients."""
    net = Product(ms.float16)
    step = mp.GradientAccumulation(net, nn.SGD(net.trainable_params(), 1.0), 4)
    assert [item.dtype for item in step.sums] == [ms.float32]
    for value in (2048, 1, 1, 2):
        step(Tensor(np.full((1, 3), value, np.float16)))
    assert net.w.dtype == ms.float16 and np.array_equal(net.w.asnumpy(), np.full(3, -513, np.float16))


def test_an_overflow_skips_its_window_and_halves_the_scale_once(mode):
    net = Product()
    scaler = ms.amp.DynamicLossScaler(1024.0, 2, 100)
    step = mp.GradientAccumulation(net, nn.SGD(net.trainable_params(), 1.0), 2, 100.0, scaler)
    ones, bad = np.ones((1, 3), np.float32), np.full((1, 3), np.inf, np.float32)
    for batch in (bad, bad, ones, bad, bad, -bad):
        step(Tensor(batch))
    assert not net.w.asnumpy().any() and scaler.scale_value.asnumpy() == 128
    assert not step.sums[0].asnumpy().any()
    for _ in range(2):
        loss = step(Tensor(ones))
    assert np.array_equal(net.w.asnumpy(), [-1, -1, -1]) and loss.asnumpy() == 0


def test_only_what_trains_is_accumulated_and_names_stay():
    net = adapted()
    names = [item.name for item in net.get_parameters()]
    step = mp.GradientAccumulation(with_loss(net), nn.Adam(net.trainable_params()), 2)
    assert [item.name for item in step.sums] == [f"accumulated.{item.name}" for item in net.trainable_params()]
    assert not any(item.requires_grad for item in step.sums)
    assert [item.name for item in net.get_parameters()] == names
    plain = mp.GradientAccumulation(with_loss(net), nn.Adam(net.trainable_params()), 1)
    assert not any(item.name.startswith("accumulated") for item in plain.get_parameters())


def test_one_graph_for_all_calls(graph_mode):
    net = adapted()
    step = mp.GradientAccumulation(with_loss(net), nn.Adam(net.trainable_params(), 0.01), 2, 1.0)
    with compile_count() as compiled:
        for _ in range(4):
            step(inputs(2, 6), inputs(2, 6))
    assert len(compiled) == 1


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"steps": 0}, ValueError, "steps"), ({"steps": 2.0}, TypeError, "steps"), ({"steps": True}, TypeError, "steps"),
    ({"max_norm": 0}, ValueError, "max_norm"), ({"max_norm": float("inf")}, ValueError, "max_norm"),
    ({"network": len}, TypeError, "network must be a Cell, but got"),
    ({"optimizer": [1]}, TypeError, "optimizer must be a Optimizer, but got list"),
    ({"loss_scaler": 1024.0}, TypeError, "loss_scaler must be a LossScaler or None, but got float"),
    ({"ema": 0.9}, TypeError, "ema must be a DeltaEMA or None, but got float")])
def test_wrong_arguments(change, error, words):
    net = Product()
    right = {"network": net, "optimizer": nn.SGD(net.trainable_params(), 0.1), "steps": 2}
    with pytest.raises(error, match=words):
        mp.GradientAccumulation(**{**right, **change})


def by_numpy(x: np.ndarray, windows: list[list[int]], rate: float) -> np.ndarray:
    """Return w of Product after plain gradient steps, one for each window of micro-batches."""
    w = np.zeros(3)
    for window in windows:
        w -= rate * np.mean([x[index].mean(0) for index in window], axis=0)
    return w


def test_flush_applies_what_is_left_as_the_mean_of_what_came(mode):
    net, x = Product(), np.random.default_rng(0).standard_normal((7, 2, 3)).astype(np.float32)
    step = mp.GradientAccumulation(net, nn.SGD(net.trainable_params(), 0.5), 3)
    step.flush()
    assert step.updates == 0 and not net.w.asnumpy().any()
    for index in range(5):
        step(Tensor(x[index]))
    assert step.updates == 1
    step.flush()
    step.flush()
    assert step.updates == 2 and step.count.asnumpy() == 0
    np.testing.assert_allclose(net.w.asnumpy(), by_numpy(x, [[0, 1, 2], [3, 4]], 0.5), rtol=1e-5)
    step(Tensor(x[5]))
    step(Tensor(x[6]))
    step(Tensor(x[0]))
    assert step.updates == 3
    np.testing.assert_allclose(net.w.asnumpy(), by_numpy(x, [[0, 1, 2], [3, 4], [5, 6, 0]], 0.5), rtol=1e-5)


def test_a_flush_clips_unscales_and_averages_as_a_full_window_does(mode):
    x = np.full((1, 3), 4.0, np.float32)
    nets, scaler = [], ms.amp.DynamicLossScaler(1024.0, 2, 100)
    for steps in (2, 5):
        net = Product()
        nets.append(net)
        step = mp.GradientAccumulation(net, nn.SGD(net.trainable_params(), 0.5), steps, 1.0, scaler)
        step(Tensor(x))
        step(Tensor(x))
        step.flush()
        assert step.updates == 1
    assert nets[0].w.asnumpy().tobytes() == nets[1].w.asnumpy().tobytes()
    np.testing.assert_allclose(np.linalg.norm(nets[0].w.asnumpy()), 0.5, rtol=1e-6)
    step(Tensor(np.full((1, 3), np.inf, np.float32)))
    step.flush()
    assert step.updates == 1 and scaler.scale_value.asnumpy() == 512


def test_one_update_a_call_is_counted_too(mode):
    net = Product()
    step = mp.GradientAccumulation(net, nn.SGD(net.trainable_params(), 0.5), 1)
    for _ in range(3):
        step(Tensor(np.ones((1, 3), np.float32)))
    step.flush()
    assert step.updates == 3


class AtEnd(ms.train.Callback):
    def __init__(self, net: nn.Cell) -> None:
        super().__init__()
        self.net = net

    def on_train_end(self, run_context) -> None:
        self.seen = self.net.w.asnumpy().copy()


@pytest.mark.parametrize("callbacks", [True, False])
def test_model_train_ends_with_what_is_left(mode, callbacks):
    """7 micro-batches in an epoch, two epochs, windows of 4: 4, 3 and 1 of the next epoch, 4, and 2 at the end."""
    net, x = Product(), np.random.default_rng(0).standard_normal((7, 1, 3)).astype(np.float32)
    step = mp.GradientAccumulation(net, nn.SGD(net.trainable_params(), 0.5), 4)
    data, seen = ms.dataset.NumpySlicesDataset({"x": x[:, 0]}, shuffle=False).batch(1), AtEnd(net)
    model = ms.train.Model(step)
    model.train(2, data, callbacks=[seen] if callbacks else None, dataset_sink_mode=False)
    order = [index % 7 for index in range(14)]
    windows = [order[:4], order[4:8], order[8:12], order[12:]]
    assert step.updates == 4 and step.count.asnumpy() == 0
    np.testing.assert_allclose(net.w.asnumpy(), by_numpy(x, windows, 0.5), rtol=1e-5)
    if callbacks:
        assert np.array_equal(seen.seen, net.w.asnumpy())
    model.train(1, data, dataset_sink_mode=False)
    np.testing.assert_allclose(net.w.asnumpy(), by_numpy(x, [*windows, [0, 1, 2, 3], [4, 5, 6]], 0.5), rtol=1e-5)


def test_the_last_checkpoint_has_what_was_left(tmp_path):
    net = adapted()
    step = mp.GradientAccumulation(with_loss(net), nn.Adam(net.trainable_params(), 0.01), 2)
    data = ms.dataset.NumpySlicesDataset({"x": inputs(3, 6).asnumpy(), "y": inputs(3, 6).asnumpy()}).batch(1)
    ms.train.Model(step).train(1, data, callbacks=[mp.TrainableParamsCheckPoint(tmp_path)], dataset_sink_mode=False)
    saved = ms.load_checkpoint(str(tmp_path / "DELTA_CKP-1_3.ckpt"))
    assert step.updates == 2
    for name, value in values(net).items():
        assert np.array_equal(saved[name].asnumpy(), value), name
