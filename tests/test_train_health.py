"""HealthCallback in Model.train: norms, zeros, values that are not finite, loss scales; and how often it reads."""
from __future__ import annotations

import warnings

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.train import Model
from nets import Attention, config, inputs, randomise

import mindpet_lite as mp
from mindpet_lite.train import health


def data(steps: int, scale: float = 1.0):
    x = scale * inputs(2 * steps, 6).asnumpy()
    return ds.NumpySlicesDataset({"x": x, "y": np.ones((2 * steps, 6), np.float32)}, shuffle=False).batch(2)


def adapted(targets=("to_q", "blocks.1.0"), **fields) -> Attention:
    return mp.get_pet_model(Attention(), config(targets, **fields))


def train(net, callback, steps=4, rate=0.01, trained=None, **model):
    optimizer = nn.SGD(trained or net.trainable_params(), rate)
    Model(net, nn.MSELoss(), optimizer, **model).train(1, data(steps), callbacks=[callback], dataset_sink_mode=False)


def reference(layer) -> float:
    a, b = (getattr(layer, f"mindpet_delta_lora_{one}").asnumpy().astype(np.float64) for one in "ab")
    return np.linalg.norm(layer.lora_alpha / layer.lora_rank * b.reshape(-1, layer.lora_rank)
                          @ a.reshape(layer.lora_rank, -1))


def test_norms_are_those_of_the_update(mode):
    net = adapted()
    callback = mp.HealthCallback(every=2)
    train(net, callback, steps=5)
    assert list(callback.norms) == [0, 2, 4, 5]
    assert callback.norms[0] == {"to_q": 0.0, "blocks.1.0": 0.0}
    for path, layer in (("to_q", net.to_q), ("blocks.1.0", net.blocks[1][0])):
        assert callback.norms[5][path] == pytest.approx(reference(layer), rel=1e-9) and callback.norms[5][path] > 0


def test_norms_of_all_kinds():
    """Against the update itself; a convolution's groups share no channel; other methods count what they train."""
    embedding = mp.LoRAEmbedding(7, 4, 2, 6)
    convolution = mp.LoRAConv2d(4, 6, 3, 4, 2, use_rslora=True)
    grouped = mp.LoRAConv2d(4, 6, 3, 4, 2, group=2)
    adapter = mp.AdapterDense(4, 4, bottleneck_size=2)
    for cell in (embedding, convolution, grouped, adapter):
        randomise(cell)
    a, b = (getattr(embedding, f"mindpet_delta_lora_embedding_{one}").asnumpy().astype(np.float64) for one in "ab")
    assert embedding.delta_norm() == pytest.approx(np.linalg.norm(3 * b @ a), rel=1e-9)
    assert convolution.delta_norm() == pytest.approx(2 * reference(convolution), rel=1e-9)
    a = grouped.mindpet_delta_lora_a.asnumpy().astype(np.float64).reshape(2, 2, -1)
    b = grouped.mindpet_delta_lora_b.asnumpy().astype(np.float64).reshape(2, 3, 2)
    assert grouped.delta_norm() == pytest.approx(0.5 * np.linalg.norm(b @ a), rel=1e-9)
    squares = sum(np.square(item.asnumpy().astype(np.float64)).sum() for item in adapter.delta_parameters().values())
    assert adapter.delta_norm() == pytest.approx(np.sqrt(squares), rel=1e-9)


def test_b_that_stays_zero_is_named():
    net = adapted()
    still = [item for item in net.trainable_params() if item.name == "blocks.1.0.mindpet_delta_lora_b"]
    left_out = [{"params": still, "lr": 0.0}, {"params": [item for item in net.trainable_params()
                                                          if item is not still[0]]}]
    with pytest.warns(UserWarning, match=r"^blocks\.1\.0\.mindpet_delta_lora_b is still zero after 3 steps") as caught:
        train(net, mp.HealthCallback(every=100, zero_after=3), trained=left_out)
    assert len(caught) == 1
    for after in (3, 9):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(net, mp.HealthCallback(every=1, zero_after=after), trained=left_out if after == 9 else None)


def test_a_delta_that_is_not_finite_stops_with_its_path(mode):
    net = adapted()
    with pytest.raises(FloatingPointError, match=r"mindpet_delta_lora_[ab].* between steps 2 and 4: start again"):
        train(net, Poison(net.blocks[1][0].mindpet_delta_lora_b, at=3, every=2), steps=6)
    net = adapted()
    net.to_q.mindpet_delta_lora_a.set_data(Tensor(np.full((2, 6), np.inf, np.float32)))
    with pytest.raises(FloatingPointError, match=r"^to_q\.mindpet_delta_lora_a became .* before the training"):
        train(net, mp.HealthCallback())


