"""Averages of the deltas against the formula in float64; swapping them in and out; their files."""
from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from nets import Attention, config, inputs, load_values, randomise, state

import mindpet_lite as mp


def adapted(**fields) -> Attention:
    net = mp.get_pet_model(Attention(), config(["to_q", "blocks.1.0"], **fields))
    randomise(net)
    return net


@pytest.mark.parametrize(("warm_up", "dtype"), [(False, ms.float32), (True, ms.float16)],
                         ids=["constant", "warm-up"])
def test_every_element(mode, warm_up, dtype):
    net = adapted(param_init_type=dtype)
    ema = mp.DeltaEMA(net, 0.4, warm_up)
    expected = [item.asnumpy().astype(np.float64) for item in net.trainable_params()]
    # From the sixth on, the warm-up is above the decay.
    for n in range(8):
        randomise(net, seed=n)
        assert ema().asnumpy() == n + 1
        decay = min(0.4, (1 + n) / (10 + n)) if warm_up else 0.4
        expected = [decay * old + (1 - decay) * item.asnumpy().astype(np.float64)
                    for old, item in zip(expected, net.trainable_params())]
    for average, reference in zip(ema.averages, expected):
        assert average.dtype == ms.float32
        np.testing.assert_allclose(average.asnumpy(), reference, rtol=1e-5, atol=1e-6)


def test_swapped_in_and_out_bit_for_bit_in_a_compiled_net(mode):
    net = adapted()
    net.set_train(False)
    x = inputs(3, 6)
    ema = mp.DeltaEMA(net, 0.5)
    randomise(net, seed=1)
    ema()
    trained = net(x).asnumpy()
    before = state(net)
    other = adapted()
    load_values(other, net)
    for target, average in zip(other.trainable_params(), ema.averages):
        target.set_data(Tensor(average.asnumpy()))
    other.set_train(False)
    with ema.applied() as same:
        assert same is net and np.array_equal(net(x).asnumpy(), other(x).asnumpy())
        assert not np.array_equal(net(x).asnumpy(), trained)
        with ema.applied():
            assert np.array_equal(net(x).asnumpy(), other(x).asnumpy())
    assert state(net) == before and np.array_equal(net(x).asnumpy(), trained)
    with pytest.raises(RuntimeError, match="in the block"), ema.applied():
        raise RuntimeError("in the block")
    assert state(net) == before


def test_only_what_an_adapter_holds_is_averaged():
    net = adapted(freeze_exclude=["norm.*"])
    assert [item.name for item in mp.DeltaEMA(net).averages] == [f"ema.{item.name}" for item in net.trainable_params()]
    assert "norm.gamma" in {item.name for item in mp.DeltaEMA(net).trained}
    for item in net.get_parameters():
        item.requires_grad = "scaling" not in item.name
    assert {item.name for item in mp.DeltaEMA(net).trained} == {
        f"{path}.mindpet_delta_lora_{factor}" for path in ("to_q", "blocks.1.0") for factor in "ab"}


def test_saved_beside_the_adapter():
    net = adapted()
    ema = mp.DeltaEMA(net, 0.5)
    randomise(net, seed=1)
    ema()
    before = state(net)
    mp.save_adapter(net, "out")
    assert ema.save("out").as_posix() == "out/ema" and state(net) == before
    for folder, values in (("out", net.trainable_params()), ("out/ema", ema.averages)):
        fresh = Attention()
        load_values(fresh, net)
        mp.load_adapter(fresh, folder, strict_base=True)
        names = [item.name for item in net.trainable_params()]
        loaded = {item.name: item for item in fresh.get_parameters()}
        for name, value in zip(names, values):
            assert np.array_equal(loaded[name].asnumpy(), value.asnumpy())


def test_bfloat16_is_put_back():
    net = adapted(param_init_type=ms.bfloat16)
    ema = mp.DeltaEMA(net, 0.5)
    before = [item.astype(ms.float32).asnumpy() for item in net.trainable_params()]
    with ema.applied():
        pass
    for item, old in zip(net.trainable_params(), before):
        assert item.dtype == ms.bfloat16 and np.array_equal(item.astype(ms.float32).asnumpy(), old)


def test_the_cell_changes_no_name_and_does_not_list_the_net():
    net = adapted()
    names = [item.name for item in net.get_parameters()]
    ema = mp.DeltaEMA(net)
    assert [item.name for item in net.get_parameters()] == names
    assert "to_q.weight" not in {item.name for item in ema.get_parameters()}


@pytest.mark.parametrize(("decay", "warm_up", "error"), [
    (1, False, ValueError), (-0.1, False, ValueError), (float("nan"), False, ValueError), ("0.9", False, TypeError),
    (0.9, 1, TypeError)])
def test_wrong_arguments(decay, warm_up, error):
    with pytest.raises(error, match="decay|warm_up"):
        mp.DeltaEMA(adapted(), decay, warm_up)


def test_wrong_nets():
    with pytest.raises(TypeError, match="must be a mindspore.nn.Cell"):
        mp.DeltaEMA("net")
    with pytest.raises(ValueError, match="no adapted layer"):
        mp.DeltaEMA(nn.Dense(2, 2))
    net = adapted()
    for item in net.trainable_params():
        item.requires_grad = False
    with pytest.raises(ValueError, match="nothing to average"):
        mp.DeltaEMA(net)


def test_a_full_disk_leaves_no_new_directory(tmp_path, monkeypatch):
    net = adapted()
    ema = mp.DeltaEMA(net)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    for save in (lambda: ema.save(tmp_path / "new"), lambda: mp.save_adapter(net, tmp_path / "new" / "adapter"),
                 lambda: mp.save_adapter(net, tmp_path / "new" / "adapter.safetensors", format="mindpet")):
        with pytest.raises(OSError, match="No space left on device"):
            save()
        assert list(tmp_path.iterdir()) == []


def test_an_empty_path_is_refused():
    with pytest.raises(ValueError, match="directory must name that of an adapter"):
        mp.DeltaEMA(adapted()).save("")
    assert not Path("ema").exists()
