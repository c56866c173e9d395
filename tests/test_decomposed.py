"""LoHa and LoKr beyond the laws of `test_methods.py`: formulas, starts, sizes, what drops out, settings of files."""
from __future__ import annotations

import json
import math
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from nets import inputs, numbers, unchanged

import mindpet_lite as mp
from mindpet_lite.delta.loha import LoHa
from mindpet_lite.delta.lokr import LoKr
from mindpet_lite.delta.parts import put
from mindpet_lite.formats.decomposed import factors_of
from mindpet_lite.graph.adapters import deltas

KINDS = {"loha": mp.LoHaConfig, "lokr": mp.LoKrConfig}
both = pytest.mark.parametrize("name", KINDS)
OUTPUTS = 48


class Net(nn.Cell):
    """A layer that is called twice."""

    def __init__(self, layer: nn.Cell) -> None:
        super().__init__()
        self.box = nn.SequentialCell(layer)

    def construct(self, x):
        return self.box(x), self.box(x)


def net_of(name, layer=None, seed=0, **fields):
    net, rng = Net(layer or nn.Dense(6, OUTPUTS, has_bias=False)), np.random.default_rng(seed)
    mp.get_pet_model(net, KINDS[name](**{"r": 4, "target_modules": ["box.0"], **fields}))
    for item in net.trainable_params():
        put(item, Tensor(rng.standard_normal(item.shape).astype(np.float32)))
    return net


# Formulas, in float64 and by their definitions

