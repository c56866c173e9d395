"""Nets in MINDIR: what is exported adapted or merged and loaded again gives the net's output."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from nets import inputs, randomise

import mindpet_lite as mp
from mindpet_lite.delta import METHODS

LORA = {"lora_rank": 3, "lora_alpha": 5}


def dense() -> nn.Cell:
    return nn.SequentialCell(nn.Dense(16, 32, activation="relu"), nn.Dense(32, 8))


def convolutions() -> nn.Cell:
    return nn.SequentialCell(nn.Conv2d(3, 8, 3, has_bias=True), nn.ReLU(), nn.Conv2d(8, 4, 3))


NETS = [pytest.param(dense, (5, 16), "lora", {"target_modules": ["0", "1"], **LORA}, id="LoRA on Dense"),
        pytest.param(convolutions, (2, 3, 9, 9), "lora", {"target_modules": ["0", "2"], **LORA}, id="LoRA on Conv2d"),
        pytest.param(dense, (5, 16), "adapter", {"target_modules": ["0", "1"], "bottleneck_size": 6}, id="adapter")]


@pytest.fixture(autouse=True)
def graph_mode():
    ms.set_context(mode=ms.GRAPH_MODE)


def adapted(make, method, settings) -> nn.Cell:
    """Return a net with deltas that are not zero on its first and last layer, for inference."""
    net = make()
    mp.get_pet_model(net, METHODS[method](**settings))
    randomise(net)
    return net.set_train(False)


def exported(net: nn.Cell, x: Tensor, path) -> np.ndarray:
    """Export a net; return what its file gives."""
    ms.export(net, x, file_name=str(path), file_format="MINDIR")
    return nn.GraphCell(ms.load(str(path)))(x).asnumpy()


@pytest.mark.parametrize(("make", "shape", "method", "settings"), NETS)
def test_an_adapted_net_in_mindir_gives_its_output_bit_for_bit(make, shape, method, settings, tmp_path):
    net, x = adapted(make, method, settings), inputs(*shape)
    expected = net(x).asnumpy()
    with mp.adapters_disabled(net):
        assert np.abs(net(x).asnumpy() - expected).max() > 0.1, "the deltas must matter"
    np.testing.assert_array_equal(exported(net, x, tmp_path / "net.mindir"), expected)


@pytest.mark.parametrize(("make", "shape", "method", "settings"), NETS[:2])
def test_a_merged_net_in_mindir_gives_the_adapted_nets_output(make, shape, method, settings, tmp_path):
    net, x = adapted(make, method, settings), inputs(*shape)
    expected = net(x).asnumpy()
    mp.merge(net)
    found = exported(net, x, tmp_path / "net.mindir")
    np.testing.assert_array_equal(found, net(x).asnumpy())
    # x (W + B A)ᵀ is rounded in another order than x Wᵀ + (x Aᵀ) Bᵀ.
    np.testing.assert_allclose(found, expected, rtol=0, atol=8e-6)
