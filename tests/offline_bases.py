"""Bases and adapters made up for the tests of what is done file to file."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from files import save

from mindpet_lite.formats.files import BF16, as_float, to_bytes
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.offline.numbers import rounded

A, B = "mindpet_delta_lora_a", "mindpet_delta_lora_b"
TYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": BF16, "float64": np.dtype("<f8")}
# Half the distance between neighbours, of 1.
HALF_STEP = {"float32": 2.0 ** -24, "float16": 2.0 ** -11, "bfloat16": 2.0 ** -8, "float64": 2.0 ** -24}


def weights(layers: int = 2, width: int = 24, inner: int = 40, vocabulary: int = 50, dtype: str = "float32",
            seed: int = 0) -> dict[str, np.ndarray]:
    """Return a base like a Llama's, with biases and an embedding."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for number in range(layers):
        block = f"model.layers.{number}."
        shapes.update({f"{block}self_attn.q_proj.weight": (width, width), f"{block}self_attn.q_proj.bias": (width,),
                       f"{block}mlp.up_proj.weight": (inner, width), f"{block}mlp.down_proj.weight": (width, inner),
                       f"{block}norm.weight": (width,)})
    shapes["lm_head.weight"] = (vocabulary, width)
    return {name: rounded(rng.standard_normal(shape, np.float32), TYPES[dtype]) for name, shape in shapes.items()}


def write_shards(folder: Path, tensors: dict[str, np.ndarray], count: int) -> None:
    """Write a sharded base as Hugging Face does, with what else such a directory holds."""
    folder.mkdir(parents=True)
    index = {}
    names = list(tensors)
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        own = names[number::count]
        (folder / file).write_bytes(to_bytes({name: tensors[name] for name in own}, {"format": "pt", "part": file}))
        index.update(dict.fromkeys(own, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1},
                                                                     "weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"],
                                                    "tie_word_embeddings": False}))
    (folder / "tokenizer.model").write_bytes(b"\x00tokens")


def lora(shapes: dict[str, tuple[int, int]], rank: int = 3, alpha: float = 5, seed: int = 1,
         dtype: np.dtype | type = np.float32, **settings) -> AdapterState:
    """Return a LoRA adapter for layers of these (out, in)."""
    rng = np.random.default_rng(seed)
    return AdapterState("lora", {path: LayerState(
        {A: rounded(rng.standard_normal((rank, inner), np.float32), np.dtype(dtype)),
         B: rounded(rng.standard_normal((out, rank), np.float32) / 10, np.dtype(dtype))},
        {"lora_rank": rank, "lora_alpha": alpha, "lora_dropout": 0.0, **settings})
        for path, (out, inner) in shapes.items()})


def linear(tensors: dict[str, np.ndarray]) -> dict[str, tuple[int, int]]:
    """Return (out, in) of each linear layer of `weights` by path."""
    return {name.removesuffix(".weight"): value.shape for name, value in tensors.items() if "_proj.weight" in name}


def reference(tensors: dict[str, np.ndarray], state: AdapterState) -> dict[str, np.ndarray]:
    """Return the merged base in float64."""
    found = {name: as_float(value).astype(np.float64) for name, value in tensors.items()}
    for path, layer in state.layers.items():
        scale = layer.settings["lora_alpha"] / layer.settings["lora_rank"]
        a, b = (as_float(layer.tensors[name]).astype(np.float64) for name in (A, B))
        found[f"{path}.weight"] = found[f"{path}.weight"] + scale * b @ a
    return found


def write_adapter(folder: Path, state: AdapterState) -> Path:
    save(state, folder)
    return folder
