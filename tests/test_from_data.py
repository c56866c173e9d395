"""Starts from what layers are given: EVA and CorDA, against float64 numpy from the papers; and LoftQ."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint, nn, ops
from safetensors.numpy import load_file

import mindpet_lite as mp
from mindpet_lite.delta.lora.eva import PrincipalComponents
from mindpet_lite.delta.lora.loftq import LoftQConfig, nearest_int8, nearest_nf4

RNG = np.random.default_rng(0)
BATCHES = [Tensor(RNG.standard_normal((4, 9, 12)).astype(np.float32) * np.geomspace(0.05, 3, 12).astype(np.float32)
                  + 1) for _ in range(3)]


class Net(nn.Cell):
    """A layer of each linear kind, and one that is called twice."""

    def __init__(self, seed: int = 0, kind: type[nn.Cell] = nn.Dense) -> None:
        super().__init__()
        self.q, self.k, self.v = kind(12, 10), kind(10, 12), mint.nn.Linear(12, 8)
        self.drop = nn.Dropout(p=0.5)
        rng = np.random.default_rng(seed)
        for item in self.get_parameters():
            item.set_data(Tensor(rng.standard_normal(item.shape).astype(np.float32) / 3))

    def construct(self, x):
        hidden = self.k(ops.tanh(self.q(x)))
        return self.v(self.drop(self.k(ops.tanh(self.q(hidden)))))


def adapted(net: nn.Cell, start: str = "eva", **settings) -> nn.Cell:
    return mp.get_pet_model(net, mp.LoraConfig(**{"lora_rank": 4, "lora_alpha": 8, "target_modules": ["q", "k", "v"],
                                                  "init_lora_weights": start, **settings}))


def inputs(net: nn.Cell, batches: list[Tensor]) -> dict[str, list[np.ndarray]]:
    """Return what each layer is given, call by call, in float64."""
    held = {path: item.asnumpy().astype(np.float64) for path, item in net.parameters_and_names()}
    found: dict[str, list[np.ndarray]] = {"q": [], "k": [], "v": []}

    def call(name, x):
        found[name].append(x.reshape(-1, x.shape[-1]))
        return x @ held[f"{name}.weight"].T + held[f"{name}.bias"]

    for batch in batches:
        x = batch.asnumpy().astype(np.float64)
        for _ in range(2):
            x = call("k", np.tanh(call("q", x)))
        call("v", x)
    return found


def same_directions(a: np.ndarray, b: np.ndarray, close: float) -> bool:
    """Tell whether rows are the same directions, but for their signs."""
    a, b = (item / np.linalg.norm(item, axis=1, keepdims=True) for item in (a, b))
    return bool((np.abs((a * b).sum(1)) > 1 - close).all())


def numbers(item) -> np.ndarray:
    return item.asnumpy().astype(np.float64)


def output(net: nn.Cell) -> np.ndarray:
    return net(BATCHES[0]).asnumpy()


@pytest.mark.parametrize("kind", [nn.Dense, mint.nn.Linear])
def test_eva_starts_with_the_directions_of_what_layers_are_given(kind, mode):
    net, plain = Net(kind=kind).set_train(False), Net(kind=kind).set_train(False)
    before = output(plain)
    adapted(net, eva_config={"rho": 1, "tau": 1})
    net.v.set_train(True)
    hooks = {path: dict(vars(cell)).keys() for path, cell in net.cells_and_names()}
    assert mp.initialize_from_data(net, BATCHES) is net
    assert ms.get_context("mode") == {"graph": ms.GRAPH_MODE, "pynative": ms.PYNATIVE_MODE}[mode]
    assert net.v.training and not net.q.training and not net.drop.training
    assert {path: dict(vars(cell)).keys() for path, cell in net.cells_and_names()} == hooks
    for path, calls in inputs(plain, BATCHES).items():
        layer, rows = getattr(net, path), np.concatenate(calls)
        wanted = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:4]
        assert same_directions(numbers(layer.mindpet_delta_lora_a), wanted, 1e-6), path
        np.testing.assert_allclose(np.linalg.norm(numbers(layer.mindpet_delta_lora_a), axis=1), 1, rtol=1e-5)
        assert not layer.mindpet_delta_lora_b.asnumpy().any()
    assert np.array_equal(output(net.set_train(False)), before)


def test_eva_shares_out_the_ranks(mode):
    net, plain = Net().set_train(False), Net().set_train(False)
    before = output(plain)
    adapted(net, lora_rank=3, eva_config={"rho": 2, "tau": 1, "whiten": True}, use_rslora=mode == "graph")
    scale = net.q.scaling.asnumpy()
    net(BATCHES[0])
    mp.initialize_from_data(net, BATCHES)
    decomposed, parts = {}, []
    for path, calls in inputs(plain, BATCHES).items():
        rows = np.concatenate(calls)
        _, values, directions = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        decomposed[path] = values, directions
        parts += [(ratio, path) for ratio in (values ** 2 / (values ** 2).sum())[:6]]
    chosen = [path for _, path in sorted(parts, reverse=True)[:9]]
    ranks = {path: chosen.count(path) for path in decomposed}
    assert len(set(ranks.values())) > 1 and sum(ranks.values()) == 9
    for path, rank in ranks.items():
        layer, (values, directions) = getattr(net, path), decomposed[path]
        assert layer.lora_rank == rank and layer.mindpet_delta_lora_b.shape == (layer.weight.shape[0], rank)
        a = numbers(layer.mindpet_delta_lora_a)
        assert same_directions(a, directions[:rank], 1e-6)
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1 / np.sqrt(values[:rank]), rtol=1e-4)
        # alpha follows the rank.
        np.testing.assert_allclose(layer.scaling.asnumpy(), scale, rtol=1e-6)
    assert [item.name for item in net.trainable_params()] == [
        f"{path}.mindpet_delta_lora_{name}" for path in "qkv" for name in "ab"]
    assert np.array_equal(output(net), before)
    shaken(net)
    wanted = output(net)
    mp.save_adapter(net, "out")
    assert np.array_equal(output(mp.load_adapter(Net().set_train(False), "out", strict_base=True)), wanted)
    mp.merge(net)
    np.testing.assert_allclose(output(net), wanted, rtol=1e-4, atol=1e-5)


def shaken(net: nn.Cell) -> nn.Cell:
    rng = np.random.default_rng(7)
    for item in net.trainable_params():
        item.set_data(item + Tensor(rng.standard_normal(item.shape).astype(np.float32) / 9))
    return net


class Two(nn.Cell):
    """Two layers with inputs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Dense(6, 6), nn.Dense(6, 6)

    def construct(self, x, z):
        return self.k(z) + self.q(x)


