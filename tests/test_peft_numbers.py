"""PEFT's own adapters in our nets: its output, gradients, merged output and training, and back to its files."""
from __future__ import annotations

import functools
import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from conftest import MODES, SHARED
from mindspore import Parameter, Tensor, nn, ops
from peft_models import base_model, close, inputs_of
from safetensors.numpy import load_file

import mindpet_lite as mp
from mindpet_lite.delta import METHODS
from mindpet_lite.delta.parts import put
from mindpet_lite.formats import peft
from mindpet_lite.formats.starts import loses_base
from mindpet_lite.graph.adapters import deltas

ROOT = SHARED / "fixtures" / "peft"
# What we do not have, by the field of the config that is refused.
REFUSED = {
    "lora_alora": "alora_invocation_tokens", "lora_bdlora": "use_bdlora", "lora_init_mica": "init_lora_weights",
    "lora_kasa": "kasa_config",
    "lora_monteclora": "monteclora_config",
    "lora_velora": "velora_config",
}
# PEFT 0.21.2's own backward pass of LoHa with t1 and t2 puts the other product's tensors into the gradients of these
# (that formula in numpy gives the fixture's numbers within 3e-7); ours are the differences of `test_methods.py`. So
# these, and the training that went with them, are not compared.
WRONG_GRADIENTS = {"loha_effective_conv2d": {f"base_model.model.{layer}.hada_{name}" for layer in ("conv1", "conv2")
                                             for name in ("w1_a", "w2_a")}}
# PEFT's name of each method that we have, and PEFT's keys of its tensors by our names. What lengthens the sequence
# needs another net: `test_peft_prompts.py`.
KEYS = {"LORA": peft._KEYS, **{kind.peft.peft_type: kind.peft.keys for kind in METHODS.values()
                               if kind.peft and not kind.peft.home}}


def folders() -> list[tuple[str, str]]:
    """Return the fixtures of our methods; lora_combined holds no adapter but several, for what combines them."""
    found = []
    for config in sorted(ROOT.glob("*/*/adapter_config.json")):
        family, name = config.parts[-3:-1]
        if family != "unet_tiny" and json.loads(config.read_text())["peft_type"] in KEYS:
            found.append((family, name))
    return found


FOLDERS = folders()
PLAYED = [(family, name) for family, name in FOLDERS if name not in REFUSED]
# Their layers compute what those of lora_plain and vera do: other layers are adapted, or the values are others. That is
# compiled once in graph mode.
OTHER_VALUES = ("all_linear", "init_", "layers_to_transform", "rank_alpha_pattern", "regex", "rslora", "no_projection")
RUNS = [(*folder, mode) for folder in PLAYED for mode in MODES
        if mode == "pynative" or not any(word in folder[1] for word in OTHER_VALUES)]

needs_fixtures = pytest.mark.skipif(not FOLDERS, reason=f"the shared fixtures are not at {SHARED}")
every_folder = pytest.mark.parametrize(("family", "name"), PLAYED)


def loaded(family: str, name: str) -> nn.Cell:
    """Return the base model with the adapter; one whose start left a base that no file tells is on that base."""
    folder, net = ROOT / family / name, base_model(SHARED, family)
    is_lost = loses_base(json.loads((folder / "adapter_config.json").read_text()).get("init_lora_weights"))
    if is_lost:
        for path, value in load_file(folder / "residual_base.safetensors").items():
            net.parameters_dict()[path].set_data(Tensor(value))
    return mp.load_adapter(net, folder, residual_base=is_lost)


def trained(net: nn.Cell, io: dict[str, np.ndarray]) -> dict[str, Parameter]:
    """Return by PEFT's key what trained."""
    found = {}
    for path, delta in deltas(net).items():
        kind = METHODS[delta.method].peft
        keys = kind.keys if kind else peft._KEYS
        found.update({f"base_model.model.{path}.{keys[own]}": item for own, item in delta.delta_parameters().items()})
    base = {path: item for path, item in net.parameters_and_names() if "mindpet_delta" not in path}
    for key in io:
        path = key.removeprefix("grad.base_model.model.").replace(".base_layer", "")
        if key.startswith("grad.") and path in base:
            found[key.removeprefix("grad.")] = base[path]
    return found


