"""Adapters combined: PEFT's numbers, on files and on a net."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import SHARED
from mindspore import Tensor, nn

import mindpet_lite as mp
from mindpet_lite.commands import mindpet_lite
from mindpet_lite.formats.adapters import read_adapter
from mindpet_lite.formats.combine import WAYS, combine
from mindpet_lite.formats.lora import A, B
from mindpet_lite.formats.state import AdapterState, LayerState

ROOT = SHARED / "fixtures" / "peft" / "llama_tiny" / "lora_combined"
needs_fixtures = pytest.mark.skipif(not ROOT.exists(), reason=f"the shared fixtures are not at {SHARED}")


def product(layer: LayerState) -> np.ndarray:
    a, b = (value.astype(np.float64) for value in layer.tensors.values())
    settings = layer.settings
    root = np.sqrt(settings["lora_rank"]) if settings.get("use_rslora") else settings["lora_rank"]
    return settings["lora_alpha"] / root * (b.reshape(len(b), -1) @ a.reshape(len(a), -1))


@needs_fixtures
@pytest.mark.parametrize("how", ["cat", "linear", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"])
def test_pefts_numbers(how):
    states = {name: read_adapter(ROOT / name).state for name in "ab"}
    wanted = read_adapter(ROOT / how).state
    # The fixture's weights, and the density that PEFT was given.
    found = combine(states, [0.7, 0.4], how, density=None if how in ("cat", "linear", "svd") else 0.5)
    assert set(found.layers) == set(wanted.layers)
    for path, layer in wanted.layers.items():
        assert found.layers[path].settings == layer.settings
        np.testing.assert_allclose(product(found.layers[path]), product(layer), rtol=0, atol=2e-7)


def state(seed: int, rank: int, alpha: float, paths=("q", "v"), **settings) -> AdapterState:
    rng = np.random.default_rng(seed)
    return AdapterState("lora", {path: LayerState(
        {A: rng.standard_normal((rank, 6)).astype(np.float32), B: rng.standard_normal((4, rank)).astype(np.float32)},
        {"lora_rank": rank, "lora_alpha": alpha, "lora_dropout": 0.0, **settings}) for path in paths})


def test_cat_and_svd_are_the_weighted_sum_whatever_ranks_and_layers():
    states = {"a": state(1, 2, 4), "b": state(2, 3, 5, ["v", "w"], use_rslora=True)}
    for how in ("cat", "svd"):
        found = combine(states, [0.5, -2.0], how, rank=None if how == "cat" else 4)
        for path in ("q", "v", "w"):
            wanted = sum((weight * product(one.layers[path]) for one, weight in zip(states.values(), (0.5, -2.0))
                          if path in one.layers), np.zeros((4, 6)))
            np.testing.assert_allclose(product(found.layers[path]), wanted, rtol=1e-5, atol=1e-5)
    assert [layer.settings["lora_rank"] for layer in combine(states, [1, 1], "cat").layers.values()] == [2, 5, 3]


def test_signs_are_elected_on_the_scaled_updates():
    """By hand: of a's 3 and b's -1 times 10, the minus is the stronger, and its mean is what is left."""
    def one(value, alpha):
        return AdapterState("lora", {"q": LayerState({A: np.ones((1, 1), np.float32),
                                                      B: np.full((1, 1), value, np.float32)},
                                                     {"lora_rank": 1, "lora_alpha": alpha})})
    found = combine({"a": one(3.0, 1), "b": one(-1.0, 10)}, [1.0, 0.5], "ties_svd", density=1.0)
    assert product(found.layers["q"]).item() == pytest.approx(-5.0)
    found = combine({"a": one(3.0, 1), "b": one(-1.0, 10), "c": one(2.0, 1)}, [1.0, 0.5, 1.0], "ties_svd", density=1.0,
                    majority_sign="frequency")
    assert product(found.layers["q"]).item() == pytest.approx(2.5)


def test_dare_keeps_the_mean_and_the_seed_is_the_result():
    states = {"a": state(1, 2, 2), "b": state(2, 2, 2)}
    mean = np.mean([product(combine(states, [1, 1], "dare_linear_svd", 4, 0.5, seed=seed).layers["q"])
                    for seed in range(400)], axis=0)
    wanted = sum(product(one.layers["q"]) for one in states.values())
    np.testing.assert_allclose(mean, wanted, atol=5 * np.abs(wanted).max() / 20)
    first, again, other = (combine(states, [1, 1], "dare_ties", density=0.5, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first.layers["q"].tensors[A], again.layers["q"].tensors[A])
    assert not np.array_equal(first.layers["q"].tensors[A], other.layers["q"].tensors[A])


@pytest.mark.parametrize(("arguments", "words"), [
    ({"how": "tie"}, "how must be one of .* Did you mean 'ties'"), ({"weights": [1.0]}, "need as many weights"),
    ({"weights": [1.0, float("nan")]}, "finite number"), ({"how": "ties"}, "density must be above 0"),
    ({"how": "ties", "density": 1.5}, "at most 1"), ({"how": "cat", "density": 0.5}, "prunes nothing"),
    ({"how": "cat", "rank": 2}, "rank is for svd"), ({"how": "linear"}, "q: 'linear' needs adapters of one rank"),
    ({"majority_sign": "most"}, "majority_sign must be one of"), ({"seed": -1}, "seed must be an int of at least 0")])
def test_wrong_arguments(arguments, words):
    states = {"a": state(1, 2, 4), "b": state(2, 3, 5)}
    with pytest.raises(ValueError, match=words):
        combine(states, **{"weights": [1.0, 1.0], "how": "svd", **arguments})


def net_of(states: dict[str, AdapterState]) -> nn.Cell:
    net = nn.SequentialCell(nn.Dense(6, 4), nn.Dense(4, 6))
    for name, (targets, seed) in states.items():
        one = nn.SequentialCell(nn.Dense(6, 4), nn.Dense(4, 6))
        mp.get_pet_model(one, mp.LoraConfig(2, 4, target_modules=targets))
        rng = np.random.default_rng(seed)
        for item in one.trainable_params():
            item.set_data(Tensor(rng.standard_normal(item.shape).astype(np.float32)))
        mp.save_adapter(one, name)
        mp.load_adapter(net, name, name=name)
    return net


def test_on_a_net_it_is_an_adapter_beside_the_others(mode):
    net = net_of({"a": (["0", "1"], 1), "b": (["0"], 2)})
    x = Tensor(np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32))
    mp.set_adapter(net, {"a": 0.7, "b": -0.3})
    wanted = net(x).asnumpy()
    mp.combine_adapters(net, "both", ["a", "b"], [0.7, -0.3], "cat")
    mp.set_adapter(net, "both")
    np.testing.assert_allclose(net(x).asnumpy(), wanted, rtol=1e-5, atol=1e-5)
    mp.save_adapter(net, "net", name="both")
    with pytest.raises(ValueError, match="no adapter 'c'"):
        mp.combine_adapters(net, "more", ["a", "c"], [1, 1])
    done = CliRunner().invoke(mindpet_lite, ["combine", "a=0.7", "b=-0.3", "--how", "cat", "--out", "file"])
    assert done.exit_code == 0 and "combined 2 adapters into file: 2 layers" in done.output, done.output
    ours, theirs = (read_adapter(Path(name)).state for name in ("net", "file"))
    for path, layer in theirs.layers.items():
        np.testing.assert_allclose(product(ours.layers[path]), product(layer), rtol=1e-6, atol=1e-6)


def test_the_command_says_what_is_wrong():
    net_of({"a": (["0"], 1)})
    for arguments, words in ((["a=x"], "given as path=weight"), (["a"], "given as path=weight"),
                             (["=1"], "given as path=weight"), (["a=1", "none=1"], "no none"), (["a=1"], "")):
        done = CliRunner().invoke(mindpet_lite, ["combine", *arguments, "--out", "a" if not words else "new"])
        assert done.exit_code and not Path("new").exists() and words in str(done.exception)


def test_all_ways_are_documented():
    assert set(WAYS) >= {"cat", "svd", "linear", "ties", "dare_ties"}
    assert all(way in (combine.__doc__ or "") or way.endswith("_svd") for way in WAYS)
