"""What a net with one of the PEFT fixtures' LoRA adapters must compute, and what it must save."""
from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from peft_models import close, inputs_of
from safetensors.numpy import load_file

import mindpet_lite as mp
from mindpet_lite.graph.live import deltas

KEYS = {"mindpet_delta_lora_a": "lora_A.weight", "mindpet_delta_lora_b": "lora_B.weight",
        "mindpet_delta_lora_embedding_a": "lora_embedding_A", "mindpet_delta_lora_embedding_b": "lora_embedding_B"}


def computes_what_peft_did(net: nn.Cell, shared: Path, family: str, name: str) -> None:
    """Load the fixture's adapter into its base `net`; compare output, gradients, merged output and merged weights."""
    folder = shared / "fixtures" / "peft" / family
    io, target = np.load(folder / name / "io.npz"), np.load(folder / "base" / "io.npz")[f"target.{net.output}"]
    x = inputs_of(io)
    mp.load_adapter(net, folder / name)
    close(net(x).asnumpy(), io[f"output.{net.output}"], 1e-5, "output")

    parameters = {f"grad.base_model.model.{path}.{KEYS[own]}": parameter for path, delta in deltas(net).items()
                  for own, parameter in delta.delta_parameters().items()}
    assert set(parameters) == {key for key in io if key.startswith("grad.")}
    wanted = Tensor(target)

    def loss(value):
        return ((net(value) - wanted) ** 2).mean()

    found, gradients = ms.value_and_grad(loss, None, list(parameters.values()))(x)
    close(found.asnumpy(), io["loss"], 1e-5, "loss")
    for key, gradient in zip(parameters, gradients):
        close(gradient.asnumpy(), io[key], 1e-4, key)

    if f"merged.{net.output}" in io:
        mp.merge(net)
        close(net(x).asnumpy(), io[f"merged.{net.output}"], 1e-5, "merged output")
        for path, parameter in net.parameters_and_names():
            key = f"merged_weight.{path.replace('embedding_table', 'weight')}"
            if key in io:
                close(parameter.asnumpy(), io[key], 1e-6, key)


def saves_what_peft_did(net: nn.Cell, shared: Path, family: str, name: str, directory: Path) -> None:
    """Load and save the fixture's adapter: the same tensors bit for bit, but for the table that PEFT writes along."""
    folder = shared / "fixtures" / "peft" / family / name
    mp.save_adapter(mp.load_adapter(net, folder), directory)
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (directory, folder))
    theirs = {key: value for key, value in theirs.items() if not key.endswith(".base_layer.weight")}
    assert set(ours) == set(theirs)
    assert all(ours[key].shape == theirs[key].shape and ours[key].tobytes() == theirs[key].tobytes() for key in ours)