@pytest.mark.parametrize("adjust", [True, False])
def test_a_layer_without_a_rank_is_plain_again(adjust, mode):
    net = mp.get_pet_model(Two(), mp.LoraConfig(1, 4, target_modules=["q", "k"], init_lora_weights="eva", bias="all",
                                                eva_config={"rho": 2, "adjust_scaling_factors": adjust}))
    rng = np.random.default_rng(3)
    # The variance of q's input lies in two directions, that of k's in six.
    batch = {"x": rng.standard_normal((90, 6)) * [1, 0, 1, 0, 0, 0], "z": rng.standard_normal((90, 6))}
    batch = {name: Tensor(value.astype(np.float32)) for name, value in batch.items()}
    before = net(**batch).asnumpy()
    mp.initialize_from_data(net, [batch])
    assert type(net.k) is nn.Dense and net.q.lora_rank == 2
    assert net.q.lora_alpha == (8 if adjust else 4) and net.q.scaling.asnumpy() == (4 if adjust else 2)
    assert np.array_equal(net(**batch).asnumpy(), before)
    with mp.adapters_disabled(net):
        assert np.array_equal(net(**batch).asnumpy(), before)
    assert {item.name for item in net.trainable_params()} == {
        "q.mindpet_delta_lora_a", "q.mindpet_delta_lora_b", "q.bias", "k.bias"}
    mp.save_adapter(shaken(net), "out")
    assert {key.rpartition("model.")[2] for key in load_file("out/adapter_model.safetensors")} == {
        "q.lora_A.weight", "q.lora_B.weight", "q.base_layer.bias", "k.bias"}


