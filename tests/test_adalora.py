"""AdaLoRA's allocation against the paper in float64, its regularisation, and files with rank_pattern."""
from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.dataset import NumpySlicesDataset
from mindspore.train import Model
from nets import compile_count, inputs, numbers, unchanged
from safetensors.numpy import load_file, save_file

import mindpet_lite as mp
from mindpet_lite.delta.parts import put
from mindpet_lite.graph.adapters import deltas

A, B, E = (f"mindpet_delta_adalora_{name}" for name in "abe")
PATHS = ("wide", "tall", "small")


class Net(nn.Cell):
    def __init__(self):
        super().__init__()
        self.wide, self.tall, self.small = nn.Dense(7, 4), nn.Dense(4, 6, has_bias=False), nn.Dense(6, 2)

    def construct(self, x):
        return self.small(self.tall(self.wide(x)))


def plain(seed: int = 0) -> Net:
    net, rng = Net(), np.random.default_rng(seed)
    for item in net.get_parameters():
        item.set_data(Tensor(rng.standard_normal(item.shape).astype(np.float32)))
    return net


def adapted(seed: int | None = 3, **fields) -> Net:
    net = mp.get_pet_model(plain(), mp.AdaLoraConfig(**{
        "target_modules": list(PATHS), "init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": 14,
        "deltaT": 2, "beta1": 0.7, "beta2": 0.6, **fields}))
    return net if seed is None else moved(net, seed)


def moved(net: nn.Cell, seed: int) -> nn.Cell:
    rng = np.random.default_rng(seed)
    for item in net.trainable_params():
        put(item, Tensor(rng.standard_normal(item.shape).astype(np.float32)).astype(item.dtype))
    return net


def values(net: nn.Cell) -> dict[str, dict[str, np.ndarray]]:
    return {path: {name: numbers(item) for name, item in delta.delta_parameters().items()}
            for path, delta in deltas(net).items()}


def kept(net: nn.Cell) -> dict[str, np.ndarray]:
    return {path: delta.kept.asnumpy().reshape(-1) > 0 for path, delta in deltas(net).items()}


class Reference:
    """The paper's sections 3.2 and 3.3 in float64, behind plain gradient descent."""

    def __init__(self, net: nn.Cell, rate: float, config: mp.AdaLoraConfig) -> None:
        self.w, self.rate, self.config, self.step = values(net), rate, config, 0
        self.mean = {path: {name: np.zeros(value.shape) for name, value in own.items()} for path, own in self.w.items()}
        self.doubt = {path: {name: np.zeros(value.shape) for name, value in own.items()}
                      for path, own in self.w.items()}
        self.kept = {path: np.ones(config.init_r, bool) for path in self.w}

    def budget(self) -> int:
        config, layers = self.config, len(self.w)
        if self.step <= config.tinit:
            return config.init_r * layers
        rest = 1 - (self.step - config.tinit) / (config.total_step - config.tfinal - config.tinit)
        return int((config.init_r - config.target_r) * layers * rest ** 3 + config.target_r * layers)

    def __call__(self, gradients: dict[str, dict[str, np.ndarray]]) -> None:
        config, last = self.config, self.config.total_step - self.config.tfinal
        scores = {}
        for path, own in self.w.items():
            part = {}
            for name, value in own.items():
                value -= self.rate * gradients[path][name]
                if self.step < last:
                    now = np.abs(value * gradients[path][name])
                    mean = config.beta1 * self.mean[path][name] + (1 - config.beta1) * now
                    self.doubt[path][name] = (config.beta2 * self.doubt[path][name]
                                              + (1 - config.beta2) * np.abs(now - mean))
                    self.mean[path][name] = mean
                part[name] = self.mean[path][name] * self.doubt[path][name]
            scores[path] = part[E][:, 0] + part[A].mean(1) + part[B].mean(0)
        if self.step == last or config.tinit < self.step < last and self.step % config.deltaT == 0:
            order = np.sort(np.concatenate(list(scores.values())))[::-1]
            budget = self.budget()
            lowest = order[budget - 1]
            self.kept = {path: own >= lowest for path, own in scores.items()}
            assert sum(own.sum() for own in self.kept.values()) == budget
        if self.step >= last or config.tinit < self.step and self.step % config.deltaT == 0:
            for path, own in self.w.items():
                own[E][~self.kept[path]] = 0
        self.step += 1


