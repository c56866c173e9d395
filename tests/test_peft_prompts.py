"""PEFT's adapters of virtual tokens in our Llama: output, gradients and training, and back to its files."""
from __future__ import annotations

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from conftest import SHARED
from mindspore import Tensor, ops
from peft_models import Llama, LongLlama, PrefixLlama, base_model, close, inputs_of
from safetensors.numpy import load_file
from test_peft_numbers import AdamW

import mindpet_lite as mp
from mindpet_lite.graph.adapters import deltas

ROOT = SHARED / "fixtures" / "peft" / "llama_tiny"
pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason=f"the shared fixtures are not at {SHARED}")
# What trained, by PEFT's name of its gradient, by ours.
TRAINED = {"prompt_tuning": {"grad_param.prompt_encoder.default.embedding.weight":
                             "mindpet_delta_prompt_tuning_prompt"},
           "multitask_prompt_tuning": {
               f"grad.{theirs}": f"mindpet_delta_multitask_prompt_tuning_{ours}" for theirs, ours in (
                   ("prompt_embeddings", "prompt"), ("prefix_task_cols", "task_cols"),
                   ("prefix_task_rows", "task_rows"))}}
# The last layer of P-tuning's encoders. Their files hold no encoder, and nothing else tells its values.
ENCODED = {"p_tuning_mlp": "mlp_head.4", "p_tuning_lstm": "mlp_head.2"}


def llama():
    return base_model(SHARED, "llama_tiny", LongLlama)


def loaded(name):
    """Return a net with PEFT's adapter, its delta, and PEFT's numbers."""
    io = dict(np.load(ROOT / name / "io.npz"))
    if name in ENCODED:
        with pytest.warns(UserWarning, match="not the encoder"):
            net = mp.load_adapter(llama(), ROOT / name)
    else:
        net = mp.load_adapter(llama(), ROOT / name)
    if "input.task_ids" in io:
        net.model.embed_tokens.set_task_ids(io["input.task_ids"])
    return net, deltas(net)["model.embed_tokens"], io


@pytest.mark.parametrize("name", TRAINED)
def test_output_gradients_and_training_are_pefts(name, mode):
    net, delta, io = loaded(name)
    x, wanted = inputs_of(io), Tensor(io["target.logits"])
    parameters = {key: delta.delta_parameters()[own] for key, own in TRAINED[name].items()}
    assert {id(item) for item in parameters.values()} == {id(item) for item in net.trainable_params()}

    def loss_of(value):
        y = net(value)
        return ((y - wanted) ** 2).mean(), y

    step = ms.value_and_grad(loss_of, None, list(parameters.values()), has_aux=True)
    (found, y), gradients = step(x)
    close(y.asnumpy(), io["output.logits"], 1e-5, "output")
    close(found.asnumpy(), io["loss"], 1e-5, "loss")
    for key, gradient in zip(parameters, gradients):
        close(gradient.asnumpy(), io[key], 1e-4, key)
    optimizer = AdamW(list(parameters.values()))
    for expected in io["adamw_losses"]:
        (loss, _), gradients = step(x)
        close(loss.asnumpy(), np.float64(expected), 1e-4, "loss in training")
        optimizer(gradients)


@pytest.mark.parametrize("name", ENCODED)
def test_rows_that_an_encoder_gave(name, mode):
    net, delta, io = loaded(name)
    x, wanted = inputs_of(io), Tensor(io["target.logits"])
    rows = delta.mindpet_delta_p_tuning_prompt

    def loss_of(value):
        y = net(value)
        return ((y - wanted) ** 2).mean(), y

    (found, y), (slope,) = ms.value_and_grad(loss_of, None, [rows], has_aux=True)(x)
    close(y.asnumpy(), io["output.logits"], 1e-5, "output")
    close(found.asnumpy(), io["loss"], 1e-5, "loss")
    last = f"grad_param.prompt_encoder.default.{ENCODED[name]}"
    slope = slope.asnumpy().astype(np.float64)
    # P = H Wᵀ + b with the encoder's last layer, whose input H is not known, but the same for all of W.
    close(slope.sum(0), io[f"{last}.bias"], 1e-4, "bias")
    below = np.linalg.pinv(slope.T) @ io[f"{last}.weight"]
    close(slope.T @ below, io[f"{last}.weight"], 1e-4, "weight")
    assert below.min() > -1e-3 * below.max(), "below the last layer is a ReLU"


