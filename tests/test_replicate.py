"""Layers that stand in a net several times, each with a LoRA of its own."""
from __future__ import annotations

import copy
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from safetensors.numpy import load_file, save_file

import mindpet_lite as mp
from mindpet_lite.offline.merge import merge as merge_files

X = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
RANGES = [[0, 2], [1, 3], [1, 2]]
ORDER = [0, 1, 1, 2, 1]


class Layer(nn.Cell):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_idx, self.q = number, nn.Dense(6, 6)
        self.more = nn.SequentialCell(nn.Dense(6, 6), nn.ReLU())

    def construct(self, x):
        return x + self.more(self.q(x))


class Net(nn.Cell):
    def __init__(self, seed: int = 0, name: str = "layers") -> None:
        super().__init__()
        self.name = name
        setattr(self, name, nn.CellList([Layer(number) for number in range(4)]))
        self.head = nn.Dense(6, 2)
        rng = np.random.default_rng(seed)
        for item in self.get_parameters():
            item.set_data(Tensor(rng.standard_normal(item.shape).astype(np.float32) / 3))

    def construct(self, x):
        for layer in getattr(self, self.name):
            x = layer(x)
        return self.head(x)


def adapted(net: nn.Cell, **settings) -> nn.Cell:
    return mp.get_pet_model(net, mp.LoraConfig(**{"lora_rank": 2, "lora_alpha": 4, "target_modules": ["q"],
                                                  "layer_replication": RANGES, **settings}))


def shaken(net: nn.Cell) -> nn.Cell:
    rng = np.random.default_rng(7)
    for item in net.trainable_params():
        item.set_data(Tensor(rng.standard_normal(item.shape).astype(np.float32)))
    return net


def output(net: nn.Cell) -> np.ndarray:
    return net(Tensor(X)).asnumpy()


def reference(base: nn.Cell, net: nn.Cell) -> np.ndarray:
    """Return the output of a base whose layers run in the net's order, each with its own update."""
    x = X.astype(np.float64)
    for place, number in enumerate(ORDER):
        layer, own = base.layers[number], net.layers[place].q
        q, more = (item.weight.asnumpy().astype(np.float64) for item in (layer.q, layer.more[0]))
        a, b = (item.asnumpy().astype(np.float64) for item in own.delta_parameters().values())
        hidden = x @ (q + 2 * b @ a).T + layer.q.bias.asnumpy()
        x = x + np.maximum(hidden @ more.T + layer.more[0].bias.asnumpy(), 0)
    return x @ base.head.weight.asnumpy().T.astype(np.float64) + base.head.bias.asnumpy()


def test_each_layer_has_its_own_update(mode):
    base, net = Net(), Net()
    output(net)
    names = {item.name for item in net.get_parameters() if "layers.3" not in item.name}
    adapted(net)
    assert len(net.layers) == 5 and [layer.layer_idx for layer in net.layers] == [0, 1, 2, 3, 4]
    assert net.layers[2].q.weight is net.layers[1].q.weight is net.layers[4].q.weight
    assert net.layers[2].more[0] is not net.layers[1].more[0]
    every = [item.name for item in net.get_parameters()]
    assert len(every) == len(set(every)) and names <= set(every)
    assert len(net.trainable_params()) == 10
    np.testing.assert_allclose(output(net), reference(base, net), rtol=1e-4, atol=1e-5)
    shaken(net)
    wanted = output(net)
    np.testing.assert_allclose(wanted, reference(base, net), rtol=1e-4, atol=1e-4)
    parameters = net.trainable_params()

    def loss(x):
        return net(x).square().sum()

    assert all(gradient.asnumpy().any() for gradient in ms.grad(loss, None, parameters)(Tensor(X)))
    assert np.array_equal(output(copy.deepcopy(net)), wanted)
    # A checkpoint of the net holds each Parameter once.
    ms.save_checkpoint(net, "net.ckpt")
    again = adapted(Net(3))
    assert ms.load_param_into_net(again, ms.load_checkpoint("net.ckpt")) == ([], [])
    assert np.array_equal(output(again), wanted)
    with pytest.raises(ValueError, match="Merging would change other layers that use the same weight"):
        mp.merge(net)


