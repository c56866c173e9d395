"""`register_host`: kinds of layers that stand in no library here, added as a user adds them."""
from __future__ import annotations

from typing import Any

import cases_adapter
import host_layers
import mindspore as ms
import numpy as np
import pytest
import test_methods
from mindspore import Parameter, Tensor, nn, ops
from nets import gradient_function, inputs, numbers, unchanged

import mindpet_lite as mp
from mindpet_lite.delta.hosts import HOSTS, DenseHost, fits_kind, host_of, is_linear

RNG = np.random.default_rng(0)


def parameter(*shape: int) -> Parameter:
    return Parameter(Tensor(RNG.standard_normal(shape).astype(np.float32)))


class Projection(nn.Cell):
    """y = x K + c, by names and a layout of its own."""

    def __init__(self, wide: int, narrow: int):
        super().__init__()
        self.wide, self.kernel, self.offset = wide, parameter(wide, narrow), parameter(narrow)

    def construct(self, x):
        return ops.matmul(x, self.kernel) + self.offset


class Plain(nn.Cell):
    """y = x Wᵀ, with a bias that may be None."""

    def __init__(self, wide: int, narrow: int, has_bias: bool = False):
        super().__init__()
        self.weight, self.bias = parameter(narrow, wide), parameter(narrow) if has_bias else None

    def construct(self, x):
        y = ops.matmul(x, self.weight.T)
        return y if self.bias is None else y + self.bias


class Halved(nn.Cell):
    """y = sigmoid(x Wᵀ / 2 + b): what a user writes a kind for."""

    def __init__(self, wide: int, narrow: int):
        super().__init__()
        self.weight, self.bias, self.half = parameter(narrow, wide), parameter(narrow), 0.5

    def construct(self, x):
        return ops.sigmoid(ops.matmul(x * self.half, self.weight.T) + self.bias)


class HalvedHost(mp.Host, Halved):
    """The kind of `Halved`, step by step."""

    plain_type, plain_name, parts, is_linear = Halved, "Halved", ("half",), True

    def linear(self, h, weight, dtype):
        return ops.matmul(h * self.half, weight.T)

    def affine(self, h, weight, dtype):
        return self.linear(h, weight, dtype) + self.bias

    def finish(self, y, shape, output_type, dtype):
        return ops.sigmoid(y).astype(output_type)

    def add_low_rank_operators(self, rank):
        """Make nothing."""

    def narrow(self, h, a, dtype):
        return ops.matmul(h * self.half, a.T)

    def widen(self, low, b, dtype):
        return ops.matmul(low, b.T)


class Table(nn.Cell):
    """Rows of a table, each doubled."""

    def __init__(self, ids: int, size: int):
        super().__init__()
        self.rows_of = parameter(ids, size)

    def construct(self, x):
        return self.rows_of[x] * 2


PROJECTION = mp.linear_host(Projection, weight="kernel", bias="offset", is_turned=True)
PLAIN = mp.linear_host(Plain)
# By the kind: what makes a layer, and what it computes in float64 for a weight (outputs, inputs).
KINDS = {PROJECTION: (lambda: Projection(8, 4), lambda x, w, b: x @ w.T + b),
         PLAIN: (lambda: Plain(8, 4), lambda x, w, b: x @ w.T),
         HalvedHost: (lambda: Halved(8, 4), lambda x, w, b: 1 / (1 + np.exp(-(x @ w.T / 2 + b))))}
X = inputs(2, 3, 8)


@pytest.fixture(autouse=True)
def registered():
    for kind in KINDS:
        assert mp.register_host(kind) is kind
    yield
    for kind in KINDS:
        mp.unregister_host(kind)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.plain_name)
def test_lora_is_the_formula_and_its_gradients(kind, mode):
    make, formula = KINDS[kind]
    net = nn.SequentialCell(make())
    layer, before = net[0], net(X).asnumpy()
    mp.get_pet_model(net, mp.LoraConfig(2, 6, target_modules="all-linear"))
    assert np.array_equal(net(X).asnumpy(), before)
    assert isinstance(net[0], kind) and host_of(net[0]) is kind and getattr(net[0], kind.base_names[0]) is getattr(
        layer, kind.base_names[0])
    assert [item.name for item in net.trainable_params()] == ["0.mindpet_delta_lora_a", "0.mindpet_delta_lora_b"]
    a, b = net.trainable_params()
    b.set_data(Tensor(RNG.standard_normal(b.shape).astype(np.float32)))
    base = {name: value.astype(np.float64) for name, value in net[0].base_numbers().items()}
    weights, x = RNG.standard_normal(before.shape), numbers(X)

    def loss(a, b):
        return np.sum(weights * formula(x, base["weight"] + 3 * b @ a, base.get("bias", 0)))

    values = [numbers(a), numbers(b)]
    y, _, slopes = gradient_function(net, [a, b], X, weights)()
    np.testing.assert_allclose(y.asnumpy(), formula(x, base["weight"] + 3 * values[1] @ values[0], base.get("bias", 0)),
                               rtol=1e-5, atol=1e-5)
    for which, slope in enumerate(slopes):
        for at in np.ndindex(*slope.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [value.copy() for value in values]
                moved[which][at] += step
                ends.append(loss(*moved))
            assert abs((ends[0] - ends[1]) / 2e-6 - slope.asnumpy()[at]) < 1e-3


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.plain_name)
@pytest.mark.parametrize("method", ["hira", "ia3", "oft", "loha", "vera", "adalora"])
def test_the_laws_of_methods(method, kind, monkeypatch, tmp_path):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    monkeypatch.setitem(host_layers.LAYERS, kind, (KINDS[kind][0], X))
    test_methods.test_the_laws(method, kind, 0, "pynative", tmp_path)