class AdamW:
    """torch's AdamW, in numpy: MindSpore's puts the weight decay elsewhere."""

    def __init__(self, parameters: list[Parameter]) -> None:
        self.parameters, self.step = parameters, 0
        self.first, self.second = ([np.zeros(item.shape) for item in parameters] for _ in range(2))

    def __call__(self, gradients) -> None:
        self.step += 1
        for index, (item, gradient) in enumerate(zip(self.parameters, gradients)):
            value, slope = item.asnumpy().astype(np.float64) * (1 - 1e-2 * 1e-2), gradient.asnumpy().astype(np.float64)
            self.first[index] = 0.9 * self.first[index] + 0.1 * slope
            self.second[index] = 0.999 * self.second[index] + 0.001 * slope ** 2
            root = np.sqrt(self.second[index] / (1 - 0.999 ** self.step)) + 1e-8
            value -= 1e-2 * self.first[index] / (1 - 0.9 ** self.step) / root
            put(item, Tensor(value.astype(np.float32)))


@needs_fixtures
@pytest.mark.parametrize(("family", "name", "mode"), RUNS, indirect=["mode"])
def test_output_gradients_training_and_merge_are_pefts(family, name, mode):
    io = dict(np.load(ROOT / family / name / "io.npz"))
    target = np.load(ROOT / family / "base" / "io.npz")
    net = loaded(family, name)
    x, wanted = inputs_of(io), Tensor(io.get(f"target.{net.output}", target[f"target.{net.output}"]))
    parameters = trained(net, io)
    assert {f"grad.{key}" for key in parameters} == {key for key in io if key.startswith("grad.")}

    def loss_of(value):
        y = net(value)
        return ((y - wanted) ** 2).mean(), y

    step = ms.value_and_grad(loss_of, None, list(parameters.values()), has_aux=True)
    (found, y), gradients = step(x)
    close(y.asnumpy(), io[f"output.{net.output}"], 1e-5, "output")
    close(found.asnumpy(), io["loss"], 1e-5, "loss")
    wrong = WRONG_GRADIENTS.get(name, set())
    for key, gradient in zip(parameters, gradients):
        if key not in wrong:
            close(gradient.asnumpy(), io[f"grad.{key}"], 1e-4, key)
    before, optimizer = [item.asnumpy().copy() for item in parameters.values()], AdamW(list(parameters.values()))
    for expected in () if wrong else io["adamw_losses"]:
        for delta in deltas(net).values():
            # PEFT's forward writes into the parameter what COFT projects; ours has no side effects.
            if hasattr(delta, "project"):
                delta.project()
        (loss, _), gradients = step(x)
        close(loss.asnumpy(), np.float64(expected), 1e-4, "loss in training")
        optimizer(gradients)
    if f"merged.{net.output}" in io:
        for item, value in zip(parameters.values(), before):
            put(item, Tensor(value))
        mp.merge(net)
        close(net(x).asnumpy(), io[f"merged.{net.output}"], 1e-5, "merged output")


@needs_fixtures
@every_folder
def test_files_come_back_as_peft_wrote_them(family, name):
    folder = ROOT / family / name
    net = loaded(family, name)
    mp.save_adapter(net, "adapter")
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (Path("adapter"), folder))
    assert {key: (value.dtype, value.shape, value.tobytes()) for key, value in ours.items()} == {
        key: (value.dtype, value.shape, value.tobytes()) for key, value in theirs.items()}
    assert json.loads(Path("adapter/adapter_config.json").read_text()) == json.loads(
        (folder / "adapter_config.json").read_text())


@needs_fixtures
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_we_do_not_have_is_refused_by_its_field(name):
    net = base_model(SHARED, "llama_tiny")
    before = {path: item.asnumpy().tobytes() for path, item in net.parameters_and_names()}
    with pytest.raises(ValueError, match=f"{REFUSED[name]} = .* is not supported"):
        mp.load_adapter(net, ROOT / "llama_tiny" / name)
    assert {path: item.asnumpy().tobytes() for path, item in net.parameters_and_names()} == before


@needs_fixtures
@pytest.mark.parametrize("name", ["lora_init_pissa_niter_4", "lora_init_corda", "lora_init_lora_ga"])
def test_an_adapter_whose_base_no_file_tells_is_not_put_on_a_plain_one(name):
    net, folder = base_model(SHARED, "llama_tiny"), ROOT / "llama_tiny" / name
    before = {path: item.asnumpy().tobytes() for path, item in net.parameters_and_names()}
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj and 3 more layers: the start.*residual_base=True"):
        mp.load_adapter(net, folder)
    assert {path: item.asnumpy().tobytes() for path, item in net.parameters_and_names()} == before
    with pytest.raises(ValueError, match="that of this adapter took nothing: leave it out"):
        mp.load_adapter(net, ROOT / "llama_tiny" / "lora_plain", residual_base=True)


