"""VeRA's shared matrices: in one net, beside each other, in files, in checkpoints; and what only VeRA has."""
from __future__ import annotations

import copy
import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from nets import inputs, numbers, unchanged
from safetensors.numpy import load_file, save_file

import mindpet_lite as mp
from mindpet_lite.delta.parts import put
from mindpet_lite.formats.torch_random import TorchGenerator
from mindpet_lite.graph.adapters import adapters_of, deltas

A, B = "mindpet_shared_vera_a", "mindpet_shared_vera_b"


class Net(nn.Cell):
    """Layers of three sizes: the most inputs are those of one, the most outputs those of another."""

    def __init__(self):
        super().__init__()
        self.wide, self.tall, self.small = nn.Dense(9, 4), nn.Dense(4, 11, has_bias=False), nn.Dense(11, 2)

    def construct(self, x):
        return self.small(self.tall(self.wide(x)))


def plain(seed: int = 0) -> Net:
    net, rng = Net(), np.random.default_rng(seed)
    for item in net.get_parameters():
        item.set_data(Tensor(rng.standard_normal(item.shape).astype(np.float32)))
    return net


def adapted(targets=("wide", "tall", "small"), seed: int = 3, **fields) -> Net:
    net = mp.get_pet_model(plain(), mp.VeraConfig(**{"r": 5, "target_modules": list(targets), **fields}))
    return moved(net, seed)


def moved(net: nn.Cell, seed: int = 3) -> nn.Cell:
    rng = np.random.default_rng(seed)
    for item in net.trainable_params():
        put(item, Tensor(rng.standard_normal(item.shape).astype(np.float32)))
    return net


def shared(net: nn.Cell) -> dict[str, np.ndarray]:
    (record,) = adapters_of(deltas(net).values())
    return {name: item.asnumpy() for name, item in record.shared.items()}


def expected(net: nn.Cell, x: Tensor, strength: float = 1.0) -> np.ndarray:
    """Return eq. 2 in float64, with the matrices of the key."""
    h, one = numbers(x), deltas(net)
    for path, layer in (("wide", net.wide), ("tall", net.tall), ("small", net.small)):
        y = h @ numbers(layer.weight).T + (numbers(layer.bias) if layer.has_bias else 0)
        if path in one:
            own = {name: numbers(item) for name, item in one[path].delta_parameters().items()}
            a, b = (value.astype(np.float64) for value in shared(net).values())
            low = (h @ a[:, :h.shape[1]].T) * own["mindpet_delta_vera_lambda_d"]
            y = y + strength * own["mindpet_delta_vera_lambda_b"] * (low @ b[:y.shape[1]].T)
        h = y
    return h


@pytest.mark.parametrize("targets", [("wide", "tall", "small"), ("tall",)])
def test_eq_2_and_the_matrices_of_the_largest_sizes(targets, mode):
    net, x = adapted(targets, projection_prng_key=4), inputs(6, 9)
    most_in, most_out = (11, 11) if len(targets) > 1 else (4, 11)
    generator = TorchGenerator(4)
    assert np.array_equal(shared(net)[A], generator.kaiming_uniform((5, most_in)))
    assert np.array_equal(shared(net)[B], generator.kaiming_uniform((most_out, 5)))
    np.testing.assert_allclose(net(x).asnumpy(), expected(net, x), rtol=1e-5, atol=1e-4)
    mp.set_lora_scale(net, -0.5)
    np.testing.assert_allclose(net(x).asnumpy(), expected(net, x, -0.5), rtol=1e-5, atol=1e-4)