def test_the_data_end_where_all_directions_have_settled(pynative_mode):
    read = []

    def batches():
        for number in range(20):
            read.append(number)
            yield BATCHES[0]

    mp.initialize_from_data(adapted(Net().set_train(False), target_modules=["v"]), batches())
    assert len(read) == 2


def test_places_that_a_mask_leaves_out_do_not_count(pynative_mode):
    net, x = adapted(Net(), target_modules=["q"], eva_config={"rho": 1}), BATCHES[0]
    mask, labels = np.ones((4, 9), np.int32), np.zeros((4, 9), np.int32)
    mask[:, 5:], labels[0] = 0, -100
    batch = {"attention_mask": Tensor(mask), "labels": Tensor(labels)}
    net.construct = lambda value: net.q(value)
    mp.initialize_from_data(net, [batch], forward=lambda cell, batch: cell.q(x))
    rows = x.asnumpy().astype(np.float64)[1:, :5].reshape(-1, 12)
    wanted = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:4]
    assert same_directions(numbers(net.q.mindpet_delta_lora_a), wanted, 1e-6)
    with pytest.raises(ValueError, match=r"the mask of the batch has the shape \(2, 2\), but its input \(4, 9, 12\)"):
        mp.initialize_from_data(adapted(Net()), [{"labels": np.zeros((2, 2))}], forward=lambda cell, batch: cell(x))


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_takes_directions_of_what_layers_are_given_out_of_the_weight(method, mode):
    net, plain = Net().set_train(False), Net().set_train(False)
    before = output(plain)
    adapted(net, "corda", corda_config={"corda_method": method})
    assert np.array_equal(output(net), before)
    mp.initialize_from_data(net, [(batch,) for batch in BATCHES])
    np.testing.assert_allclose(output(net), before, rtol=1e-4, atol=1e-5)
    for path, calls in inputs(plain, BATCHES).items():
        layer, weight = getattr(net, path), numbers(getattr(plain, path).weight)
        scaled = [rows / np.abs(rows).max() for rows in calls]
        c = sum(rows.T @ rows for rows in scaled) / len(scaled)
        c = c + 0.01 * np.diag(c).mean() * np.eye(len(c))
        u, s, vt = np.linalg.svd(weight @ c, full_matrices=False)
        part = slice(4) if method == "ipm" else slice(-4, None)
        wanted = u[:, part] * s[part] @ vt[part] @ np.linalg.inv(c)
        a, b = numbers(layer.mindpet_delta_lora_a), numbers(layer.mindpet_delta_lora_b)
        np.testing.assert_allclose(2 * b @ a, wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(numbers(layer.weight), weight - wanted, rtol=1e-4, atol=1e-5)
        # The singular values are shared between both.
        np.testing.assert_allclose(np.linalg.norm(b, axis=0), np.sqrt(s[part] / 2), rtol=1e-4)
    shaken(net)
    wanted = output(net)
    mp.save_adapter(net, "out")
    with pytest.raises(ValueError, match="'corda', took a part out of the base's weights that the file does not tell"):
        mp.load_adapter(Net(), "out")
    rest = Net().set_train(False)
    for path, item in rest.parameters_and_names():
        item.set_data(Tensor(dict(net.parameters_and_names())[path].asnumpy()))
    assert np.array_equal(output(mp.load_adapter(rest, "out", strict_base=True)), wanted)
    with pytest.raises(ValueError, match="took a part out of the base"), mp.adapters_disabled(net):
        pass
    mp.merge(net)
    np.testing.assert_allclose(output(net), wanted, rtol=1e-4, atol=1e-5)


def nan_batch() -> list[Tensor]:
    value = BATCHES[1].asnumpy().copy()
    value[0, 0, 0] = np.nan
    return [BATCHES[0], Tensor(value)]


@pytest.mark.parametrize("make, batches, message", [
    (lambda: adapted(Net()), [], "There is no batch"), (lambda: adapted(Net()), nan_batch(), "q: it is given NaN"),
    (lambda: adapted(Net()), [ops.zeros((1, 3, 12), ms.float32)], "v: the data have 3 rows for it"),
    (lambda: adapted(Net(), "corda", target_modules=["q"]), [ops.ones((0, 3, 12), ms.float32)], "q: no batch gave it"),
    (lambda: adapted(Net(), "pissa"), BATCHES, "No adapter of the net waits for data"),
    (lambda: shaken(adapted(Net())), BATCHES, "q, k, v: trained already")])
def test_what_cannot_start_is_refused(make, batches, message, pynative_mode):
    net = make()
    before = [item.asnumpy() for item in net.get_parameters()]
    cells = [cell for _, cell in net.cells_and_names()]
    with pytest.raises(ValueError, match=message):
        mp.initialize_from_data(net, batches)
    assert all(np.array_equal(item.asnumpy(), value) for item, value in zip(net.get_parameters(), before))
    assert [cell for _, cell in net.cells_and_names()] == cells and net.drop.training == Net().drop.training


def test_a_layer_that_is_given_zeros_alone_has_no_covariance(pynative_mode):
    with pytest.raises(ValueError, match="q: all that it is given is 0"):
        mp.initialize_from_data(adapted(Net(), "corda", target_modules=["q"]), [ops.zeros((2, 12), ms.float32)],
                                forward=lambda net, batch: net.q(batch))


def test_a_layer_that_nobody_calls_is_named(pynative_mode):
    with pytest.raises(ValueError, match="v: no batch gave it anything"):
        mp.initialize_from_data(adapted(Net()), BATCHES, forward=lambda net, batch: net.k(net.q(batch)))


def test_an_optimizer_before_the_data_is_refused(pynative_mode):
    net = adapted(Net())
    with pytest.raises(ValueError, match="q, k, v still wait for the data"):
        mp.check_optimizer(net, nn.Adam(net.trainable_params()))
    mp.initialize_from_data(net, BATCHES)
    mp.check_optimizer(net, nn.Adam(net.trainable_params()))
    with pytest.raises(ValueError, match="No adapter of the net waits"):
        mp.initialize_from_data(net, BATCHES)


@pytest.mark.parametrize("settings, error, message", [
    ({"eva_config": {"rho": 0.5}}, ValueError, "rho must be"), ({"eva_config": {"tau": 2}}, ValueError, "tau must be"),
    ({"eva_config": {"row": 1}}, ValueError, "eva_config has no field 'row' here"),
    ({"eva_config": [2]}, TypeError, "eva_config must be a mapping"),
    ({"eva_config": {"whiten": 1}}, TypeError, "whiten must be True or False"),
    ({"corda_config": {"corda_method": "kpm"}}, ValueError, "corda_config is for init_lora_weights 'corda'"),
    ({"init_lora_weights": "corda", "corda_config": {"corda_method": "imp"}}, ValueError, "Did you mean 'ipm'"),
    ({"init_lora_weights": "corda", "corda_config": {"cache_file": "x"}}, ValueError, "no field 'cache_file' here"),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, ValueError, "loftq_bits must be 4 or 8"),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 0}}, ValueError, "loftq_iter must be a positive"),
    ({"lora_rank": 9}, ValueError, "v: init_lora_weights 'eva' takes lora_rank 9 of a weight of rank 8 at most"),
    ({"init_lora_weights": "corda", "use_dora": True}, ValueError, "does not go with use_dora")])
