"""Starts of LoRA of which no file tells what they left of the base: they go with the residual base alone."""
from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from safetensors.numpy import load_file, save_file

import mindpet_lite as mp
from mindpet_lite.delta.lora.start import fast_svd
from mindpet_lite.offline.merge import merge as merge_files

X = np.random.default_rng(1).standard_normal((5, 24)).astype(np.float32)


class Net(nn.Cell):
    """Two linear layers, and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.q, self.k, self.head = nn.Dense(24, 20), nn.Dense(20, 24, has_bias=False), nn.Dense(24, 4)
        rng = np.random.default_rng(seed)
        for item in self.get_parameters():
            item.set_data(Tensor(rng.standard_normal(item.shape).astype(np.float32)))

    def construct(self, x):
        return self.head(ops.square(self.k(ops.tanh(self.q(x)))))


def adapted(net: nn.Cell, **settings) -> nn.Cell:
    return mp.get_pet_model(net, mp.LoraConfig(**{"lora_rank": 4, "lora_alpha": 8, "target_modules": ["q", "k"],
                                                  "init_lora_weights": "pissa_niter_2", **settings}))


def trained(net: nn.Cell, seed: int = 3) -> nn.Cell:
    rng = np.random.default_rng(seed)
    for item in net.trainable_params():
        item.set_data(item + Tensor(rng.standard_normal(item.shape).astype(np.float32) / 9))
    return net


def output(net: nn.Cell) -> np.ndarray:
    return net(Tensor(X)).asnumpy()


def base_values(net: nn.Cell) -> dict[str, np.ndarray]:
    return {name: item.asnumpy() for name, item in net.parameters_and_names()
            if name.rpartition(".")[2] in ("weight", "bias")}


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (6, 40)])
def test_the_fast_decomposition_comes_to_the_exact_one(shape):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((size, min(shape))))[0] for size in shape)
    values = 0.7 ** np.arange(min(shape))
    matrix = u * values @ v.T
    errors = []
    for iterations in (0, 2, 8):
        left, found, right = fast_svd(matrix, 4, iterations)
        errors.append(np.abs(left[:, :4] * found[:4] @ right[:4] - u[:, :4] * values[:4] @ v[:, :4].T).max())
    assert errors[2] < 1e-9 and (errors[0] > errors[1] > errors[2] or min(shape) <= 14)


def test_the_start_is_the_same_in_every_process(pynative_mode):
    first, second = adapted(Net()), adapted(Net())
    assert all(np.array_equal(a.asnumpy(), b.asnumpy()) for a, b in zip(first.get_parameters(),
                                                                          second.get_parameters()))


@pytest.mark.parametrize("format, place", [("peft", "out"), ("diffusers", "out.safetensors")])
def test_our_file_loads_where_the_weights_are_those_that_were_left(format, place, mode):
    net = trained(adapted(Net()))
    mp.save_adapter(net, place, format=format)
    wanted = output(net)
    # As it was adapted in training, and on the residual base.
    again = mp.load_adapter(adapted(Net()), place, strict_base=True)
    assert np.array_equal(output(again), wanted)
    plain = Net(1)
    for name, value in base_values(net).items():
        plain.parameters_dict()[name].set_data(Tensor(value))
    loaded = mp.load_adapter(plain, place, strict_base=True)
    assert np.array_equal(output(loaded), wanted)
    mp.save_adapter(loaded, f"again_{place}", format=format)
    held = [load_file(f"{name}/adapter_model.safetensors" if format == "peft" else name)
            for name in (place, f"again_{place}")]
    assert held[0].keys() == held[1].keys() and all(np.array_equal(held[0][key], held[1][key]) for key in held[0])
    with pytest.raises(ValueError, match="took a part out of the base"), mp.adapters_disabled(loaded):
        pass
    mp.merge(loaded)
    np.testing.assert_allclose(output(loaded), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [Net, lambda: adapted(Net(), init_lora_weights=True), lambda: adapted(Net(1))],
                         ids=["plain", "adapted otherwise", "adapted on another base"])
def test_our_file_is_refused_elsewhere(build, pynative_mode):
    mp.save_adapter(trained(adapted(Net())), "out")
    net = build()
    before = [item.asnumpy() for item in net.get_parameters()]
    with pytest.raises(ValueError, match="'pissa_niter_2', took a part out of the base's weights that the file does"):
        mp.load_adapter(net, "out")
    assert all(np.array_equal(item.asnumpy(), value) for item, value in zip(net.get_parameters(), before))
    with pytest.warns(UserWarning, match="trained on another base"):
        mp.load_adapter(net, "out", residual_base=True)


def test_merging_files_knows_the_residual_base_by_its_hash(pynative_mode):
    net = trained(adapted(Net()))
    mp.save_adapter(net, "out")
    save_file(base_values(Net()), "plain.safetensors")
    save_file(base_values(net), "residual.safetensors")
    with pytest.raises(ValueError, match="took a part out.*Give the residual base"):
        merge_files(Path("plain.safetensors"), Path("out"), Path("merged"), quiet=True)
    merge_files(Path("residual.safetensors"), Path("out"), Path("merged"), quiet=True)
    after = load_file("merged/residual.safetensors")
    mp.merge(net)
    assert all(np.allclose(after[name], value, rtol=1e-5, atol=1e-6) for name, value in base_values(net).items())


@pytest.mark.parametrize("settings, message", [
    ({"init_lora_weights": "pissa_niter"}, "must be one of"), ({"init_lora_weights": "pissa_niter_-1"}, "must be one"),
    ({"init_lora_weights": "lora_ga"}, "LoRA-GA, which needs gradients, is not made here"),
    ({"init_lora_weights": True, "residual_base": True}, "residual_base says"), ({"residual_base": 1}, "residual_base"),
    ({"use_dora": True}, "does not go with use_dora"), ({"lora_rank": 21}, "takes lora_rank 21")])
def test_wrong_settings(settings, message, pynative_mode):
    with pytest.raises((ValueError, TypeError), match=message):
        adapted(Net(), **settings)


def test_a_base_that_is_loaded_later_has_its_part_taken_out(mode):
    base, net = Net(5), adapted(Net(2))
    output(net)
    ms.load_param_into_net(net, {item.name: item for item in base.get_parameters()})
    np.testing.assert_allclose(output(net), output(base), rtol=1e-4, atol=1e-4)
    assert not np.array_equal(net.q.weight.asnumpy(), base.q.weight.asnumpy())