def test_they_are_one_parameter_that_never_trains_and_is_not_counted():
    net, base = adapted(), plain()
    names = [item.name for item in net.get_parameters()]
    assert len(set(names)) == len(names)
    assert sum(name.endswith(("vera_a", "vera_b")) for name in names) == 2
    assert net.wide.mindpet_shared_vera_a is net.small.mindpet_shared_vera_a
    base_size = sum(item.size for item in base.get_parameters())
    own = (4 + 5) + (11 + 5) + (2 + 5)
    report = mp.freeze_delta(net, "vera")
    assert (report.trainable, report.total) == (own, base_size + own)
    assert mp.summary(net).report == report
    for item in net.get_parameters():
        item.requires_grad = True
    assert not net.wide.mindpet_shared_vera_a.requires_grad
    mp.freeze_modules(net, exclude=["*"])
    assert not {item.name for item in net.trainable_params()} & {name for name in names if "shared" in name}
    mp.freeze_delta(net, "vera")
    mp.check_optimizer(net, nn.Adam(net.trainable_params()))
    assert mp.check_adapters(net, inputs(6, 9)) == ["wide", "tall", "small"]
    mp.merge(net)
    assert [item.name for item in net.get_parameters()] == [item.name for item in base.get_parameters()]
    mp.unmerge(net)
    assert [item.name for item in net.get_parameters()] == names