def test_wrong_settings(settings, error, message, pynative_mode):
    with pytest.raises(error, match=message):
        adapted(Net(), **{"start": "eva", **({"start": settings["init_lora_weights"]} if "init_lora_weights" in settings
                                             else {}), **{key: value for key, value in settings.items()
                                                          if key != "init_lora_weights"}})


class Tied(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Dense(6, 6, has_bias=False), nn.Dense(6, 6, has_bias=False)
        self.k.weight = self.q.weight


@pytest.mark.parametrize("start", ["corda", "loftq"])
def test_a_weight_that_another_layer_uses_loses_no_part(start, pynative_mode):
    with pytest.raises(ValueError, match="takes a part out of the weight, which stands at q.weight, k.weight"):
        mp.get_pet_model(Tied(), mp.LoraConfig(2, 4, target_modules=["q"], init_lora_weights=start))


def test_components_of_batches_are_those_of_all_rows():
    rows = np.random.default_rng(5).standard_normal((90, 30)) * 0.6 ** np.arange(30) + 2
    found = PrincipalComponents(4)
    for part in np.split(rows, [7, 40, 41]):
        found.add(part)
    _, values, directions = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    np.testing.assert_allclose(found.mean, rows.mean(0))
    np.testing.assert_allclose(found.squares, np.square(rows - rows.mean(0)).sum(0))
    np.testing.assert_allclose(found.values[:4], values[:4], rtol=1e-4)
    assert same_directions(found.directions[:4], directions[:4], 1e-4) and len(found.explained()) == 4


# LoftQ

def test_nf4_takes_the_nearest_of_16_values():
    weight = np.random.default_rng(0).standard_normal((10, 13))
    quantised, flat = nearest_nf4(weight), weight.reshape(-1)
    levels = np.unique(nearest_nf4(np.linspace(-1, 1, 4096).reshape(-1, 64) * 0 + np.r_[1, np.linspace(-1, 1, 63)]))
    assert len(levels) <= 16 and {-1.0, 0.0, 1.0} <= set(levels)
    for start in range(0, flat.size, 64):
        block = flat[start:start + 64]
        wanted = np.abs(block).max() * ALL_LEVELS[np.abs(block[:, None] / np.abs(block).max() - ALL_LEVELS).argmin(1)]
        np.testing.assert_allclose(quantised.reshape(-1)[start:start + 64], wanted, rtol=1e-12)
    assert not nearest_nf4(np.zeros((3, 5))).any() and not nearest_int8(np.zeros((3, 5))).any()


# From the paper of QLoRA: quantiles of the normal distribution, each side by itself, with a zero.
ALL_LEVELS = np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                       0.7229568362236023, 1.0])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("turns", [1, 5])
def test_loftq_comes_near_to_the_weight(bits, turns):
    weight = np.random.default_rng(1).standard_normal((24, 32))
    quantised = nearest_nf4 if bits == 4 else nearest_int8
    product = np.zeros_like(weight)
    for _ in range(turns):
        left = quantised(weight - product)
        u, s, vt = np.linalg.svd(weight - left)
        product = sum(s[i] * np.outer(u[:, i], vt[i]) for i in range(6))
    a, b, found = LoftQConfig(bits, turns).decompose(weight.astype(np.float32), 6, 1.5)
    np.testing.assert_allclose(found, left, atol=1e-5)
    np.testing.assert_allclose(1.5 * b @ a, product, atol=1e-4)
    assert np.linalg.norm(weight - found - 1.5 * b @ a) < np.linalg.norm(weight - quantised(weight))


