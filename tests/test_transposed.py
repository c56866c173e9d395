"""GPT-2's Conv1D: our class and those of libraries, LoRA on it, and PEFT's files with fan_in_fan_out."""
from __future__ import annotations

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from nets import inputs, numbers, unchanged
from safetensors.numpy import save_file

import mindpet_lite as mp
from mindpet_lite.delta import Delta
from mindpet_lite.delta.hosts import TransposedHost
from mindpet_lite.delta.hosts.transposed import Conv1D as OwnConv1D


class Conv1D(nn.Cell):
    """As mindone has it: another class of the name, by another operator."""

    size = "nf"

    def __init__(self, nf, nx):
        super().__init__()
        setattr(self, self.size, nf)
        rng = np.random.default_rng(nf)
        self.weight = Parameter(Tensor(rng.standard_normal((nx, nf)).astype(np.float32)), name="weight")
        self.bias = Parameter(Tensor(rng.standard_normal(nf).astype(np.float32)), name="bias")

    def construct(self, x):
        return ops.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(x.shape[:-1] + (self.bias.shape[0],))


class Block(nn.Cell):
    """The feed-forward half of a block of GPT-2, with its names."""

    def __init__(self, kind=Conv1D):
        super().__init__()
        self.c_fc, self.c_proj = kind(12, 6), kind(6, 12)

    def construct(self, x):
        return x + self.c_proj(ops.gelu(self.c_fc(x)))


X = inputs(2, 3, 6)
FACTORS = {"c_fc": (6, 12), "c_proj": (12, 6)}


def lora(**settings):
    return mp.LoraConfig(2, 4, target_modules=["c_fc", "c_proj"], **settings)


def moved(net):
    """Return the net with all that trains moved from its start."""
    rng = np.random.default_rng(1)
    for item in net.trainable_params():
        item.set_data(Tensor((item.asnumpy() + 0.1 * rng.standard_normal(item.shape)).astype(np.float32)))
    return net


@pytest.mark.parametrize("config", [lora(), lora(use_dora=True), mp.IA3Config(target_modules=["c_fc"]),
                                    mp.HiraConfig(r=2, target_modules=["c_fc", "c_proj"])],
                         ids=["lora", "dora", "ia3", "hira"])