def test_a_law_in_a_graph(graph_mode, monkeypatch, tmp_path):
    monkeypatch.setitem(host_layers.LAYERS, PROJECTION, (KINDS[PROJECTION][0], X))
    test_methods.test_the_laws("ia3", PROJECTION, 0, "graph", tmp_path)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_lora_is_saved_loaded_merged_and_taken_back(config, mode, tmp_path):
    def net():
        cell = nn.SequentialCell(Projection(8, 6), nn.ReLU(), Plain(6, 4, has_bias=True))
        for seed, item in enumerate(cell.get_parameters()):
            item.set_data(Tensor(np.random.default_rng(seed).standard_normal(item.shape).astype(np.float32)))
        return cell

    first = mp.get_pet_model(net(), mp.LoraConfig(2, 4, target_modules="all-linear", **config))
    assert first[0].wide == 8, "what the cells around a layer may read stays"
    for item in first.trainable_params():
        item.set_data(Tensor(item.asnumpy() + RNG.standard_normal(item.shape).astype(np.float32)))
    y = first(X).asnumpy()
    for layout in ("own", "peft"):
        mp.save_adapter(first, tmp_path / layout, **({"format": "peft"} if layout == "peft" else {}))
        assert np.array_equal(mp.load_adapter(net(), tmp_path / layout)(X).asnumpy(), y)
    mp.merge(first)
    assert type(first[0]) is Projection and type(first[2]) is Plain
    np.testing.assert_allclose(first(X).asnumpy(), y, rtol=1e-5, atol=1e-5)
    mp.unmerge(first)
    assert np.array_equal(first(X).asnumpy(), y)
    if not config:
        mp.add_adapter(first, "second", mp.LoraConfig(3, 4, target_modules="all-linear"))
        mp.set_adapter(first, "second")
        np.testing.assert_allclose(first(X).asnumpy(), net()(X).asnumpy(), rtol=1e-5, atol=1e-5)
        mp.set_adapter(first, "default")
        np.testing.assert_allclose(first(X).asnumpy(), y, rtol=1e-5, atol=1e-5)


def test_compute_dtype_and_to_float(mode):
    net = mp.get_pet_model(nn.SequentialCell(Projection(8, 4)),
                           mp.LoraConfig(2, 4, target_modules=["0"], compute_dtype=ms.float16))
    assert net(X).dtype == ms.float32
    y = net(X).asnumpy()
    mp.merge(net)
    assert isinstance(net[0], PROJECTION) and net(X).dtype == ms.float32
    assert np.array_equal(net(X).asnumpy(), y)


def test_a_kind_of_dense_goes_before_dense_and_a_child_before_its_parent():
    class Scaled(nn.Dense):
        def construct(self, x):
            return self.matmul(x, self.weight) + self.bias

    class Child(Scaled):
        def construct(self, x):
            return self.matmul(x, self.weight) + self.bias

    net = nn.SequentialCell(Scaled(8, 4))
    assert host_of(net[0]) is DenseHost
    with unchanged(net), pytest.raises(ValueError, match="Scaled overrides nn.Dense.construct"):
        mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
    kinds = [mp.register_host(mp.linear_host(item)) for item in (Scaled, Child)]
    try:
        assert host_of(Scaled(2, 2)) is kinds[0] and host_of(Child(2, 2)) is kinds[1]
        assert host_of(nn.Dense(2, 2)) is DenseHost
        assert isinstance(mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))[0], kinds[0])
    finally:
        for kind in kinds:
            mp.unregister_host(kind)
    assert host_of(Child(2, 2)) is DenseHost