def random_gradients(net: nn.Cell, rng: np.random.Generator) -> dict[str, dict[str, np.ndarray]]:
    """Return gradients whose sizes differ by the triplet."""
    found = {}
    for path, own in values(net).items():
        size = np.exp(rng.standard_normal(own[E].shape))
        found[path] = {name: rng.standard_normal(value.shape) * (size.T if name == B else size)
                       for name, value in own.items()}
    return found


def in_order(net: nn.Cell, gradients: dict[str, dict[str, np.ndarray]], parameters) -> tuple[Tensor, ...]:
    by_id = {id(item): gradients[path][name] for path, delta in deltas(net).items()
             for name, item in delta.delta_parameters().items()}
    return tuple(Tensor(by_id[id(item)].astype(np.float32)) for item in parameters)


@pytest.mark.parametrize("fields", [{}, {"deltaT": 1, "tinit": 0, "tfinal": 0, "target_r": 1}, {"target_r": 4},
                                    {"tinit": 9, "deltaT": 5}])
def test_every_step_is_the_papers(fields, mode):
    net = adapted(**fields)
    config = net.wide.config
    reference = Reference(net, 0.05, config)
    # Not in the order of the layers.
    optimizer = mp.RankAllocation(net, nn.SGD(net.trainable_params()[::-1], 0.05))
    rng, ranks = np.random.default_rng(8), set()
    with compile_count() as compiled:
        for step in range(config.total_step + 3):
            gradients = random_gradients(net, rng)
            reference(gradients)
            optimizer(in_order(net, gradients, optimizer.parameters))
            for path, own in values(net).items():
                for name, value in own.items():
                    np.testing.assert_allclose(value, reference.w[path][name], rtol=1e-4, atol=1e-5,
                                               err_msg=f"{step} {path} {name}")
                assert np.array_equal(kept(net)[path], reference.kept[path]), (step, path)
            ranks.add(sum(own.sum() for own in kept(net).values()))
        for path, own in reference.mean.items():
            for place, name in enumerate((A, B, E)):
                at = 3 * PATHS.index(path) + place
                np.testing.assert_allclose(numbers(optimizer.means[at]), own[name], rtol=1e-4, atol=1e-7)
                np.testing.assert_allclose(numbers(optimizer.doubts[at]), reference.doubt[path][name], rtol=1e-4,
                                           atol=1e-7)
    assert len(compiled) <= 1
    assert min(ranks) == 3 * config.target_r and (len(ranks) > 2 or fields)
    assert optimizer.step.asnumpy() == config.total_step + 3


def test_half_precision_keeps_its_types(mode):
    net = adapted(param_init_type=ms.float16, deltaT=1, tinit=0, tfinal=1, total_step=4)
    optimizer = mp.RankAllocation(net, nn.SGD(net.trainable_params(), 0.05))
    rng = np.random.default_rng(8)
    for _ in range(5):
        gradients = in_order(net, random_gradients(net, rng), optimizer.parameters)
        optimizer(tuple(item.astype(ms.float16) for item in gradients))
    assert {item.dtype for item in net.trainable_params()} == {ms.float16}
    assert sum(own.sum() for own in kept(net).values()) == 6


def data() -> tuple[Tensor, Tensor]:
    return inputs(8, 7), inputs(8, 2, seed=1)