@pytest.mark.parametrize("format, place", [("peft", "out"), ("kohya", "out.safetensors")])
def test_files_say_how_the_layers_stand(format, place, pynative_mode):
    net = shaken(adapted(Net()))
    mp.save_adapter(net, place, format=format)
    loaded = mp.load_adapter(Net(), place, strict_base=True)
    assert np.array_equal(output(loaded), output(net)) and len(loaded.layers) == 5
    mp.load_adapter(adapted(Net()), place)
    # Again on the same net, and written again.
    assert np.array_equal(output(mp.load_adapter(loaded, place)), output(net))
    mp.save_adapter(loaded, f"again_{place}", format=format)
    assert np.array_equal(output(mp.load_adapter(Net(), f"again_{place}")), output(net))
    if format == "peft":
        assert len(load_file("out/adapter_model.safetensors")) == 10
        assert Path("again_out/adapter_config.json").read_bytes() == Path("out/adapter_config.json").read_bytes()
    save_file({item.name: item.asnumpy() for item in Net().get_parameters()}, "base.safetensors")
    with pytest.raises(ValueError, match="layer_replication layers of the base stand several times"):
        merge_files(Path("base.safetensors"), Path(place), Path("merged"), quiet=True)


@pytest.mark.parametrize("name", ["layers", "h"])
def test_how_the_list_is_called(name, pynative_mode):
    net = adapted(Net(name=name))
    assert len(getattr(net, name)) == 5


def other_list() -> nn.Cell:
    return Net(name="blocks")


def two_lists() -> nn.Cell:
    net = Net()
    net.h = nn.CellList([Layer(0)])
    return net


@pytest.mark.parametrize("make, settings, message", [
    (Net, {"target_modules": ["nothing"]}, "'nothing' hits nothing"),
    (Net, {"layer_replication": [[0, 5]]}, r"range \[0, 5\], but layers holds 4 layers"),
    (Net, {"layer_replication": [[2, 2]]}, "must be a list of ranges"),
    (Net, {"layer_replication": [0, 2]}, "must be a list of ranges"),
    (Net, {"init_lora_weights": "pissa"}, "its start takes a part out of the weight, which stands at"),
    (other_list, {}, "one CellList called layers, encoder.layer, h, but this one has none"),
    (two_lists, {}, "but this one has h, layers|but this one has layers, h"),
    (lambda: adapted(Net()), {"layer_replication": [[0, 2]], "target_modules": ["head"]}, "are not adapted"),
    (lambda: adapted(Net(), layer_replication=None), {}, "in layers 0.q")])
def test_where_it_cannot_be_done_the_net_is_as_it_was(make, settings, message, pynative_mode):
    net = make()
    cells = [cell for _, cell in net.cells_and_names()]
    numbers = [cell.layer_idx for cell in cells if hasattr(cell, "layer_idx")]
    before = output(net)
    with pytest.raises(ValueError, match=message):
        adapted(net, **settings)
    assert [cell for _, cell in net.cells_and_names()] == cells and np.array_equal(output(net), before)
    assert [cell.layer_idx for cell in cells if hasattr(cell, "layer_idx")] == numbers


def test_a_file_that_does_not_fit_leaves_the_layers_alone(pynative_mode):
    mp.save_adapter(shaken(adapted(Net(), target_modules=["q", "head"])), "out")
    net = Net()
    net.head = nn.Dense(6, 3)
    with pytest.raises(ValueError, match="misshapen: head"):
        mp.load_adapter(net, "out")
    assert len(net.layers) == 4 and [layer.layer_idx for layer in net.layers] == [0, 1, 2, 3]