@needs_fixtures
@pytest.mark.parametrize("name", ["lora_init_pissa", "lora_init_olora"])
def test_a_start_that_can_be_taken_again_loads_on_its_residual_base_too(name, mode):
    folder, net = ROOT / "llama_tiny" / name, base_model(SHARED, "llama_tiny")
    for path, value in load_file(folder / "residual_base.safetensors").items():
        net.parameters_dict()[path].set_data(Tensor(value))
    mp.load_adapter(net, folder, residual_base=True)
    io = dict(np.load(folder / "io.npz"))
    close(net(inputs_of(io)).asnumpy(), io["output.logits"], 1e-5, "output")
    with pytest.raises(ValueError, match="took a part out of the base"), mp.adapters_disabled(net):
        pass


# The same settings by injection: which layers, and with which values, is a matter of no mode

@functools.lru_cache
def plain_output(values: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Return the output of the plain Llama for these ids, computed once."""
    ids = Tensor(np.frombuffer(values, np.int32).reshape(shape).copy())
    return base_model(SHARED, "llama_tiny")(ids).asnumpy()


def plain_of(ids: Tensor) -> np.ndarray:
    assert ids.dtype == ms.int32
    return plain_output(ids.asnumpy().tobytes(), ids.shape)


@needs_fixtures
@pytest.mark.parametrize(("settings", "name"), [
    ({"target_modules": ["q_proj", "v_proj"], "use_dora": True}, "lora_dora"),
    ({"target_modules": ["q_proj", "v_proj"], "use_rslora": True}, "lora_rslora"),
    ({"target_modules": ["q_proj", "v_proj"], "lora_bias": True}, "lora_lora_bias"),
    ({"target_modules": "all-linear", "exclude_modules": ["lm_head"]}, "lora_all_linear"),
    ({"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"^.*v_proj$": 2, "layers.0.self_attn.q_proj": 8},
      "alpha_pattern": {"v_proj": 32}}, "lora_rank_alpha_pattern"),
    ({"target_modules": r".*\.1\..*(q_proj|down_proj)"}, "lora_regex"),
    ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
     "lora_layers_to_transform"),
    ({"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}, "lora_modules_to_save"),
    ({"target_modules": ["q_proj", "v_proj"], "trainable_token_indices": {"embed_tokens": [5, 9, 153]}},
     "lora_trainable_token_indices"),
    ({"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, "lora_embedding_dora"),
    ({"target_modules": ["q_proj", "v_proj"], "layer_replication": [[0, 2], [1, 2]]}, "lora_layer_replication"),
    ({"target_parameters": ["q_proj.weight", "v_proj.weight"]}, "lora_target_parameters"),
])
def test_a_config_adapts_what_pefts_does(settings, name):
    net = mp.get_pet_model(base_model(SHARED, "llama_tiny"), mp.LoraConfig(4, 8, **settings))
    io = dict(np.load(ROOT / "llama_tiny" / name / "io.npz"))
    x = inputs_of(io)
    y = net(x).asnumpy()
    with mp.adapters_disabled(net):
        # Replicated layers make another net.
        plain = net(x).asnumpy() if "layer_replication" in settings else plain_of(x)
    assert np.array_equal(y, plain) or settings.get("use_dora")
    # DoRA starts with m / ||W||, which is 1 but for a rounding.
    close(y, plain, 1e-5, "start")
    assert {f"grad.{key}" for key, item in trained(net, io).items() if item.requires_grad} == {
        key for key in io if key.startswith("grad.")}
    mp.load_adapter(net, ROOT / "llama_tiny" / name)
    close(net(x).asnumpy(), io["output.logits"], 1e-5, "output")


@needs_fixtures
@pytest.mark.parametrize("bias, expected", [("lora_only", {"conv1.bias"}), ("none", set()),
                                            ("all", {"conv1.bias", "conv2.bias", "conv3.bias"})])
def test_biases_that_train_beside(bias, expected):
    net = mp.get_pet_model(base_model(SHARED, "conv_tiny"), mp.LoraConfig(4, 8, target_modules=["conv1"], bias=bias))
    assert {path for path, item in net.parameters_and_names() if item.requires_grad and "delta" not in path} == expected


@needs_fixtures
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_0", "pissa_niter_4", "olora", "gaussian", "orthogonal"])
def test_starts_leave_the_output_where_it_was(start):
    plain = base_model(SHARED, "llama_tiny")
    net = mp.get_pet_model(base_model(SHARED, "llama_tiny"),
                           mp.LoraConfig(4, 8, target_modules=["q_proj", "v_proj"], init_lora_weights=start))
    ids = Tensor(np.random.default_rng(0).integers(1, 256, (2, 8)).astype(np.int32))
    close(net(ids).asnumpy(), plain_of(ids), 1e-5, start)
    layer, weight = net.model.layers[0].self_attn.q_proj, plain.model.layers[0].self_attn.q_proj.weight.asnumpy()
    a, b = (item.asnumpy().astype(np.float64) for item in layer.delta_parameters().values())
    if start.startswith("pissa"):
        assert np.allclose(layer.weight.asnumpy() + 2 * b @ a, weight, atol=1e-6)
    if start in ("pissa", "pissa_niter_4"):
        values = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
        # Iterations of a few directions come near to singular values that lie close together.
        near = 1e-5 if start == "pissa" else 5e-3
        assert np.allclose(np.linalg.svd(2 * b @ a, compute_uv=False)[:4], values[:4], rtol=near)
        if start == "pissa":
            assert np.allclose(np.linalg.svd(layer.weight.asnumpy().astype(np.float64), compute_uv=False)[:-4],
                               values[4:], rtol=1e-4)
    elif start == "olora":
        assert np.allclose(b.T @ b, np.eye(4), atol=1e-5)
        assert np.allclose(layer.weight.asnumpy() + 2 * b @ a, weight, atol=1e-6)
    else:
        assert start.startswith("pissa") or np.array_equal(layer.weight.asnumpy(), weight)
        assert start.startswith("pissa") or np.allclose(b @ a, 0, atol=1e-6) and a.any()


@needs_fixtures
def test_a_net_without_its_start_is_not_switched_off():
    net = mp.get_pet_model(base_model(SHARED, "llama_tiny"),
                           mp.LoraConfig(4, 8, target_modules=["q_proj"], init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="took a part out of the base"), mp.adapters_disabled(net):
        pass


@needs_fixtures
@pytest.mark.parametrize("settings, message", [
    ({"use_dora": True, "lora_bias": True}, "do not go together"), ({"bias": "some"}, "bias must be one of"),
    ({"init_lora_weights": "pisa"}, "init_lora_weights must be one of"),
    ({"init_lora_weights": "pissa", "lora_a_init": "zeros"}, "give one of them"),
    ({"rank_pattern": {"[": 2}}, "no regular expression"), ({"rank_pattern": {"q": 0}}, "positive int"),
    ({"alpha_pattern": {"q": -1}}, "above 0")])
def test_wrong_settings(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        mp.LoraConfig(4, 8, target_modules=["q_proj"], **settings)


@needs_fixtures
@pytest.mark.parametrize("tokens", [{"embed": [1]}, {"embed_tokens": [999]}, {"embed_tokens": [3, 3]}])
def test_tokens_that_are_not_there_are_refused(tokens):
    net = base_model(SHARED, "llama_tiny")
    names = [item.name for item in net.get_parameters()]
    with pytest.raises(ValueError, match="trainable_token_indices"):
        mp.get_pet_model(net, mp.LoraConfig(4, 8, target_modules=["q_proj"], trainable_token_indices=tokens))
    assert [item.name for item in net.get_parameters()] == names


def test_trained_tokens_switch_and_merge(mode):
    class Net(nn.Cell):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.out = nn.Dense(4, 3)

        def construct(self, ids):
            return self.out(self.embed(ids))

    plain = Net()
    net = Net()
    for ours, theirs in zip(net.get_parameters(), plain.get_parameters()):
        ours.set_data(Tensor(theirs.asnumpy().copy()))
    mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["out"], trainable_token_indices={"embed": [2, 5]}))
    ids = Tensor(np.array([[0, 2, 5], [8, 5, 1]], np.int32))
    net.embed.mindpet_delta_lora_tokens.set_data(ops.ones((2, 4), ms.float32))
    y = net(ids).asnumpy()
    assert np.array_equal(net.embed(ids).asnumpy()[0, 1:], np.ones((2, 4)))
    with mp.adapters_disabled(net):
        assert np.array_equal(net(ids).asnumpy(), plain(ids).asnumpy())
    mp.merge(net)
    np.testing.assert_allclose(net(ids).asnumpy(), y, rtol=1e-5, atol=1e-6)
    mp.unmerge(net)
    assert np.array_equal(net(ids).asnumpy(), y)