class Poison(mp.HealthCallback):
    """Puts NaN into a Parameter after a step."""

    def __init__(self, parameter, at, **settings):
        super().__init__(**settings)
        self.parameter, self.at = parameter, at

    def on_train_step_end(self, run_context):
        if run_context.original_args().cur_step_num == self.at:
            self.parameter.set_data(Tensor(np.full(self.parameter.shape, np.nan, np.float32)))
        super().on_train_step_end(run_context)


def test_the_last_steps_are_read_at_the_end():
    net = adapted()
    with pytest.raises(FloatingPointError, match="between steps 0 and 3"):
        train(net, Poison(net.to_q.mindpet_delta_lora_b, at=3), steps=3)


def test_a_loss_that_is_not_finite_beside_sound_deltas(graph_mode):
    """The fixed loss scale leaves out the update, so the deltas stay finite, and would for ever."""
    net = adapted()
    step = mp.GradientAccumulation(nn.WithLossCell(net, nn.MSELoss()), nn.SGD(net.trainable_params(), 0.1), 1,
                                   loss_scaler=ms.amp.StaticLossScaler(1.0))
    with pytest.raises(FloatingPointError, match="loss is nan at step 1, while all deltas are finite"):
        Model(step).train(1, data(2, scale=float("nan")), callbacks=[mp.HealthCallback(every=1, network=net)],
                          dataset_sink_mode=False)


def scaled_step(net, first_scale):
    scaler = ms.amp.DynamicLossScaler(first_scale, 2, 1000)
    optimizer = nn.SGD(net.trainable_params(), 0.01)
    return mp.GradientAccumulation(nn.WithLossCell(net, nn.MSELoss()), optimizer, 1, loss_scaler=scaler)


def test_a_loss_scale_at_its_floor_stops(graph_mode):
    net = adapted()
    callback = mp.HealthCallback(every=1, network=net)
    with pytest.raises(FloatingPointError, match=r"loss scale came down to 1 by step 3, its floor being 1"):
        Model(scaled_step(net, 8.0)).train(1, data(6, scale=float("inf")), callbacks=[callback],
                                           dataset_sink_mode=False)
    assert list(callback.norms) == [0, 1, 2]
    Model(scaled_step(net, 1.0)).train(1, data(2), callbacks=[callback], dataset_sink_mode=False)
    assert list(callback.norms[2]) == ["to_q", "blocks.1.0"]


def test_where_the_dynamic_scale_stands():
    net = adapted()
    loss, optimizer = nn.WithLossCell(net, nn.MSELoss()), nn.SGD(net.trainable_params(), 0.01)
    moving = nn.TrainOneStepWithLossScaleCell(loss, optimizer, nn.DynamicLossScaleUpdateCell(1024, 2, 10))
    assert health.dynamic_loss_scale(moving) is moving.scale_sense
    ours = scaled_step(net, 8.0)
    assert health.dynamic_loss_scale(ours) is ours.loss_scaler.scale_value
    for fixed in (nn.TrainOneStepWithLossScaleCell(loss, optimizer, Tensor(1.0)), nn.TrainOneStepCell(loss, optimizer),
                  mp.GradientAccumulation(loss, optimizer, 2, loss_scaler=ms.amp.StaticLossScaler(1.0))):
        assert health.dynamic_loss_scale(fixed) is None


def test_most_steps_read_nothing(monkeypatch):
    reads = []
    monkeypatch.setattr(health, "float64", lambda value: reads.append(1) or value.asnumpy())
    train(adapted(), mp.HealthCallback(every=4, zero_after=4), steps=8)
    # 4 Parameters and the loss; at the begin there is no loss.
    assert len(reads) == 4 + 5 + 5


@pytest.mark.parametrize(("arguments", "error"), [
    ({"every": 0}, ValueError), ({"every": 1.5}, TypeError), ({"zero_after": -1}, ValueError),
    ({"scale_floor": 0}, ValueError), ({"scale_floor": "1"}, TypeError), ({"network": "net"}, TypeError)])
def test_wrong_arguments(arguments, error):
    with pytest.raises(error, match="every|zero_after|scale_floor|net must"):
        mp.HealthCallback(**arguments)


def test_a_net_without_deltas():
    with pytest.raises(ValueError, match="no adapted layer"):
        train(Attention(), mp.HealthCallback())