def test_loha_is_the_papers_formula():
    rng = np.random.default_rng(0)
    w1_a, w2_a = rng.standard_normal((2, 4, 2))
    w1_b, w2_b = rng.standard_normal((2, 2, 3 * 2))
    tensors = {"mindpet_delta_loha_w1_a": w1_a, "mindpet_delta_loha_w1_b": w1_b, "mindpet_delta_loha_w2_a": w2_a,
               "mindpet_delta_loha_w2_b": w2_b}
    found = LoHa.delta(tensors, {"r": 2, "alpha": 3}, (4, 3, 2))
    assert found.shape == (4, 3, 2)
    for out, column in np.ndindex(4, 6):
        wanted = 1.5 * sum(w1_a[out, i] * w1_b[i, column] for i in range(2)) * sum(
            w2_a[out, i] * w2_b[i, column] for i in range(2))
        assert math.isclose(found[out, column // 2, column % 2], wanted, rel_tol=1e-12)


def test_loha_with_a_tensor_of_the_kernel():
    rng = np.random.default_rng(0)
    parts = {name: rng.standard_normal(shape) for name, shape in {
        "w1_a": (2, 4), "w1_b": (2, 3), "w2_a": (2, 4), "w2_b": (2, 3), "t1": (2, 2, 5, 1), "t2": (2, 2, 5, 1)}.items()}
    found = LoHa.delta({f"mindpet_delta_loha_{name}": value for name, value in parts.items()}, {"r": 2, "alpha": 2},
                       (4, 3, 5))
    for p, q, z in np.ndindex(4, 3, 5):
        wanted = math.prod(sum(parts[f"t{n}"][i, j, z, 0] * parts[f"w{n}_a"][i, p] * parts[f"w{n}_b"][j, q]
                               for i in range(2) for j in range(2)) for n in (1, 2))
        assert math.isclose(found[p, q, z], wanted, rel_tol=1e-12)


@pytest.mark.parametrize("kind", ["whole", "products", "core"])
def test_lokr_is_the_papers_formula(kind):
    """(C ⊗ D)[i k + p, j n + q] = C[i, j] D[p, q] with C (2, 3) and D (4, 5)."""
    rng = np.random.default_rng(0)
    shapes = {"whole": {"w1": (2, 3), "w2": (4, 5, 3)},
              "products": {"w1_a": (2, 1), "w1_b": (1, 3), "w2_a": (4, 1), "w2_b": (1, 15)},
              "core": {"w1": (2, 3), "w2_a": (2, 4), "w2_b": (2, 5), "t2": (2, 2, 3, 1)}}[kind]
    own = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    first = own["w1"] if "w1" in own else np.outer(own["w1_a"], own["w1_b"])
    second = {"whole": lambda: own["w2"], "products": lambda: np.outer(own["w2_a"], own["w2_b"]).reshape(4, 5, 3),
              "core": lambda: sum(np.multiply.outer(np.outer(own["w2_a"][i], own["w2_b"][j]), own["t2"][i, j, :, 0])
                                  for i in range(2) for j in range(2))}[kind]()
    found = LoKr.delta({f"mindpet_delta_lokr_{name}": value for name, value in own.items()},
                       {"r": 2, "alpha": 3, "decompose_factor": -1}, (8, 15, 3))
    assert found.shape == (8, 15, 3)
    for i, j, p, q, z in np.ndindex(2, 3, 4, 5, 3):
        assert math.isclose(found[i * 4 + p, j * 5 + q, z], 1.5 * first[i, j] * second[p, q, z], rel_tol=1e-12)


def test_sizes_are_cut_as_in_peft():
    """Its rule: from (1, n) to ever larger divisors, while the first is the smaller one and below the factor."""
    def walked(dimension, factor):
        if factor > 0 and dimension % factor == 0:
            return factor, dimension // factor
        pairs = [(number, dimension // number) for number in range(1, dimension + 1) if dimension % number == 0]
        m, n = pairs[0]
        for pair in pairs[1:]:
            if m >= n or factor != -1 and pair[0] > factor:
                break
            m, n = pair
        return min(m, n), max(m, n)

    assert [factors_of(256, -1), factors_of(128, -1), factors_of(127, -1), factors_of(128, 4)] == [
        (16, 16), (8, 16), (1, 127), (4, 32)]
    for dimension in range(1, 200):
        for factor in (-1, *range(1, 40)):
            assert factors_of(dimension, factor) == walked(dimension, factor), (dimension, factor)


# Starts

@pytest.mark.parametrize(("name", "fields", "zero"), [
    ("loha", {}, {"w2_b"}), ("loha", {"init_weights": False}, set()),
    ("lokr", {}, {"w1"}), ("lokr", {"decompose_both": True}, {"w1_a"}), ("lokr", {"init_weights": False}, set()),
    ("lokr", {"init_weights": "lycoris"}, {"w2_b"}), ("lokr", {"init_weights": "lycoris", "r": 4}, {"w2"})])
def test_one_factor_starts_at_zero_and_the_others_as_torchs_layers(name, fields, zero):
    net = mp.get_pet_model(Net(nn.Dense(6, OUTPUTS)), KINDS[name](**{"r": 2, "target_modules": ["box.0"], **fields}))
    found = {key.rpartition(f"{name}_")[2]: item.asnumpy()
             for key, item in deltas(net)["box.0"].delta_parameters().items()}
    assert {key for key, value in found.items() if not value.any()} == zero
    for key, value in found.items():
        bound = 1 / math.sqrt(value[0].size)
        assert np.abs(value).max() <= bound
        assert key in zero or np.abs(value).max() > bound / 2


# What drops out in training

def without_dropout(name, net):
    """Return the net with no dropout. In graph mode a net that ran in evaluation keeps that graph in training."""
    found = net_of(name)
    found.box[0].weight.set_data(net.box[0].weight)
    return found


def gradients(net, x, weights):
    """Return a function for both outputs of a net, and the gradients of the sum of them times the weights."""
    def loss(value):
        one, other = net(value)
        return (one * Tensor(weights[0])).sum() + (other * Tensor(weights[1])).sum(), one, other

    own = list(deltas(net)["box.0"].delta_parameters().values())
    function = ms.value_and_grad(loss, None, own, has_aux=True)

    def compute():
        (_, one, other), found = function(x)
        return [one.asnumpy(), other.asnumpy()], [item.asnumpy() for item in found]

    return compute


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("name", "fields", "rescales"), [
    ("loha", {}, True), ("lokr", {}, False), ("lokr", {"rank_dropout_scale": True}, True)])
def test_outputs_drop_out_in_training_alone(name, fields, rescales, recomputed, mode):
    net, x = net_of(name, rank_dropout=0.5, **fields), inputs(3, 6)
    base = without_dropout(name, net)
    if recomputed:
        mp.net_recompute(net, ["box"])
    whole = base(x)[0].asnumpy()
    plain = x.asnumpy() @ net.box[0].weight.asnumpy().T
    net.set_train()
    weights = np.random.default_rng(1).standard_normal((2, 3, OUTPUTS)).astype(np.float32)
    compute = gradients(net, x, weights)
    outputs, found = compute()
    factors = []
    for y in outputs:
        dropped = np.isclose(y, plain, rtol=1e-6, atol=1e-6).all(0)
        assert 0 < dropped.sum() < OUTPUTS
        factor = np.where(dropped, 0, OUTPUTS / (~dropped).sum() if rescales else 1)
        # One draw for the whole batch.
        np.testing.assert_allclose(y, plain + (whole - plain) * factor, rtol=1e-4, atol=1e-4)
        factors.append(factor)
    # The backward pass has the same factors: they multiply the gradient that the update gets.
    _, wanted = gradients(base, x, weights * np.stack(factors)[:, None].astype(np.float32))()
    for ours, expected in zip(found, wanted):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert not np.array_equal(compute()[0][0], outputs[0]), "each step draws anew"


@both
def test_the_whole_update_drops_out(name, mode):
    net, x = net_of(name, module_dropout=0.5), inputs(3, 6)
    plain, whole = x.asnumpy() @ net.box[0].weight.asnumpy().T, without_dropout(name, net)(x)[0].asnumpy()
    net.set_train()
    kept = []
    for _ in range(20):
        for y in net(x):
            is_kept = np.array_equal(y.asnumpy(), whole)
            assert is_kept or np.allclose(y.asnumpy(), plain, rtol=1e-5, atol=1e-5)
            kept.append(is_kept)
    assert 8 < sum(kept) < 32, "a share of 1/2 of 40 within 3.8 standard deviations"
    # Where all outputs drop out nothing is divided by zero.
    net = net_of(name, nn.Dense(6, 1), rank_dropout=0.9, **({"rank_dropout_scale": True} if name == "lokr" else {}))
    net.set_train()
    assert all(np.isfinite(net(x)[0].asnumpy()).all() for _ in range(10))


class Side(nn.Cell):
    """Two layers on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Dense(6, OUTPUTS, has_bias=False, weight_init="zeros") for _ in range(2))

    def construct(self, x):
        return self.one(x), self.other(x)


@both
def test_each_layer_draws_for_itself(name, mode):
    net = mp.get_pet_model(Side(), KINDS[name](target_modules=["one", "other"], rank_dropout=0.5, init_weights=False))
    one, other = (item.asnumpy()[0] == 0 for item in net.set_train()(inputs(3, 6)))
    assert one.any() and other.any() and not np.array_equal(one, other)


@both
def test_nothing_drops_out_in_evaluation(name, mode):
    net = net_of(name, rank_dropout=0.5, module_dropout=0.5)
    assert np.array_equal(net(inputs(3, 6))[0].asnumpy(), without_dropout(name, net)(inputs(3, 6))[0].asnumpy())


@both
def test_dropout_that_is_off_makes_nothing(name):
    layer = net_of(name).box[0]
    assert not layer.has_dropout and not hasattr(layer, "output_dropout") and not hasattr(layer, "whole_dropout")


# Layers

@both
@pytest.mark.parametrize("fields", [{}, {"use_effective_conv2d": True, "r": 1, "decompose_factor": 2}])
def test_a_convolution_with_groups_and_one_of_a_single_place(name, fields, mode):
    fields = {key: value for key, value in fields.items() if name == "lokr" or key != "decompose_factor"}
    for layer, x in ((nn.Conv2d(8, 12, (3, 2), group=2, has_bias=True), inputs(2, 8, 5, 4)),
                     (nn.Conv1d(8, 12, 3, group=4), inputs(2, 8, 5)), (nn.Conv2d(8, 12, 1, has_bias=True),
                                                                       inputs(2, 8, 5, 4))):
        net = net_of(name, layer, **fields)
        full = net(x)[0].asnumpy()
        has_core = any(key.endswith(("t1", "t2")) for key in deltas(net)["box.0"].delta_parameters())
        assert has_core == ("use_effective_conv2d" in fields and layer.kernel_size != (1, 1))
        mp.merge(net)
        np.testing.assert_allclose(net(x)[0].asnumpy(), full, rtol=1e-4, atol=1e-4)


@both
def test_half_precision_rounds_the_update_and_not_its_making(name, mode):
    net, x = net_of(name, alpha=1), inputs(4, 6)
    layer = net.box[0]
    full = numbers(net(x)[0])
    half = net_of(name, alpha=1, compute_dtype=ms.float16)
    half.box[0].weight.set_data(layer.weight)
    y = half(x)[0]
    assert y.dtype == ms.float32
    assert 0 < np.abs(numbers(y) - full).max() < 2e-2 * np.abs(full).max()


# Settings

def test_a_file_brings_its_scale_and_not_its_dropout(mode):
    x = inputs(3, 6)
    for name, trained in (("loha", {"alpha": 12}), ("lokr", {"r": 32, "alpha": 12, "decompose_both": True})):
        # LoKr's factors are whole for both ranks: the rank shows in the scale alone.
        net = net_of(name, rank_dropout=0.25, **{"r": 24 if name == "lokr" else 4, **trained})
        full = net(x)[0].asnumpy()
        mp.save_adapter(net, name)
        other = net_of(name, r=24 if name == "lokr" else 4, alpha=1, seed=9)
        other.box[0].weight.set_data(net.box[0].weight)
        other(x)
        mp.load_adapter(other, name)
        assert np.array_equal(other(x)[0].asnumpy(), full)
        mp.save_adapter(other, f"{name}-again")
        one, two = (json.loads(Path(folder, "adapter_config.json").read_text()) for folder in (name, f"{name}-again"))
        assert (two["r"], two["alpha"], two["rank_dropout"]) == (one["r"], one["alpha"], 0.0)


@both
def test_rank_and_alpha_by_pattern(name, tmp_path):
    def plain():
        return nn.SequentialCell(*(nn.Dense(16, 16, weight_init="ones", bias_init="ones") for _ in range(3)))

    kind = KINDS[name]
    net = mp.get_pet_model(plain(), kind(r=1, alpha=2, target_modules=["0", "1", "2"], rank_pattern={"1": 3},
                                         alpha_pattern={"[12]": 5}))
    assert [(item.config.r, item.config.alpha) for item in deltas(net).values()] == [(1, 2), (3, 5), (1, 5)]
    mp.save_adapter(net, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == name.upper() and config["r"] == 1
    assert list(config["rank_pattern"].values()) == [3]
    again = mp.load_adapter(plain(), tmp_path)
    assert [item.settings() for item in deltas(again).values()] == [item.settings() for item in deltas(net).values()]


@both
@pytest.mark.parametrize("fields", [{"r": 0}, {"r": 1.5}, {"alpha": 0}, {"alpha": 1e9}, {"rank_dropout": 1.0},
                                    {"module_dropout": -0.1}, {"use_effective_conv2d": 1}, {"init_weights": "pissa"},
                                    {"rank_pattern": {"x": 0}}, {"alpha_pattern": {"x": -1}}, {"rank_pattern": [3]},
                                    {"alpha_pattern": {"[": 1}}])
def test_wrong_settings(name, fields):
    (field,) = fields
    with pytest.raises((TypeError, ValueError), match={"rank_pattern": "rank_pattern|^r must be",
                                                       "alpha_pattern": "alpha"}.get(field, field)):
        KINDS[name](target_modules=["0"], **fields)


@pytest.mark.parametrize("fields", [{"decompose_factor": 0}, {"decompose_factor": -2}, {"decompose_factor": 2.0},
                                    {"decompose_both": 1}, {"rank_dropout_scale": None}])
def test_wrong_settings_of_lokr(fields):
    (field,) = fields
    with pytest.raises((TypeError, ValueError), match=field):
        mp.LoKrConfig(target_modules=["0"], **fields)
    with pytest.raises(ValueError, match="init_weights must be True, False or 'lycoris'"):
        mp.LoKrConfig(target_modules=["0"], init_weights="lycori")


@both
def test_what_cannot_be_adapted(name):
    net = Net(nn.Embedding(4, 8))
    with unchanged(net), pytest.raises(ValueError, match="adapts nn.Dense, not Embedding"):
        mp.get_pet_model(net, KINDS[name](target_modules=["box.0"]))
    net = Net(nn.Dense(8, 8, dtype=ms.float16))
    with unchanged(net), pytest.raises(ValueError, match="cannot hold. Lower alpha"):
        mp.get_pet_model(net, KINDS[name](r=1, alpha=9e8, target_modules=["box.0"]))
