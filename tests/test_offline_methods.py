"""Merging file to file an adapter of a method other than LoRA: the same numbers as merging on the net."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from host_layers import SETTINGS
from mindspore import Tensor, nn
from safetensors.numpy import load_file, save_file

import mindpet_lite as mp
from mindpet_lite.commands import mindpet_lite
from mindpet_lite.delta import METHODS
from mindpet_lite.delta.hosts.dense import DenseHost
from mindpet_lite.delta.method_config import MethodConfig
from mindpet_lite.offline.merge import merge

HOSTED = [name for name, kind in METHODS.items() if issubclass(kind, MethodConfig) and DenseHost in kind.fits
          and not kind.layer.unmergeable]
ROOT = SHARED / "fixtures" / "peft"


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Dense(8, 4)
        self.other = nn.Dense(4, 4)

    def construct(self, x):
        return self.other(self.first(x))


def written(name: str, index: int) -> Net:
    """Write a base and an adapter, and return the net with it."""
    rng, net = np.random.default_rng(0), Net()
    values = {path: rng.standard_normal(item.shape).astype(np.float32) for path, item in net.parameters_and_names()}
    for path, item in net.parameters_and_names():
        item.set_data(Tensor(values[path]))
    save_file(values, "base.safetensors")
    settings = {key: ["first"] if value == ["0"] else value for key, value in SETTINGS[name][index].items()}
    mp.get_pet_model(net, METHODS[name](target_modules=["first"], **settings))
    for item in net.trainable_params():
        item.set_data(Tensor((item.asnumpy() + 0.3 * rng.standard_normal(item.shape)).astype(np.float32)))
    mp.save_adapter(net, "adapter")
    return net


@pytest.mark.parametrize(("name", "index"), [(name, index) for name in HOSTED for index in range(len(SETTINGS[name]))])
def test_the_files_numbers_are_the_nets(name, index):
    net = written(name, index)
    merge(Path("base.safetensors"), Path("adapter"), Path("out"), quiet=True, methods=METHODS)
    mp.merge(net)
    found = load_file("out/base.safetensors")
    for path, item in net.parameters_and_names():
        np.testing.assert_allclose(found[path], item.asnumpy(), rtol=1e-6, atol=1e-6, err_msg=path)
    assert not np.array_equal(found["first.weight"], load_file("base.safetensors")["first.weight"])


def test_the_command_merges_it_and_lora_alone_needs_no_mindspore():
    written("ia3", 0)
    mindpet_lite.main(["merge", "--base", "base.safetensors", "--adapter", "adapter", "--out", "out", "-q"],
                      standalone_mode=False)
    assert set(load_file("out/base.safetensors")) == {"first.weight", "first.bias", "other.weight", "other.bias"}


def folders() -> list[Path]:
    """Return the fixtures of our methods of which PEFT merged."""
    kinds = {kind.peft.peft_type for kind in METHODS.values()
             if issubclass(kind, MethodConfig) and not kind.layer.unmergeable}
    found = [path.parent for path in sorted(ROOT.glob("*/*/adapter_config.json"))
             if json.loads(path.read_text())["peft_type"] in kinds]
    return [path for path in found if any(key.startswith("merged_weight.") for key in np.load(path / "io.npz"))]


@pytest.mark.skipif(not ROOT.exists(), reason=f"the shared fixtures are not at {SHARED}")
@pytest.mark.parametrize("folder", folders(), ids=lambda path: path.name)
def test_pefts_merged_weights(folder):
    merge(folder.parent / "base" / "model.safetensors", folder, Path("out"), quiet=True, methods=METHODS)
    found, io = load_file("out/model.safetensors"), np.load(folder / "io.npz")
    for key in io:
        if key.startswith("merged_weight."):
            np.testing.assert_allclose(found[key.removeprefix("merged_weight.")], io[key], rtol=1e-5, atol=1e-5,
                                       err_msg=key)
