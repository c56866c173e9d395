"""LoRA on Parameters of users' cells: matrices and stacks of experts, against float64 numpy, as PEFT lays them out."""
from __future__ import annotations

import copy
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from safetensors.numpy import load_file, save_file

import mindpet_lite as mp
from mindpet_lite.offline.merge import merge as merge_files

X = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)


class Router(nn.Cell):
    """Reads its matrix by itself, in a method beside `construct`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(np.ones((3, 6), np.float32)), name="weight")

    def construct(self, x):
        return ops.softmax(self.scores(x), -1)

    def scores(self, x):
        return ops.matmul(x, self.weight.T)


class Experts(nn.Cell):
    """A stack of matrices (experts, out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.bias = (Parameter(Tensor(np.ones(shape, np.float32)), name=name)
                              for name, shape in (("up", (3, 4, 6)), ("bias", (3, 4))))
        self.act = nn.Tanh()

    def construct(self, x, gates):
        y = 0
        for expert in range(3):
            y = y + gates[:, expert:expert + 1] * self.act(ops.matmul(x, self.up[expert].T) + self.bias[expert])
        return y


class TurnedExperts(nn.Cell):
    """A stack of matrices (experts, in, out)."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up = Parameter(Tensor(np.ones((3, 6, 4), np.float32)), name="up")

    def construct(self, x, gates):
        y = ops.BatchMatMul()(ops.broadcast_to(x, (3, *x.shape)), self.up)
        return (ops.transpose(y, (1, 2, 0)) * ops.expand_dims(gates, 1)).sum(-1)


class Net(nn.Cell):
    def __init__(self, kind: type[nn.Cell] = Experts, seed: int = 0) -> None:
        super().__init__()
        self.router, self.experts, self.head = Router(), kind(), nn.Dense(4, 2)
        rng = np.random.default_rng(seed)
        for item in self.get_parameters():
            item.set_data(Tensor(rng.standard_normal(item.shape).astype(np.float32) / 2))

    def construct(self, x):
        return self.head(self.experts(x, self.router(x)))


def adapted(net: nn.Cell, **settings) -> nn.Cell:
    return mp.get_pet_model(net, mp.LoraConfig(**{"lora_rank": 2, "lora_alpha": 4, "target_parameters": [
        "router.weight", "experts.up"], **settings}))


def shaken(net: nn.Cell) -> nn.Cell:
    rng = np.random.default_rng(7)
    for item in net.trainable_params():
        item.set_data(Tensor(rng.standard_normal(item.shape).astype(np.float32) / 2))
    return net


def output(net: nn.Cell) -> np.ndarray:
    return net(Tensor(X)).asnumpy()


def reference(net: nn.Cell, strength: float = 1.0) -> float:
    """Return the sum of squares of the output from the net's numbers."""
    held = {path: item.asnumpy().astype(np.float64) for path, item in net.parameters_and_names()}
    return loss_of(held, isinstance(net.experts, TurnedExperts), strength)


def loss_of(held: dict[str, np.ndarray], is_turned: bool, strength: float = 1.0) -> float:
    a, b = (held[f"experts.mindpet_delta_lora_{name}"] for name in "ab")
    a, b = a.reshape(3, 2, -1), b.reshape(-1, 2, 3)
    up = held["experts.up"] + 2 * strength * np.einsum("ore,eri->eio" if is_turned else "ore,eri->eoi", b, a)
    up = up.transpose(0, 2, 1) if is_turned else up
    low = held["router.mindpet_delta_lora_b"] @ held["router.mindpet_delta_lora_a"]
    scores = X @ (held["router.weight"] + 2 * strength * low).T
    gates = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    y = np.einsum("ni,eoi->neo", X, up)
    y = y if is_turned else np.tanh(y + held["experts.bias"])
    y = np.einsum("neo,ne->no", y, gates) @ held["head.weight"].T + held["head.bias"]
    return float(np.square(y).sum())


def slope(held: dict[str, np.ndarray], name: str, is_turned: bool) -> np.ndarray:
    """Return the gradient of `loss_of` for one tensor, by central differences in float64."""
    found = np.zeros_like(held[name])
    for place in np.ndindex(found.shape):
        for sign in (1, -1):
            moved = held[name].copy()
            moved[place] += sign * 1e-5
            found[place] += sign * loss_of({**held, name: moved}, is_turned) / 2e-5
    return found


@pytest.mark.parametrize("kind", [Experts, TurnedExperts])
def test_start_numbers_gradients_strength_and_merge(kind, mode):
    plain, net = Net(kind), Net(kind)
    before, names = output(plain), [item.name for item in plain.get_parameters()]
    output(net)
    adapted(net)
    assert np.array_equal(output(net), before)
    assert {item.name for item in net.trainable_params()} == {
        f"{cell}.mindpet_delta_lora_{name}" for cell in ("router", "experts") for name in "ab"}
    assert set(names) <= {item.name for item in net.get_parameters()} and isinstance(net.experts, kind)
    assert [row[0] for row in mp.summary(net).rows] == ["router", "experts"]
    shaken(net)
    trained = output(net)
    np.testing.assert_allclose(np.square(trained).sum(), reference(net), rtol=1e-5)
    parameters = net.trainable_params()

    def loss(x):
        return net(x).square().sum()

    held = {path: item.asnumpy().astype(np.float64) for path, item in net.parameters_and_names()}
    for item, gradient in zip(parameters, ms.grad(loss, None, parameters)(Tensor(X))):
        np.testing.assert_allclose(gradient.asnumpy(), slope(held, item.name, kind is TurnedExperts), rtol=1e-3,
                                   atol=1e-4)
    mp.set_lora_scale(net, 0.5)
    np.testing.assert_allclose(np.square(output(net)).sum(), reference(net, 0.5), rtol=1e-5)
    mp.set_lora_scale(net, 1)
    with mp.adapters_disabled(net):
        assert np.array_equal(output(net), before)
    copied = copy.deepcopy(net)
    assert np.array_equal(output(copied), trained)
    assert mp.check_adapters(net, Tensor(X)) == ["router", "experts"]
    mp.merge(net)
    assert type(net.experts) is kind and type(net.router) is Router
    np.testing.assert_allclose(output(net), trained, rtol=1e-4, atol=1e-5)
    assert [item.name for item in net.get_parameters()] == names
    mp.unmerge(net)
    assert np.array_equal(output(net), trained)


@pytest.mark.parametrize("kind", [Experts, TurnedExperts])
def test_files_are_pefts_and_come_back(kind, pynative_mode):
    net = shaken(adapted(Net(kind), lora_alpha=3, use_rslora=True))
    mp.save_adapter(net, "out")
    assert {key: value.shape for key, value in load_file("out/adapter_model.safetensors").items()} == {
        "base_model.model.router.lora_A.weight": (2, 6), "base_model.model.router.lora_B.weight": (3, 2),
        "base_model.model.experts.lora_A.weight": (6, 6), "base_model.model.experts.lora_B.weight": (4, 6)}
    loaded = mp.load_adapter(Net(kind), "out", strict_base=True)
    assert np.array_equal(output(loaded), output(net))
    mp.load_adapter(adapted(Net(kind)), "out")
    mp.save_adapter(loaded, "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert Path("again", name).read_bytes() == Path("out", name).read_bytes()
    for format, place in (("kohya", "out.safetensors"), ("mindformers", "other")):
        with pytest.raises(ValueError, match="target_parameter"):
            mp.save_adapter(net, place, format=format)
    save_file({item.name: item.asnumpy() for item in Net(kind).get_parameters()}, "base.safetensors")
    with pytest.raises(ValueError, match="adapts the Parameter 'up' of a cell .target_parameters."):
        merge_files(Path("base.safetensors"), Path("out"), Path("merged"), quiet=True)


def test_the_weight_of_a_linear_layer_is_adapted_like_the_layer(mode):
    net, layers = (shaken(mp.get_pet_model(Net(), mp.LoraConfig(2, 4, **settings))) for settings in (
        {"target_parameters": ["head.weight"]}, {"target_modules": ["head"]}))
    assert type(net.head) is type(layers.head) and np.array_equal(output(net), output(layers))
    mp.save_adapter(net, "out")
    mp.save_adapter(mp.load_adapter(Net(), "out"), "again")
    assert Path("again/adapter_config.json").read_bytes() == Path("out/adapter_config.json").read_bytes()
    assert np.array_equal(output(mp.load_adapter(Net(), "out")), output(layers))
    both = adapted(Net(), target_modules=["head"])
    assert list(mp.summary(both).rows)[-1][0] == "head"


class Inner(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = Parameter(Tensor(np.ones((3, 6), np.float32)), name="up"), nn.Dense(6, 6)


class Layers(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.inner, self.conv, self.table = Net(), Inner(), nn.Conv2d(2, 2, 1), nn.Embedding(5, 4)


@pytest.mark.parametrize("settings, message", [
    ({"target_parameters": ["experts.down"]}, "entry 'experts.down' hits no Parameter.*Did you mean"),
    ({"target_parameters": ["experts.up", "experts.bias"]}, "hits net.experts, which is adapted already"),
    ({"target_parameters": ["experts.bias"], "lora_dropout": 0.1}, "lora_dropout is of layers"),
    ({"use_dora": True}, "use_dora is of layers"), ({"lora_bias": True}, "lora_bias is of layers"),
    ({"target_parameters": ["head.bias"]}, "not bias of a Dense"),
    ({"target_parameters": ["conv.weight"]}, "not weight of a Conv2d"),
    ({"target_parameters": ["table.embedding_table"]}, "not embedding_table of a Embedding"),
    ({"target_parameters": ["inner.up"]}, "cells below it hold Parameters too, such as inner.gate.weight"),
    ({"init_lora_weights": "pissa"}, "'pissa' is for linear layers"),
    ({"target_parameters": ["head.weight"], "target_modules": ["head"]}, "net.head: it is adapted twice"),
    ({"target_parameters": "experts.up"}, "must be a non-empty list")])
def test_what_cannot_be_adapted_is_refused(settings, message, pynative_mode):
    net = Layers()
    cells = [cell for _, cell in net.cells_and_names()]
    with pytest.raises((ValueError, TypeError), match=message):
        adapted(net, **settings)
    assert [cell for _, cell in net.cells_and_names()] == cells


def test_what_is_adapted_is_not_adapted_again(pynative_mode):
    net = adapted(Net())
    with pytest.raises(ValueError, match="adapted already; merge.. it first"):
        adapted(net)