def test_every_method_fits_that_fits_all_of_the_nature():
    fitting = {name for name, kind in test_methods.HOSTED.items() if fits_kind(PLAIN, kind.fits)}
    assert fitting == {name for name, kind in test_methods.HOSTED.items()
                       if all(host in kind.fits for host in HOSTS if not host.takes_ids and not host.dims)}
    assert {"ia3", "vera", "oft", "loha"} <= fitting
    assert is_linear(Plain(2, 2)) and is_linear(Halved(2, 2))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.plain_name)
def test_what_changes_the_output_stands_behind_it(kind, mode):
    net = nn.SequentialCell(KINDS[kind][0]())
    names, before = [item.name for item in net.get_parameters()], net(X).asnumpy()
    mp.get_pet_model(net, mp.AdapterConfig(bottleneck_size=2, non_linearity="tanh", target_modules=["0"]))
    layer = net[0]
    assert np.array_equal(net(X).asnumpy(), before)
    assert [item.name for item in net.get_parameters() if "delta" not in item.name and item is not layer.scaling
            ] == names
    for item in net.trainable_params():
        item.set_data(Tensor((0.1 * RNG.standard_normal(item.shape)).astype(np.float32)))
    wanted, _, _ = cases_adapter.of_layer(layer.bottleneck, before.astype(np.float64), np.ones(before.shape))
    np.testing.assert_allclose(net(X).asnumpy(), wanted, rtol=1e-5, atol=1e-5)
    net = nn.SequentialCell(layer.plain_cell())
    mp.get_pet_model(net, mp.Ptuning2Config(pre_seq_len=2, target_modules=["0"]))
    rows = net[0].mindpet_delta_ptuning2_embedding.embedding_table.asnumpy()
    assert np.array_equal(net(X).asnumpy(), np.concatenate([np.stack([rows] * 2), before], 1))


def refused(error: type[Exception], text: str, call: Any, *args: Any) -> None:
    with pytest.raises(error, match=text) as found:
        call(*args)
    assert str(found.value).endswith((".", ")."))


def test_what_is_no_kind_is_refused():
    class Untyped(mp.Host):
        parts = ()

    class NoLayer(mp.Host):
        plain_type, plain_name, parts = int, "int", ()

    class Apart(mp.Host):
        plain_type, plain_name, parts = Table, "Table", ()

    class Unwritten(mp.Host, Table):
        plain_type, plain_name, parts = Table, "Table", ()

    refused(TypeError, "takes a kind of layer.*got <class.*Plain", mp.register_host, Plain)
    refused(TypeError, "takes a kind of layer.*got 3", mp.register_host, 3)
    refused(TypeError, "takes a kind of layer", mp.register_host, mp.LoRADense)
    refused(TypeError, "Untyped has no plain_type, plain_name", mp.register_host, Untyped)
    refused(TypeError, "NoLayer.plain_type must be the class", mp.register_host, NoLayer)
    refused(TypeError, "Apart must be a subclass of its plain_type Table too", mp.register_host, Apart)
    refused(TypeError, "Unwritten does not write linear, affine, add_low_rank_operators", mp.register_host, Unwritten)
    refused(ValueError, "Plain is a kind of layer that is known already.*unregister_host", mp.register_host, PLAIN)
    refused(ValueError, "known already", mp.register_host, mp.linear_host(Plain))
    refused(ValueError, "nn.Dense is a kind of layer that is known already", mp.register_host, mp.linear_host(nn.Dense))
    refused(ValueError, "Cell is a parent of nn.Dense", mp.register_host, mp.linear_host(nn.Cell))
    refused(ValueError, "is not registered; registered are", mp.unregister_host, Unwritten)
    refused(TypeError, "linear_host takes the class", mp.linear_host, Plain(2, 2))
    refused(TypeError, "weight must be the name of an attribute", mp.linear_host, Plain, "a.b")


def test_layers_that_are_not_what_their_kind_says_are_refused():
    class More(Plain):
        def __init__(self):
            super().__init__(8, 4)
            self.gain = parameter(4)

    class Other(Plain):
        def construct(self, x):
            return x

    class Nameless(nn.Cell):
        def __init__(self):
            super().__init__()
            self.kernel = parameter(4, 8)

    stack = Plain(8, 4)
    stack.weight = parameter(2, 4, 8)
    nameless = mp.register_host(mp.linear_host(Nameless))
    try:
        for cell, text in ((More(), "holds gain besides its weight and bias"), (Other(8, 4), "Other overrides Plain"),
                           (stack, "two axes, but weight"),
                           (Nameless(), "has no Parameter 'weight'.*say in linear_host")):
            net = nn.SequentialCell(cell)
            with pytest.raises(ValueError, match=text):
                mp.get_pet_model(net, mp.IA3Config(target_modules=["0"]))
    finally:
        mp.unregister_host(nameless)