def loss_of(net: nn.Cell) -> nn.Cell:
    class Loss(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.net, self.loss, self.regularization = net, nn.MSELoss(), mp.OrthogonalRegularization(net)

        def construct(self, x, y):
            return self.loss(self.net(x), y) + self.regularization()

    return Loss()


def by_loop(net: nn.Cell) -> None:
    optimizer, loss = mp.RankAllocation(net, nn.Adam(net.trainable_params(), 0.05)), loss_of(net)
    gradients_of = ms.value_and_grad(loss, None, optimizer.parameters)
    for _ in range(14):
        _, gradients = gradients_of(*data())
        optimizer(gradients)


def by_step(net: nn.Cell) -> None:
    step = nn.TrainOneStepCell(loss_of(net), mp.RankAllocation(net, nn.Adam(net.trainable_params(), 0.05)))
    for _ in range(14):
        step(*data())


def by_model(net: nn.Cell) -> None:
    step = nn.TrainOneStepCell(loss_of(net), mp.RankAllocation(net, nn.Adam(net.trainable_params(), 0.05)))
    rows = NumpySlicesDataset(tuple(np.tile(item.asnumpy(), (14, 1)) for item in data()), ["x", "y"],
                              shuffle=False).batch(8)
    Model(step).train(1, rows, dataset_sink_mode=False, callbacks=[mp.HealthCallback(network=net)])


def by_accumulation(net: nn.Cell) -> None:
    step = mp.GradientAccumulation(loss_of(net), mp.RankAllocation(net, nn.Adam(net.trainable_params(), 0.05)), 2)
    for _ in range(28):
        step(*data())


def test_every_way_of_training_is_the_same(mode):
    wanted = adapted()
    by_loop(wanted)
    assert sum(own.sum() for own in kept(wanted).values()) == 6
    assert any(not own.all() for own in kept(wanted).values())
    for train in (by_step, by_model, by_accumulation):
        net = adapted()
        train(net)
        for path, own in values(net).items():
            assert np.array_equal(kept(net)[path], kept(wanted)[path]), train
            for name, value in own.items():
                np.testing.assert_allclose(value, values(wanted)[path][name], rtol=1e-3, atol=1e-4,
                                           err_msg=f"{train.__name__} {path} {name}")


def orthogonality(own: dict[str, dict[str, np.ndarray]]) -> float:
    parts = [(layer[A] @ layer[A].T, layer[B].T @ layer[B]) for layer in own.values()]
    found = [np.linalg.norm(product - np.diag((np.diag(product) > 0) * 1.0)) for pair in parts for product in pair]
    return 0.3 * sum(found) / len(found)


def test_the_regularisation_and_its_gradients(mode):
    net = adapted(orth_reg_weight=0.3)
    cell, own = mp.OrthogonalRegularization(net), values(net)
    value, gradients = ms.value_and_grad(cell, None, net.trainable_params())()
    np.testing.assert_allclose(value.asnumpy(), orthogonality(own), rtol=1e-5)
    by_id = {id(item): numbers(gradient) for item, gradient in zip(net.trainable_params(), gradients)}
    for path, delta in deltas(net).items():
        for name, item in delta.delta_parameters().items():
            slope = np.zeros(item.shape)
            for at in np.ndindex(*item.shape):
                ends = []
                for step in (1e-5, -1e-5):
                    own[path][name][at] += step
                    ends.append(orthogonality(own))
                    own[path][name][at] -= step
                slope[at] = (ends[0] - ends[1]) / 2e-5
            np.testing.assert_allclose(by_id[id(item)], slope, rtol=1e-4, atol=1e-5, err_msg=f"{path} {name}")


def test_the_regularisation_of_orthonormal_vectors_and_of_none_is_nothing(mode):
    net = mp.get_pet_model(plain(), mp.AdaLoraConfig(target_modules=["wide"], init_r=3, target_r=1, total_step=3))
    one = np.eye(3, 7, dtype=np.float32)
    one[2] = 0
    for name, value in ((A, one), (B, np.eye(4, 3, dtype=np.float32)), (E, np.ones((3, 1), np.float32))):
        put(getattr(net.wide, name), Tensor(value))
    value, gradients = ms.value_and_grad(mp.OrthogonalRegularization(net), None, net.trainable_params())()
    assert value.asnumpy() == 0 and not any(item.asnumpy().any() for item in gradients)


def allocated(seed: int = 3, empty: bool = True) -> Net:
    """Return a net of which triplets are gone; with `empty` all of one layer."""
    net = adapted(seed)
    for path, mask in {"wide": [1, 0, 1, 1], "tall": [0, 0, 0, 0] if empty else [1, 0, 0, 0]}.items():
        layer, column = deltas(net)[path], np.array(mask, np.float32)[:, None]
        put(layer.kept, Tensor(column))
        put(getattr(layer, E), Tensor(getattr(layer, E).asnumpy() * column))
    return net


def test_files_hold_what_is_kept_and_come_back(mode, tmp_path):
    net, x = allocated(), inputs(5, 7)
    y = net(x).asnumpy()
    mp.save_adapter(net, tmp_path / "adapter")
    says = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert says["peft_type"] == "ADALORA" and says["rank_pattern"] == {
        "wide.lora_E": [True, False, True, True], "tall.lora_E": [False] * 4, "small.lora_E": [True] * 4}
    assert {name: says[name] for name in ("init_r", "target_r", "tinit", "tfinal", "deltaT", "total_step", "beta1")} \
        == {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": 14, "beta1": 0.7}
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {key: value.shape for key, value in tensors.items()} == {
        f"base_model.model.{path}.lora_{name}": shape for path, inputs_, outputs, rank in (
            ("wide", 7, 4, 3), ("tall", 4, 6, 0), ("small", 6, 2, 4))
        for name, shape in (("A", (rank, inputs_)), ("B", (outputs, rank)), ("E", (rank, 1)))}
    own = net.wide.mindpet_delta_adalora_a.asnumpy()
    assert np.array_equal(tensors["base_model.model.wide.lora_A"], own[[0, 2, 3]])
    for target in (plain(), adapted(5)):
        mp.load_adapter(target, tmp_path / "adapter")
        assert np.array_equal(target(x).asnumpy(), y)
        assert {path: item.tolist() for path, item in kept(target).items()} == {
            path: item.tolist() for path, item in kept(net).items()}
        assert not target.wide.mindpet_delta_adalora_a.asnumpy()[1].any()
        mp.save_adapter(target, tmp_path / "again")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    mp.merge(target)
    np.testing.assert_allclose(target(x).asnumpy(), y, rtol=1e-5, atol=1e-5)


def test_what_is_gone_stays_so_when_a_file_is_trained_on(mode, tmp_path):
    mp.save_adapter(allocated(), tmp_path)
    net = mp.load_adapter(plain(), tmp_path)
    step = nn.TrainOneStepCell(loss_of(net), nn.Adam(net.trainable_params(), 0.05))
    for _ in range(3):
        step(*data())
    own = values(net)
    assert not own["tall"][A].any() and not own["tall"][B].any() and not own["wide"][A][1].any()
    assert own["wide"][E][0].any() and not np.array_equal(own["wide"][E], values(allocated())["wide"][E])
    # Nine are left, of which the allocation takes no more than the budget says.
    optimizer = mp.RankAllocation(net, nn.SGD(net.trainable_params(), 0.05))
    rng, ranks = np.random.default_rng(2), []
    for _ in range(14):
        optimizer(in_order(net, random_gradients(net, rng), optimizer.parameters))
        ranks.append(sum(item.sum() for item in kept(net).values()))
    assert ranks[0] == 7 and ranks[-1] == 6


def test_a_value_that_grows_again_between_allocations_is_in_the_file(tmp_path):
    net, x = allocated(empty=False), inputs(5, 7)
    layer = net.wide
    put(layer.mindpet_delta_adalora_e, Tensor(np.array([[1], [0.5], [2], [1]], np.float32)))
    mp.save_adapter(net, tmp_path)
    assert np.array_equal(mp.load_adapter(plain(), tmp_path)(x).asnumpy(), net(x).asnumpy())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]["wide.lora_E"] == [True] * 4


def test_two_methods_in_one_file_and_a_run_that_goes_on(tmp_path):
    net, x = allocated(), inputs(5, 7)
    mp.save_adapter(net, tmp_path / "one")
    other = mp.get_pet_model(plain(), mp.AdaLoraConfig(target_modules=["wide"], init_r=4, target_r=1, total_step=9))
    moved(mp.get_pet_model(other, mp.LoraConfig(2, 3, target_modules=["small"])), 4)
    put(other.wide.kept, Tensor(np.array([[1], [0], [1], [1]], np.float32)))
    put(other.wide.mindpet_delta_adalora_e, Tensor(np.array([[1], [0], [2], [1]], np.float32)))
    mp.save_adapter(other, tmp_path / "two")
    fresh = mp.load_adapter(plain(), tmp_path / "two")
    assert np.array_equal(fresh(x).asnumpy(), other(x).asnumpy()) and kept(
        mp.load_adapter(plain(), tmp_path / "one"))["wide"].tolist() == [True, False, True, True]
    assert fresh.wide.kept.asnumpy().reshape(-1).tolist() == [1, 0, 1, 1]


def test_a_run_goes_on_where_it_stopped(mode, tmp_path):
    def run(stop: int | None) -> Net:
        net = adapted()
        optimizer = mp.RankAllocation(net, nn.Adam(net.trainable_params(), 0.05))
        step = nn.TrainOneStepCell(loss_of(net), optimizer)
        sampler = mp.BatchSampler(8, batch_size=8, seed=0)
        state = mp.TrainingState(tmp_path, net, step, sampler)
        state.resume()
        for _ in sampler:
            step(*data())
            if sampler.step == stop:
                state.save()
            if sampler.step >= (stop or 14):
                return net
        raise AssertionError

    whole = run(None)
    run(9)
    again = run(None)
    for path, own in values(whole).items():
        for name, value in own.items():
            assert np.array_equal(values(again)[path][name], value), (path, name)
        assert np.array_equal(kept(whole)[path], kept(again)[path])


@pytest.mark.parametrize(("bias", "paths"), [("lora_only", {"wide.bias", "small.bias"}), ("none", set())])
def test_biases_train_beside(bias, paths, tmp_path):
    net = adapted(bias=bias)
    assert {item.name for item in net.trainable_params() if "delta" not in item.name} == paths
    mp.save_adapter(net, tmp_path)
    assert np.array_equal(mp.load_adapter(plain(), tmp_path)(inputs(5, 7)).asnumpy(), net(inputs(5, 7)).asnumpy())


@pytest.mark.parametrize(("changes", "message"), [
    ({"rank_pattern": {"wide.lora_E": [True, False]}}, "rank_pattern of wide must be a list"),
    ({"rank_pattern": {"wide.lora_E": [True, True, True, False]}}, "tall.*A|misshapen"),
    ({"rank_pattern": {"wide.lora_E": [True, False, False, True]}}, "keeps 2 triplets"),
    ({"rank_pattern": [True]}, "must be an object"), ({"rank_pattern": None}, "misshapen"),
    ({"use_dora": True}, "use_dora = True is not supported"), ({"trainable_token_indices": [3]}, "is not supported"),
    ({"tinit": "x"}, "tinit"), ({"total_step": 3}, "total_step must be above"), ({"init_r": None}, "init_r")])
def test_damaged_files_are_refused(changes, message, tmp_path):
    mp.save_adapter(allocated(), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    for net in (plain(), adapted()):
        with unchanged(net), pytest.raises(ValueError, match=message):
            mp.load_adapter(net, tmp_path)


def test_older_configs_and_the_names_of_adapters_in_rank_pattern(tmp_path):
    net, x = allocated(), inputs(5, 7)
    mp.save_adapter(net, tmp_path)
    config = tmp_path / "adapter_config.json"
    says = json.loads(config.read_text())
    says["total_step"] = None
    says["rank_pattern"] = {f"{key}.default": value for key, value in says["rank_pattern"].items()}
    config.write_text(json.dumps(says))
    assert np.array_equal(mp.load_adapter(plain(), tmp_path)(x).asnumpy(), net(x).asnumpy())


def test_tensors_without_values_of_other_methods_are_still_refused(tmp_path):
    moved(net := mp.get_pet_model(plain(), mp.LoraConfig(2, 3, target_modules=["small"])), 4)
    mp.save_adapter(net, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value[:0].copy() for key, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="holds no value"):
        mp.load_adapter(plain(), tmp_path)


def test_what_cannot_be_allocated():
    net = adapted()
    with pytest.raises(TypeError, match="optimizer of mindspore.nn"):
        mp.RankAllocation(net, net)
    with pytest.raises(ValueError, match="lacks tall"):
        mp.RankAllocation(net, nn.SGD([item for item in net.trainable_params() if "tall" not in item.name]))
    lora = mp.get_pet_model(plain(), mp.LoraConfig(2, 3, target_modules=["small"]))
    for make in (mp.OrthogonalRegularization, lambda one: mp.RankAllocation(one, nn.SGD(one.trainable_params()))):
        with pytest.raises(ValueError, match="the net's method is lora"):
            make(lora)
    two = mp.get_pet_model(plain(), mp.AdaLoraConfig(target_modules=["wide"], total_step=9))
    mp.get_pet_model(two, mp.AdaLoraConfig(target_modules=["small"], total_step=8, orth_reg_weight=1))
    with pytest.raises(ValueError, match="orth_reg_weight must be the same.*0.5 for wide and 1 for small"):
        mp.OrthogonalRegularization(two)
    with pytest.raises(ValueError, match="total_step must be the same"):
        mp.RankAllocation(two, nn.SGD(two.trainable_params()))


@pytest.mark.parametrize(("fields", "message"), [
    ({"total_step": 0}, "total_step"), ({"total_step": None}, "total_step"), ({"init_r": 0}, "init_r"),
    ({"target_r": 5}, "above init_r"), ({"tinit": 11}, "above tinit"), ({"beta1": 1}, "beta1"),
    ({"beta2": 0.0}, "beta2"), ({"orth_reg_weight": -1}, "orth_reg_weight"), ({"lora_alpha": 0}, "lora_alpha"),
    ({"lora_dropout": 1.5}, "lora_dropout"), ({"deltaT": 0}, "deltaT"), ({"_kept": "11"}, "kept must"),
    ({"_kept": [1, 0, 1, 1]}, "kept must"), ({"init_lora_weights": "gaussian"}, "init_lora_weights"),
    ({"bias": "vera_only"}, "bias must be one of none, all, lora_only")])
def test_wrong_settings(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        mp.AdaLoraConfig(**{"target_modules": ["wide"], "init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3,
                            "total_step": 14, **fields})


def test_dropout_and_random_starts(mode):
    net, x = adapted(lora_dropout=0.5), inputs(5, 7)
    net.set_train(False)
    assert np.array_equal(net(x).asnumpy(), adapted()(x).asnumpy())
    net.set_train()
    assert not np.array_equal(net(x).asnumpy(), net(x).asnumpy())
    start = values(adapted(None, init_r=300, target_r=2))["wide"]
    assert abs(start[A].std() - 0.02) < 2e-3 and abs(start[B].std() - 0.02) < 2e-3 and not start[E].any()
    start = values(adapted(None, init_r=300, target_r=2, init_lora_weights=False))["wide"]
    assert abs(start[A].std() - 1) < 0.1 and abs(start[E].std() - 1) < 0.15
