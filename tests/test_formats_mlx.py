"""mlx-lm's adapters, written here as mlx-lm documents them."""
from __future__ import annotations

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from adapters import MAGNITUDE, A, B
from mindspore import nn

import mindpet_lite as mp
from mindpet_lite.formats import mlx
from mindpet_lite.formats.adapters import read_adapter
from mindpet_lite.formats.detect import detect
from mindpet_lite.formats.files import read_tensors, to_bytes
from mindpet_lite.offline.convert import convert
from mindpet_lite.offline.inspect import inspect
from mindpet_lite.offline.merge import merge

RNG = np.random.default_rng(0)
Q = "model.layers.0.self_attn.q_proj"
# (in, rank) and (rank, out)
PAIR = {f"{Q}.lora_a": RNG.standard_normal((6, 2)).astype(np.float32),
        f"{Q}.lora_b": RNG.standard_normal((2, 4)).astype(np.float32)}
CONFIG = {"fine_tune_type": "lora", "num_layers": 16, "model": "mlx-community/x", "seed": 0,
          "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.1, "keys": ["self_attn.q_proj"]}}
UPDATE = 20.0 * (PAIR[f"{Q}.lora_a"].astype(np.float64) @ PAIR[f"{Q}.lora_b"])


def write(tensors=PAIR, name="adapters.safetensors", folder="mlx", **changes):
    Path(folder).mkdir(exist_ok=True)
    Path(folder, name).write_bytes(to_bytes(tensors))
    Path(folder, "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    return Path(folder)


def parameters(**changes):
    return {"lora_parameters": {**CONFIG["lora_parameters"], **changes}}


class Attention(nn.Cell):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Dense(6, 4, has_bias=False)

    def construct(self, x):
        return self.q_proj(x)


class Block(nn.Cell):
    def __init__(self):
        super().__init__()
        self.self_attn = Attention()

    def construct(self, x):
        return self.self_attn(x)


class Net(nn.Cell):
    def __init__(self):
        super().__init__()
        self.layers = nn.CellList([Block()])

    def construct(self, x):
        return self.layers[0](x)


def test_it_is_read():
    found = read_adapter(write())
    (layer,) = found.state.layers.values()
    assert found.kind == "mlx" and list(found.state.layers) == [Q]
    assert layer.settings == {"lora_rank": 2, "lora_alpha": 40.0, "lora_dropout": 0.1}
    assert np.array_equal(layer.tensors[A], PAIR[f"{Q}.lora_a"].T) and layer.tensors[A].flags.c_contiguous
    assert np.array_equal(layer.tensors[B], PAIR[f"{Q}.lora_b"].T)
    report = inspect(Path("mlx"))
    assert report["format"] == "mlx" and report["norm"] == pytest.approx(np.linalg.norm(UPDATE), rel=1e-12)
    # What is saved in between, beside the last.
    write(name="0000100_adapters.safetensors")
    assert read_adapter(Path("mlx")).files[1].name == "adapters.safetensors"
    assert read_adapter(Path("mlx/0000100_adapters.safetensors")).kind == "mlx"


def test_it_loads_merges_and_converts(pynative_mode):
    net, x = Net(), RNG.standard_normal((3, 6))
    weight = net.layers[0].self_attn.q_proj.weight.asnumpy()
    mp.load_adapter(net, write()).set_train(False)
    np.testing.assert_allclose(net(ms.Tensor(x, ms.float32)).asnumpy(), x @ (weight.astype(np.float64).T + UPDATE),
                               rtol=1e-5, atol=1e-5)
    Path("base.safetensors").write_bytes(to_bytes({f"{Q}.weight": weight}))
    merge(Path("base.safetensors"), Path("mlx"), Path("merged"), quiet=True)
    np.testing.assert_allclose(read_tensors(Path("merged/base.safetensors"))[f"{Q}.weight"], weight + UPDATE.T,
                               rtol=1e-5, atol=1e-5)
    convert(Path("mlx"), Path("peft"), "peft")
    config = json.loads(Path("peft/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["target_modules"]) == (2, 40.0, 0.1, [Q])


def test_dora():
    state = read_adapter(write({**PAIR, f"{Q}.m": np.arange(1, 5, dtype=np.float32)}, fine_tune_type="dora")).state
    assert state.layers[Q].settings["use_dora"] and state.layers[Q].tensors[MAGNITUDE].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("tensors, changes, message", [
    ({}, {}, "it holds no tensor"), (PAIR, {"fine_tune_type": "full"}, "fine_tune_type must be 'lora' or 'dora'"),
    (PAIR, {"fine_tune_type": "dora"}, "q_proj lacks m"), (PAIR, {"lora_parameters": None}, "lora_parameters must be"),
    ({**PAIR, f"{Q}.m": np.ones(4, np.float32)}, {}, "q_proj.m is no tensor of a LoRA layer"),
    ({**PAIR, f"{Q}.m": np.ones(3, np.float32)}, {"fine_tune_type": "dora"}, "is not one number for each of the 4"),
    ({f"{Q}.lora_a": PAIR[f"{Q}.lora_a"]}, {}, "q_proj lacks lora_b"),
    ({**PAIR, "model.norm.weight": np.ones(6, np.float32)}, {}, "model.norm.weight is no tensor of a LoRA layer"),
    (PAIR, parameters(rank=3), r"lora_a of shape \(6, 2\) and lora_b of shape \(2, 4\) do not fit rank 3"),
    (PAIR, parameters(rank=True), "rank must be a positive integer"), (PAIR, parameters(scale="2"), "scale must be"),
    (PAIR, parameters(scale=-1), "scale must be a positive number"), (PAIR, parameters(dropout=1.5), "dropout must be"),
    (PAIR, parameters(alpha=16), "alpha = 16 beside the scale"),
    ({"x.lora_a": np.ones((3, 2, 6), np.float32), "x.lora_b": np.ones((3, 4, 2), np.float32)}, {}, "layer of experts"),
    ({key.replace(Q, "model.embed_tokens"): value for key, value in PAIR.items()}, {}, "embed_tokens: mlx-lm's LoRA"),
], ids=lambda item: str(item)[:30] if isinstance(item, str) else "")
def test_what_is_refused(tensors, changes, message):
    with pytest.raises(ValueError, match=message):
        mlx.decode(tensors, {**CONFIG, **changes})


def test_first_versions_do_not_say_what_they_tuned():
    config = {name: value for name, value in CONFIG.items() if name != "fine_tune_type"}
    assert detect(list(PAIR), {}, config) == "mlx"
    ours, theirs = mlx.decode(PAIR, config), mlx.decode(PAIR, CONFIG)
    assert ours.layers[Q].settings == theirs.layers[Q].settings


def test_it_is_told_from_mindformers():
    names = list(PAIR)
    assert detect(names, {}, CONFIG) == "mlx"
    assert detect(names, {}, {"r": 2, "lora_alpha": 4}) == "mindformers" and detect(names, {}, None) == "mindformers"
    # A square layer fits both ways: without the config that says which, it is refused.
    square = {f"{Q}.lora_a": np.ones((6, 2), np.float32), f"{Q}.lora_b": np.ones((2, 6), np.float32)}
    Path("a.safetensors").write_bytes(to_bytes(square))
    with pytest.raises(ValueError, match="looks like mlx-lm's, .in, rank.: give the directory with its adapter_config"):
        read_adapter(Path("a.safetensors"))
    with pytest.raises(FileNotFoundError, match="no adapter_config.json beside"):
        read_adapter(Path("a.safetensors"), "mlx")