def test_a_librarys_class_starts_merges_and_comes_back(config, mode):
    net = Block()
    layer, before = net.c_fc, net(X).asnumpy()
    base = {item.name: item.asnumpy().copy() for item in net.get_parameters()}
    mp.get_pet_model(net, config)
    assert isinstance(net.c_fc, TransposedHost) and isinstance(net.c_fc, Delta) and net.c_fc.weight is layer.weight
    np.testing.assert_allclose(net(X).asnumpy(), before, rtol=1e-6, atol=1e-6)
    y = moved(net)(X).asnumpy()
    assert np.abs(y - before).max() > 1e-2
    mp.merge(net)
    assert net.c_fc is layer
    np.testing.assert_allclose(net(X).asnumpy(), y, rtol=1e-5, atol=1e-5)
    mp.unmerge(net)
    assert np.array_equal(net(X).asnumpy(), y)
    assert {item.name for item in net.get_parameters()} > set(base)
    assert all(np.array_equal(item.asnumpy(), base[item.name]) for item in net.get_parameters() if item.name in base)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_lora_is_the_formula(settings, mode):
    layer = moved(mp.get_pet_model(nn.SequentialCell(Conv1D(4, 6)), mp.LoraConfig(
        2, 6, target_modules=["0"], **settings)))[0]
    weight, bias = numbers(layer.weight).T, numbers(layer.bias)
    a, b = numbers(layer.mindpet_delta_lora_a), numbers(layer.mindpet_delta_lora_b)
    new = weight + 3 * b @ a
    if "use_dora" in settings:
        new *= (numbers(layer.mindpet_delta_lora_magnitude).reshape(-1) / np.linalg.norm(new, axis=1))[:, None]
    if "lora_bias" in settings:
        bias = bias + 3 * numbers(layer.mindpet_delta_lora_b_bias)
    np.testing.assert_allclose(layer(X).asnumpy(), numbers(X) @ new.T + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_from_the_weight_leave_the_output(start, mode):
    net = Block()
    before, weight = net(X).asnumpy(), numbers(net.c_fc.weight)
    mp.get_pet_model(net, lora(init_lora_weights=start))
    np.testing.assert_allclose(net(X).asnumpy(), before, rtol=1e-4, atol=1e-4)
    a, b = numbers(net.c_fc.mindpet_delta_lora_a), numbers(net.c_fc.mindpet_delta_lora_b)
    np.testing.assert_allclose(numbers(net.c_fc.weight) + 2 * (b @ a).T, weight, atol=1e-5)
    assert np.abs(b @ a).max() > 0.1


def test_what_is_a_librarys_class_and_what_is_not():
    named = type("Conv1D", (Conv1D,), {"size": "n_out"})
    own = OwnConv1D(4, 6)
    assert all(TransposedHost.matches(cell) for cell in (own, Conv1D(4, 6), named(4, 6)))
    np.testing.assert_allclose(own(X).asnumpy(), numbers(X) @ numbers(own.weight), rtol=1e-5, atol=1e-6)
    more, other = Conv1D(4, 6), Conv1D(4, 6)
    more.gain, other.nf = Parameter(Tensor(1.0), name="gain"), 6
    within = Conv1D(4, 6)
    within.act = nn.ReLU()
    for cell in (more, other, within, type("Mine", (Conv1D,), {})(4, 6), nn.Dense(4, 6), nn.Conv1d(4, 6, 1)):
        assert not TransposedHost.matches(cell)
    net = nn.SequentialCell(more)
    with unchanged(net), pytest.raises(ValueError, match="adapts nn.Dense, not Conv1D.*GPT-2's Conv1D"):
        mp.get_pet_model(net, mp.IA3Config(target_modules=["0"]))
    changed = Conv1D(4, 6)
    changed.construct = lambda x: x
    with pytest.raises(ValueError, match="overrides GPT-2's Conv1D.construct"):
        mp.get_pet_model(nn.SequentialCell(changed), mp.IA3Config(target_modules=["0"]))
    mine = nn.SequentialCell(type("Mine", (OwnConv1D,), {"construct": lambda self, x: x})(4, 6))
    with pytest.raises(ValueError, match="Mine overrides GPT-2's Conv1D.construct"):
        mp.get_pet_model(mine, mp.IA3Config(target_modules=["0"]))


@pytest.mark.parametrize("config", [mp.LoraConfig(2, 4, target_modules="all-linear"),
                                    mp.HiraConfig(r=2, target_modules="all-linear")], ids=["lora", "hira"])
def test_all_linear_means_it(config):
    net = mp.get_pet_model(Block(), config)
    assert isinstance(net.c_fc, Delta) and isinstance(net.c_proj, Delta)


def test_types_are_kept(mode):
    net = Block()
    for item in net.get_parameters():
        item.set_dtype(ms.float16)
    mp.get_pet_model(net, lora())
    y = moved(net)(X.astype(ms.float16))
    assert y.dtype == ms.float16
    mp.merge(net)
    assert net.c_fc.weight.dtype == ms.float16 and net.c_fc.weight.shape == (6, 12)
    np.testing.assert_allclose(numbers(net(X.astype(ms.float16))), numbers(y), atol=2e-2, rtol=2e-2)


def peft_folder(folder, config, tensors):
    """Write a directory as PEFT does for a model with transformers' Conv1D."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({
        "auto_mapping": None, "base_model_name_or_path": "gpt2", "fan_in_fan_out": True, "inference_mode": True,
        "modules_to_save": None, "target_modules": sorted(FACTORS), "task_type": "CAUSAL_LM", **config}))
    save_file({f"base_model.model.{key}": value.astype(np.float32) for key, value in tensors.items()},
              str(folder / "adapter_model.safetensors"))
    return folder


def of_lora(rng, weights):
    tensors = {f"{path}.lora_{name}.weight": rng.standard_normal(shape) for path, (nx, nf) in FACTORS.items()
               for name, shape in (("A", (2, nx)), ("B", (nf, 2)))}
    # PEFT: weight += transpose(B @ A, fan_in_fan_out) * alpha / r.
    new = {path: weight + 3 * (tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]).T
           for path, weight in weights.items()}
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "lora_dropout": 0.0, "bias": "none"}, tensors, new


def of_hira(rng, weights):
    tensors = {f"{path}.hira_{name}": rng.standard_normal(shape) for path, (nx, nf) in FACTORS.items()
               for name, shape in (("A", (2, nx)), ("B", (nf, 2)))}
    # PEFT: weight *= 1 + transpose(B @ A, fan_in_fan_out).
    new = {path: weight * (1 + (tensors[f"{path}.hira_B"] @ tensors[f"{path}.hira_A"]).T)
           for path, weight in weights.items()}
    return {"peft_type": "HIRA", "r": 2, "hira_dropout": 0.0, "init_weights": True, "rank_pattern": {}}, tensors, new


def of_ia3(rng, weights):
    tensors = {"c_fc.ia3_l": rng.standard_normal((12, 1)), "c_proj.ia3_l": rng.standard_normal((1, 12))}
    # PEFT: weight *= transpose(l, fan_in_fan_out); here l is of the outputs of c_fc and of the inputs of c_proj.
    new = {path: weight * tensors[f"{path}.ia3_l"].T for path, weight in weights.items()}
    return {"peft_type": "IA3", "feedforward_modules": ["c_proj"], "init_ia3_weights": True}, tensors, new


@pytest.mark.parametrize("made", [of_lora, of_hira, of_ia3], ids=["lora", "hira", "ia3"])
def test_pefts_files_with_fan_in_fan_out_load_merge_and_come_back(made, mode, tmp_path):
    net, wanted = Block(), Block()
    rng = np.random.default_rng(2)
    weights = {path: numbers(getattr(net, path).weight) for path in FACTORS}
    config, tensors, new = made(rng, weights)
    folder = peft_folder(tmp_path / "peft", config, tensors)
    for path, value in new.items():
        getattr(wanted, path).weight.set_data(Tensor(value.astype(np.float32)))
    if made is of_ia3:
        wanted.c_fc.bias.set_data(Tensor(numbers(wanted.c_fc.bias) * tensors["c_fc.ia3_l"][:, 0], ms.float32))
    y = wanted(X).asnumpy()
    mp.load_adapter(net, folder)
    np.testing.assert_allclose(net(X).asnumpy(), y, rtol=1e-4, atol=1e-4 * np.abs(y).max())
    mp.save_adapter(net, tmp_path / "ours")
    assert json.loads(Path(tmp_path / "ours" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    mp.merge(net)
    assert type(net.c_fc) is Conv1D
    for path, value in new.items():
        np.testing.assert_allclose(numbers(getattr(net, path).weight), value, rtol=1e-5, atol=1e-5)
