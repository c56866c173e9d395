"""Several adapters on one net: values switch between them in a compiled graph."""
from __future__ import annotations

import warnings

import adapter_sequences
import numpy as np
import pytest
from host_layers import LAYERS
from mindspore import Tensor, mint, nn, ops
from nets import compile_count, inputs, pynative, unchanged

import mindpet_lite as mp
from mindpet_lite.delta.hosts.dense import DenseHost
from mindpet_lite.delta.hosts.linear import LinearHost
from mindpet_lite.delta.parts import put
from mindpet_lite.graph.named import banks_of


class Net(nn.Cell):
    """Every kind of host, each with the batch as the first axis of its input."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.dense = nn.Dense(8, 8, activation="tanh")
        self.linear = mint.nn.Linear(8, 8)
        self.conv = nn.Conv2d(1, 4, 3, has_bias=True)
        self.grouped = nn.Conv2d(4, 4, 3, group=2, has_bias=True)

    def construct(self, ids):
        x = self.linear(self.dense(self.embed(ids)))
        y = self.grouped(self.conv(ops.expand_dims(x, 1)))
        return ops.concat((ops.reshape(x, (x.shape[0], -1)), ops.reshape(y, (y.shape[0], -1))), 1)


X = Tensor(np.random.default_rng(0).integers(0, 7, (4, 3)).astype(np.int32))
TARGETS = ["embed", "dense", "linear", "conv", "grouped"]


def plain(seed: int = 0) -> Net:
    net, rng = Net(), np.random.default_rng(seed)
    for item in net.get_parameters():
        item.set_data(Tensor(0.5 * rng.standard_normal(item.shape).astype(np.float32)))
    return net


def saved(name: str, seed: int, rank: int = 2, alpha: float = 4, targets=TARGETS, **fields) -> str:
    """Write an adapter with values from the seed, and return its directory."""
    net = mp.get_pet_model(plain(), mp.LoraConfig(rank, alpha, target_modules=list(targets), **fields))
    rng = np.random.default_rng(seed)
    for item in net.trainable_params():
        item.set_data(Tensor(0.4 * rng.standard_normal(item.shape).astype(np.float32)))
    mp.save_adapter(net, name)
    return name


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {"a": saved("a", 1), "b": saved("b", 2, 4, 3, ["dense", "linear", "embed"], use_rslora=True),
            "c": saved("c", 3, 6, 2, ["conv", "grouped", "dense"])}


def alone(directory: str | None, x=X) -> np.ndarray:
    """Return what a net with this adapter alone gives."""
    net = plain()
    return (net if directory is None else mp.load_adapter(net, directory))(x).asnumpy()


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def loaded(files, **reserved) -> Net:
    net = plain()
    if reserved:
        mp.reserve_adapters(net, target_modules=TARGETS, **reserved)
    for name, directory in files.items():
        mp.load_adapter(net, directory, name=name)
    return net


@pytest.mark.parametrize("reserved", [{}, {"rank": 16}, {"rank": 16, "samples": 4}], ids=["own", "room", "samples"])
def test_each_adapter_gives_what_it_gives_alone_and_a_switch_compiles_nothing(files, reserved, mode):
    wanted = {name: alone(name) for name in (None, "a", "b", "c")}
    net = loaded(files, **reserved)
    assert mp.active_adapters(net) == {"a": 1.0}
    close(net(X).asnumpy(), wanted["a"])
    with compile_count() as compiled:
        for name in ("b", "c", "a", "b"):
            mp.set_adapter(net, name)
            close(net(X).asnumpy(), wanted[name])
        mp.set_adapter(net, {})
        assert np.array_equal(net(X).asnumpy(), wanted[None]) and mp.active_adapters(net) == {}
        mp.set_adapter(net, {"a": 0.7, "b": -0.3})
        mixed = net(X).asnumpy()
        with mp.adapters_disabled(net):
            assert np.array_equal(net(X).asnumpy(), wanted[None])
        assert np.array_equal(net(X).asnumpy(), mixed)
        if reserved.get("samples"):
            with mp.adapters_for_samples(net, ["b", None, "a", "c"]):
                by_sample = net(X).asnumpy()
    assert not compiled
    if not reserved.get("samples"):
        with mp.adapters_for_samples(net, ["b", None, "a", "c"]):
            by_sample = net(X).asnumpy()
    for row, name in enumerate(("b", None, "a", "c")):
        close(by_sample[row], wanted[name][row])
    assert np.array_equal(net(X).asnumpy(), mixed), "afterwards all is as before"


def test_weights_add_up_as_the_numbers_do(files, mode):
    net = loaded({"a": files["a"], "b": files["b"]})
    mp.set_adapter(net, {"a": 0.7, "b": -0.3})
    expected, deltas = plain(), {}
    for name, weight in (("a", 0.7), ("b", -0.3)):
        one = mp.load_adapter(plain(), files[name])
        before = {path: item.asnumpy() for path, item in plain().parameters_and_names()}
        grouped = one.grouped.plain_cell() if name == "a" else None
        assert grouped is None or one.grouped.unmergeable
        for path, layer in one.name_cells().items():
            if hasattr(layer, "merged_value") and not layer.unmergeable:
                (value,) = layer.merged_value().values()
                own = next(key for key in before if key.startswith(path + ".") and before[key].shape == value.shape)
                deltas[own] = deltas.get(own, 0) + weight * (value.asnumpy() - before[own])
    for path, item in expected.parameters_and_names():
        if path in deltas:
            item.set_data(item + Tensor(deltas[path].astype(np.float32)))
    hidden = mp.load_adapter(plain(), files["a"])
    mp.set_lora_scale(hidden, 0.7)
    # The grouped convolution cannot be merged, and only `a` has it.
    expected.grouped = hidden.grouped
    close(net(X).asnumpy(), expected(X).asnumpy())


def test_what_comes_and_goes_in_the_room_compiles_nothing(files, mode):
    wanted = {name: alone(name) for name in (None, "a", "b")}
    net = mp.reserve_adapters(plain(), 8, target_modules=TARGETS)
    close(net(X).asnumpy(), wanted[None])
    with compile_count() as compiled:
        mp.load_adapter(net, files["a"], name="a")
        close(net(X).asnumpy(), wanted["a"])
        mp.load_adapter(net, files["c"], name="c")
        with unchanged(net), pytest.raises(ValueError, match="rank 4 does not fit the room of rank 8"):
            mp.load_adapter(net, files["b"], name="b")
        mp.delete_adapter(net, "c")
        mp.load_adapter(net, files["b"], name="b")
        mp.set_adapter(net, "b")
        close(net(X).asnumpy(), wanted["b"])
        mp.delete_adapter(net, "a")
        mp.load_adapter(net, files["a"], name="again")
        mp.set_adapter(net, "again")
        close(net(X).asnumpy(), wanted["a"])
    assert not compiled and not net.trainable_params()
    mp.save_adapter(net, "copy", name="again")
    close(alone("copy"), wanted["a"])


def test_training_one_moves_that_one_alone(files, mode):
    net = mp.get_pet_model(plain(), mp.LoraConfig(2, 4, target_modules=["dense", "linear"]))
    mp.add_adapter(net, "b", mp.LoraConfig(3, 6, target_modules=["dense", "conv"]))
    mp.load_adapter(net, files["a"], name="frozen")
    assert {item.name.partition("__")[2] for item in net.trainable_params()} == {""}
    mp.set_adapter(net, "b")
    assert {item.name for item in net.trainable_params()} == {
        f"{layer}.mindpet_delta_lora_{factor}__b" for layer in ("dense", "conv") for factor in "ab"}
    before = {item.name: item.asnumpy().copy() for item in net.get_parameters()}
    start = net(X).asnumpy()
    assert np.array_equal(start, alone(None)), "a new adapter starts as the base"
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.MSELoss()), nn.AdamWeightDecay(net.trainable_params(), 1e-2,
                                                                                      weight_decay=0.1)).set_train()
    losses = [float(step(X, Tensor(np.zeros(start.shape, np.float32))).asnumpy()) for _ in range(5)]
    moved = {item.name for item in net.get_parameters() if not np.array_equal(item.asnumpy(), before[item.name])}
    assert moved == {item.name for item in net.trainable_params()} and losses[-1] < losses[0]
    net.set_train(False)
    trained = net(X).asnumpy()
    mp.save_adapter(net, "b_only", name="b")
    close(alone("b_only"), trained)
    mp.set_adapter(net, "frozen")
    close(net(X).asnumpy(), alone("a"))
    assert mp.set_adapter(net, "default") is None and np.array_equal(net(X).asnumpy(), alone(None))


def test_merge_takes_what_is_active(files, mode):
    net = loaded({"b": files["b"], "d": saved("d", 5, 2, 4, ["dense", "embed"])})
    mp.set_adapter(net, {"b": 0.5, "d": 2.0})
    before, values = net(X).asnumpy(), {item.name: item.asnumpy().tobytes() for item in net.get_parameters()}
    mp.merge(net)
    close(net(X).asnumpy(), before)
    assert type(net.dense) is nn.Dense
    mp.unmerge(net)
    assert {item.name: item.asnumpy().tobytes() for item in net.get_parameters()} == values
    assert np.array_equal(net(X).asnumpy(), before) and mp.active_adapters(net) == {"b": 0.5, "d": 2.0}


def test_files_keep_what_they_held(files):
    net = loaded(files)
    for name in files:
        mp.save_adapter(net, f"copy_{name}", name=name)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            with open(f"copy_{name}/{file}", "rb") as ours, open(f"{name}/{file}", "rb") as theirs:
                assert ours.read() == theirs.read(), (name, file)
    with pytest.raises(ValueError, match="several adapters .*a, b, c.*: say which by name"):
        mp.save_adapter(net, "all")


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "lora_bias"])
def test_those_that_do_not_add_up_take_turns(files, fields, mode):
    targets = ["dense", "linear"]
    saved("d", 7, 2, 4, targets, **fields)
    saved("e", 8, 2, 4, targets, **fields)
    wanted = {name: alone(name) for name in ("a", "d", "e")}
    net = mp.load_adapter(plain(), "d", name="d")
    mp.load_adapter(net, "e", name="e")
    close(net(X).asnumpy(), wanted["d"])
    with compile_count() as compiled:
        mp.set_adapter(net, "e")
        close(net(X).asnumpy(), wanted["e"])
        mp.set_adapter(net, "d")
        close(net(X).asnumpy(), wanted["d"])
    assert not compiled, "the same layers and settings: by values"
    mp.load_adapter(net, files["a"], name="a")
    close(net(X).asnumpy(), wanted["d"])
    for name in ("a", "e", "a", "d"):
        mp.set_adapter(net, name)
        close(net(X).asnumpy(), wanted[name])
        assert mp.active_adapters(net) == {name: 1.0}
    mp.save_adapter(net, "copy", name="e")
    close(alone("copy"), wanted["e"])
    with unchanged(net), pytest.raises(ValueError, match="do not add up"):
        mp.set_adapter(net, {"d": 1.0, "e": 1.0})
    with unchanged(net), pytest.raises(ValueError, match="do not add up"), mp.adapters_for_samples(net, ["d", "e"]):
        pass


def test_bad_input_is_one_sentence_and_changes_nothing(files):
    net = loaded(files)
    for call, words in (
            (lambda: mp.set_adapter(net, "aa"), r"no adapter 'aa'; it has a, b, c\. Did you mean 'a'"),
            (lambda: mp.load_adapter(net, files["a"], name="a"), "has an adapter 'a' already"),
            (lambda: mp.load_adapter(net, files["a"], name="x.y"), "letters, digits"),
            (lambda: mp.add_adapter(net, "a", mp.LoraConfig(target_modules=["dense"])), "already"),
            (lambda: mp.add_adapter(net, "n", mp.LoraConfig(target_modules=["nothing"])), "hits no"),
            (lambda: mp.set_adapter(net, {"a": float("nan")}), "must be finite"),
            (lambda: mp.set_adapter(net, {"a": "1"}), "must be a number"),
            (lambda: mp.delete_adapter(net, "z"), "no adapter 'z'"),
            (lambda: mp.save_adapter(net, "out", name="z"), "no adapter 'z'"),
            (lambda: mp.reserve_adapters(net, 0), "rank must be an int of at least 1"),
            (lambda: mp.reserve_adapters(net, 3), "divisible by its 2 groups"),
            (lambda: mp.adapters_for_samples(net, ["a", "q"]).__enter__(), "no adapter 'q'"),
            (lambda: mp.adapters_for_samples(net, "a").__enter__(), "must be a list")):
        with unchanged(net), pytest.raises((ValueError, TypeError), match=words):
            call()
    with pytest.raises(ValueError, match="no adapter 'a'; it has none"):
        mp.set_adapter(plain(), "a")


def test_an_input_with_other_samples_is_refused(files, mode):
    net = loaded(files)
    with mp.adapters_for_samples(net, ["a", "b"]), pytest.raises(ValueError, match="first axis counts as many samples"):
        net(X).asnumpy()
    close(net(X).asnumpy(), alone("a"))


@pytest.mark.parametrize("host", [DenseHost, LinearHost], ids=["dense", "linear"])
def test_two_axes_and_more(host, mode):
    """A sample of one row, and of rows in rows."""
    for shape in ((4, 8), (4, 2, 3, 8)):
        layer = LAYERS[host][0]()
        net = nn.SequentialCell(layer)
        base = net(inputs(*shape)).asnumpy()
        mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        mp.add_adapter(net, "b", mp.LoraConfig(2, 4, target_modules=["0"]))
        rng = np.random.default_rng(1)
        for bank in banks_of(net).values():
            for name in ("default", "b"):
                for item in bank.parameters_of(name).values():
                    put(item, Tensor(rng.standard_normal(item.shape).astype(np.float32)))
        found = {}
        for name in ("default", "b"):
            mp.set_adapter(net, name)
            found[name] = net(inputs(*shape)).asnumpy()
        with mp.adapters_for_samples(net, ["b", "default", None, "b"]):
            y = net(inputs(*shape)).asnumpy()
        for row, name in enumerate(("b", "default", None, "b")):
            close(y[row], base[row] if name is None else found[name][row])




def test_random_sequences_are_the_numpy_models(tmp_path, monkeypatch):
    """Thirty here; `python tests/adapter_sequences.py 1000` runs a thousand."""
    monkeypatch.chdir(tmp_path)
    with pynative(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = adapter_sequences.run(30)
    assert set(counts) == {"add", "load", "switch", "weigh", "mix", "delete", "train", "merge", "save"}