def test_a_base_checkpoint_loads_before_and_after_and_a_full_one_brings_its_matrices(mode, tmp_path):
    ms.save_checkpoint(plain(1), str(tmp_path / "base.ckpt"))
    net, x = adapted(), inputs(6, 9)
    ms.load_param_into_net(net, ms.load_checkpoint(str(tmp_path / "base.ckpt")))
    other = plain()
    ms.load_param_into_net(other, ms.load_checkpoint(str(tmp_path / "base.ckpt")))
    other = moved(mp.get_pet_model(other, mp.VeraConfig(r=5, target_modules=["wide", "tall", "small"])))
    assert np.array_equal(net(x).asnumpy(), other(x).asnumpy())
    ms.save_checkpoint(net, str(tmp_path / "full.ckpt"))
    another = adapted(projection_prng_key=8, seed=9, save_projection=False)
    assert not np.array_equal(another(x).asnumpy(), net(x).asnumpy())
    ms.load_param_into_net(another, ms.load_checkpoint(str(tmp_path / "full.ckpt")))
    assert np.array_equal(another(x).asnumpy(), net(x).asnumpy())
    # They are not those of its key now: the file holds them.
    mp.save_adapter(another, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["save_projection"] is True
    fresh = mp.load_adapter(other, tmp_path / "adapter")
    assert np.array_equal(fresh(x).asnumpy(), net(x).asnumpy())


def test_layers_that_come_later_use_the_same_matrices(mode, tmp_path):
    net, x = adapted(["wide", "tall"]), inputs(6, 9)
    before = shared(net)
    with unchanged(net), pytest.raises(ValueError, match="vera_b|A of"):
        mp.get_pet_model(net, mp.VeraConfig(r=5, target_modules=["small"]))
    for fields, message in (({"r": 6}, "r is 6, but"), ({"projection_prng_key": 1}, "projection_prng_key is 1"),
                            ({"save_projection": False}, "save_projection is False")):
        with unchanged(net), pytest.raises(ValueError, match=message):
            mp.get_pet_model(net, mp.VeraConfig(**{"r": 5, "target_modules": ["small"], **fields}))
    net = adapted(["small", "tall"])
    held, names = net.small.mindpet_shared_vera_a, [item.name for item in net.get_parameters()]
    mp.get_pet_model(net, mp.VeraConfig(r=5, target_modules=["wide"]))
    assert net.wide.mindpet_shared_vera_a is held and held.name in names
    moved(net)
    assert shared(net)[A].shape == (5, 11) and before[A].shape == (5, 9)
    np.testing.assert_allclose(net(x).asnumpy(), expected(net, x), rtol=1e-5, atol=1e-4)
    mp.save_adapter(net, tmp_path / "adapter")
    assert np.array_equal(mp.load_adapter(plain(), tmp_path / "adapter")(x).asnumpy(), net(x).asnumpy())


@pytest.mark.parametrize("saved", [True, False])
def test_a_files_matrices_win_in_a_net_that_has_others(saved, mode, tmp_path):
    source, x = adapted(projection_prng_key=6, save_projection=saved), inputs(6, 9)
    mp.save_adapter(source, tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter/adapter_model.safetensors").keys()
    assert ({"base_model.vera_A", "base_model.vera_B"} <= set(keys)) == saved and len(keys) == 6 + 2 * saved
    net = adapted(seed=5)
    wanted, held = source(x).asnumpy(), net.wide.mindpet_shared_vera_a
    assert not np.array_equal(net(x).asnumpy(), wanted)
    mp.load_adapter(net, tmp_path / "adapter")
    assert np.array_equal(net(x).asnumpy(), wanted) and net.wide.mindpet_shared_vera_a is held
    assert deltas(net)["wide"].settings() == deltas(source)["wide"].settings()
    mp.save_adapter(net, tmp_path / "again")
    assert json.loads((tmp_path / "again/adapter_config.json").read_text()) == json.loads(
        (tmp_path / "adapter/adapter_config.json").read_text())
    # More layers in the file than in the net: the new ones share with the old.
    some = adapted(["small", "tall"], seed=5)
    mp.load_adapter(some, tmp_path / "adapter")
    assert np.array_equal(some(x).asnumpy(), wanted)
    assert some.wide.mindpet_shared_vera_a is some.small.mindpet_shared_vera_a
    few = adapted(["wide", "tall"], seed=5)
    with unchanged(few), pytest.raises(ValueError, match=f"{A} is .5, 9. in the net, .5, 11. in the file"):
        mp.load_adapter(few, tmp_path / "adapter")


def test_damaged_files_are_refused(tmp_path):
    mp.save_adapter(adapted(), tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, says = load_file(file), json.loads(config.read_text())
    a = tensors["base_model.vera_A"]
    for name, value, message in (("base_model.vera_A", None, "lacks base_model.vera_A"),
                                 ("base_model.vera_A", a[:, :10].copy(), r"A is \(5, 10\)"),
                                 ("base_model.vera_A", a[:4].copy(), r"A is \(4, 11\)"),
                                 ("base_model.vera_A", a[0].copy(), r"A is \(11,\)")):
        save_file({key: item for key, item in {**tensors, name: value}.items() if item is not None}, file)
        for net in (plain(), adapted()):
            with unchanged(net), pytest.raises(ValueError, match=message):
                mp.load_adapter(net, tmp_path)
    save_file(tensors, file)
    config.write_text(json.dumps({**says, "r": 10 ** 9, "save_projection": False}))
    for net in (plain(), adapted()):
        with unchanged(net), pytest.raises(ValueError, match="misshapen.*1000000000"):
            mp.load_adapter(net, tmp_path)


def test_larger_matrices_of_a_file_are_kept(tmp_path):
    mp.save_adapter(adapted(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors, x = load_file(file), inputs(6, 9)
    large = np.concatenate([tensors["base_model.vera_A"], np.ones((5, 3), np.float32)], 1)
    save_file({**tensors, "base_model.vera_A": large}, file)
    net = mp.load_adapter(plain(), tmp_path)
    assert np.array_equal(shared(net)[A], large)
    assert np.array_equal(net(x).asnumpy(), adapted()(x).asnumpy())


def test_two_nets_around_one_and_copies_do_not_mix(mode):
    class Pair(nn.Cell):
        def __init__(self):
            super().__init__()
            self.one, self.two = plain(), plain(1)

        def construct(self, x):
            return self.one(x) + self.two(x)

    pair, x = Pair(), inputs(6, 9)
    for part, key in ((pair.one, 0), (pair.two, 1)):
        moved(mp.get_pet_model(part, mp.VeraConfig(r=5, target_modules=["wide", "tall", "small"],
                                                   projection_prng_key=key)))
    names = [item.name for item in pair.get_parameters()]
    assert len(set(names)) == len(names) and sum("vera_a" in name for name in names) == 2
    wanted = pair.one(x).asnumpy() + pair.two(x).asnumpy()
    assert np.array_equal(pair(x).asnumpy(), wanted)
    twin = copy.deepcopy(pair.one)
    assert twin.wide.mindpet_shared_vera_a is twin.tall.mindpet_shared_vera_a is not pair.one.wide.mindpet_shared_vera_a
    assert adapters_of(deltas(twin).values())[0].shared[A] is twin.wide.mindpet_shared_vera_a
    assert not twin.wide.mindpet_shared_vera_a.requires_grad
    assert np.array_equal(twin(x).asnumpy(), pair.one(x).asnumpy())


def test_dropout_is_before_a_and_only_in_training(mode):
    net, x = adapted(["small"], vera_dropout=0.5), inputs(6, 9)
    np.testing.assert_allclose(net.set_train(False)(x).asnumpy(), expected(net, x), rtol=1e-5, atol=1e-4)
    net.set_train()
    assert not np.array_equal(net(x).asnumpy(), net(x).asnumpy())
    # Dropped or doubled: the mean over many draws is the value without.
    many = np.mean([net(x).asnumpy() for _ in range(400)], 0)
    assert np.abs(many - expected(net, x)).mean() < 0.1 * np.abs(expected(net, x)).mean()


@pytest.mark.parametrize(("bias", "paths"), [("none", set()), ("vera_only", {"small.bias"}),
                                             ("all", {"small.bias", "wide.bias"})])
def test_biases_train_beside_and_stand_in_the_file_as_pefts(bias, paths, tmp_path):
    net, x = adapted(["small", "tall"], bias=bias), inputs(6, 9)
    assert {item.name for item in net.trainable_params() if "delta" not in item.name} == paths
    mp.save_adapter(net, tmp_path)
    says = json.loads((tmp_path / "adapter_config.json").read_text())
    biases = {key for key in load_file(tmp_path / "adapter_model.safetensors") if key.endswith("bias")}
    assert says["bias"] == bias and says["peft_type"] == "VERA"
    assert biases == {f"base_model.model.{path.replace('small.', 'small.base_layer.')}" for path in paths}
    fresh = mp.load_adapter(plain(), tmp_path)
    assert np.array_equal(fresh(x).asnumpy(), net(x).asnumpy())
    assert {item.name for item in fresh.trainable_params()} == {item.name for item in net.trainable_params()}
    with mp.adapters_disabled(fresh):
        assert np.array_equal(fresh(x).asnumpy(), plain()(x).asnumpy())
    if bias != "none":
        (tmp_path / "adapter_config.json").write_text(json.dumps({**says, "bias": "none"}))
        with pytest.raises(ValueError, match="is no tensor of VERA"):
            mp.load_adapter(plain(), tmp_path)


def test_two_methods_in_one_net_and_one_file(mode, tmp_path):
    net, x = adapted(["wide"]), inputs(6, 9)
    moved(mp.get_pet_model(net, mp.LoraConfig(2, 3, target_modules=["small"])))
    y = net(x).asnumpy()
    mp.save_adapter(net, tmp_path)
    fresh = mp.load_adapter(plain(), tmp_path)
    assert np.array_equal(fresh(x).asnumpy(), y)
    assert np.array_equal(mp.load_adapter(net, Path(tmp_path))(x).asnumpy(), y)


def test_a_random_start_is_pefts():
    net = mp.get_pet_model(plain(), mp.VeraConfig(r=400, target_modules=["wide"], init_weights=False))
    own = {name: item.asnumpy() for name, item in net.wide.delta_parameters().items()}
    assert np.array_equal(own["mindpet_delta_vera_lambda_b"], np.ones(4))
    assert abs(own["mindpet_delta_vera_lambda_d"].std() - 1) < 0.15


@pytest.mark.parametrize(("fields", "message"), [
    ({"r": 0}, "r must be"), ({"r": 2.0}, "r must be"), ({"vera_dropout": 1}, "vera_dropout"),
    ({"d_initial": float("nan")}, "d_initial"), ({"projection_prng_key": 2 ** 64}, "below 2.64"),
    ({"projection_prng_key": None}, "projection_prng_key"), ({"save_projection": 1}, "save_projection"),
    ({"init_weights": "no"}, "init_weights"), ({"bias": "lora_only"}, "bias must be one of none, all, vera_only")])
def test_wrong_settings(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        mp.VeraConfig(target_modules=["wide"], **fields)


def test_a_layer_alone_is_refused():
    with pytest.raises(ValueError, match="share two matrices"):
        mp.VeraConfig(r=5).adapt(nn.Dense(3, 2))