@pytest.mark.parametrize("name", [*TRAINED, *ENCODED])
def test_files_come_back_as_peft_wrote_them(name):
    net = loaded(name)[0]
    mp.save_adapter(net, "adapter")
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (Path("adapter"), ROOT / name))
    assert {key: (value.dtype, value.shape, value.tobytes()) for key, value in ours.items()} == {
        key: (value.dtype, value.shape, value.tobytes()) for key, value in theirs.items()}
    assert json.loads(Path("adapter/adapter_config.json").read_text()) == json.loads(
        (ROOT / name / "adapter_config.json").read_text())


# Keys and values

PREFIXES = pytest.mark.parametrize("name", ["prefix_tuning", "prefix_tuning_projection"])


def prefixed(name):
    """Return a net whose attentions have PEFT's prefixes."""
    with pytest.warns(UserWarning, match="not the MLP"):
        return mp.load_adapter(base_model(SHARED, "llama_tiny", PrefixLlama), ROOT / name)


@PREFIXES
def test_prefixes_are_pefts(name, mode):
    net, io = prefixed(name), dict(np.load(ROOT / name / "io.npz"))
    target = Tensor(np.load(ROOT / "base" / "io.npz")["target.logits"])
    parameters = [item for delta in deltas(net).values() for item in delta.delta_parameters().values()]
    assert {id(item) for item in parameters} == {id(item) for item in net.trainable_params()}

    def loss_of(value):
        y = net(value)
        return ((y - target) ** 2).mean(), y

    step, x = ms.value_and_grad(loss_of, None, parameters, has_aux=True), inputs_of(io)
    (found, y), gradients = step(x)
    close(y.asnumpy(), io["output.logits"], 1e-5, "output")
    close(found.asnumpy(), io["loss"], 1e-5, "loss")
    slope = ops.concat(gradients, 1).asnumpy()
    prefix = "grad_param.prompt_encoder.default."
    if "projection" in name:
        close(slope.sum(0), io[f"{prefix}transform.2.bias"], 1e-4, "bias")
        return
    close(slope, io[f"{prefix}embedding.weight"], 1e-4, "rows")
    optimizer = AdamW(parameters)
    for expected in io["adamw_losses"]:
        (loss, _), gradients = step(x)
        close(loss.asnumpy(), np.float64(expected), 1e-4, "loss in training")
        optimizer(gradients)


@PREFIXES
def test_files_of_prefixes_come_back_as_peft_wrote_them(name):
    mp.save_adapter(prefixed(name), "adapter")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        ours, theirs = (place / file for place in (Path("adapter"), ROOT / name))
        assert ours.suffix != ".json" or json.loads(ours.read_text()) == json.loads(theirs.read_text())
        assert ours.suffix == ".json" or load_file(ours)["prompt_embeddings"].tobytes() == load_file(
            theirs)["prompt_embeddings"].tobytes()


def test_prefixes_in_a_net_without_a_place_for_them():
    net = base_model(SHARED, "llama_tiny", Llama)
    before = {path: item.asnumpy().tobytes() for path, item in net.parameters_and_names()}
    with pytest.raises(ValueError, match="2 layers without names, but the net has 0 for them. PEFT's prefixes"):
        mp.load_adapter(net, ROOT / "prefix_tuning")
    assert {path: item.asnumpy().tobytes() for path, item in net.parameters_and_names()} == before