@pytest.mark.parametrize("bits, near", [(4, 0.3), (8, 0.03)])
def test_loftq_quantises_the_base_by_injection(bits, near, mode):
    net, plain = Net().set_train(False), Net().set_train(False)
    before = output(plain)
    adapted(net, "loftq", loftq_config={"loftq_bits": bits, "loftq_iter": 2})
    assert np.abs(output(net) - before).max() < near * np.abs(before).max()
    layer, weight = net.q, numbers(plain.q.weight)
    a, b, left = LoftQConfig(bits, 2).decompose(weight, 4, 2)
    np.testing.assert_allclose(numbers(layer.weight), left, atol=1e-6)
    np.testing.assert_allclose(numbers(layer.mindpet_delta_lora_b) @ numbers(layer.mindpet_delta_lora_a), b @ a,
                               atol=1e-5)
    # A base that is loaded later is quantised too.
    other = Net(3).set_train(False)
    ms.load_param_into_net(net, {item.name: item for item in other.get_parameters()})
    np.testing.assert_allclose(numbers(net.q.weight), LoftQConfig(bits, 2).decompose(numbers(other.q.weight), 4, 2)[2],
                               atol=1e-6)
    shaken(net)
    wanted = output(net)
    mp.save_adapter(net, "out")
    again = adapted(Net(3).set_train(False), "loftq", loftq_config={"loftq_bits": bits, "loftq_iter": 2})
    assert np.array_equal(output(mp.load_adapter(again, "out", strict_base=True)), wanted)
    with pytest.raises(ValueError, match="'loftq', took a part out"):
        mp.load_adapter(Net(3), "out")
    assert load_file("out/adapter_model.safetensors").keys() == {
        f"base_model.model.{path}.lora_{name}.weight" for path in "qkv" for name in "AB"}
