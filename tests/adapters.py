"""Adapters to test file formats with: random ones, comparison bit for bit, files through bytes."""
from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from mindpet_lite.formats.files import BF16, open_tensors, to_bytes
from mindpet_lite.formats.state import AdapterState, LayerState

A, B = "mindpet_delta_lora_a", "mindpet_delta_lora_b"
EMBEDDING_A, EMBEDDING_B = "mindpet_delta_lora_embedding_a", "mindpet_delta_lora_embedding_b"
MAGNITUDE, B_BIAS = "mindpet_delta_lora_magnitude", "mindpet_delta_lora_b_bias"
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64), BF16]


def tensor(shape: tuple[int, ...], dtype=np.float32, seed: int = 0) -> np.ndarray:
    """Return an array of random bits; of random numbers where `dtype` is float32."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    if dtype == np.float32:
        return 0.1 * rng.standard_normal(shape).astype(np.float32)
    data = rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return np.frombuffer(data.tobytes(), dtype).reshape(shape)


def dense(rank: int = 2, alpha: float = 4, sizes: tuple[int, int] = (3, 5), dtype=np.float32, seed: int = 0,
          **settings) -> LayerState:
    into, out = sizes
    tensors = {A: tensor((rank, into), dtype, seed), B: tensor((out, rank), dtype, seed + 1)}
    if settings.get("use_dora"):
        tensors[MAGNITUDE] = np.abs(tensor((out,), dtype, seed + 2))
    return LayerState(tensors, {"lora_rank": rank, "lora_alpha": alpha, "lora_dropout": 0.0, **settings})


def conv(rank: int = 2, alpha: float = 4, sizes: tuple[int, int] = (3, 5), kernel: int = 3, dtype=np.float32,
         seed: int = 0, **settings) -> LayerState:
    into, out = sizes
    tensors = {A: tensor((rank, into, kernel, kernel), dtype, seed), B: tensor((out, rank, 1, 1), dtype, seed + 1)}
    if settings.get("use_dora"):
        tensors[MAGNITUDE] = np.abs(tensor((1, out, 1, 1), dtype, seed + 2))
    return LayerState(tensors, {"lora_rank": rank, "lora_alpha": alpha, "lora_dropout": 0.0, **settings})


def embedding(rank: int = 2, alpha: float = 4, vocab: int = 7, width: int = 3) -> LayerState:
    return LayerState({EMBEDDING_A: tensor((rank, vocab)), EMBEDDING_B: tensor((width, rank), seed=1)},
                      {"lora_rank": rank, "lora_alpha": alpha})


def lora(layers: dict[str, LayerState], **fields) -> AdapterState:
    return AdapterState("lora", layers, **fields)


PARTS = st.one_of(st.sampled_from(["to_q", "to_out", "0", "1", "unet", "text_encoder", "blocks", "a_b", "lora"]),
                  st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True))
PATHS = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
ALPHAS = st.one_of(st.integers(1, 64), st.floats(1e-3, 1e3), st.sampled_from([0.1, 1 / 3, 16777217]))


@st.composite
def random_layers(draw, kinds=(dense, conv), dora: bool = False, rslora: bool = False, same: bool = False):
    """Draw a LoRA adapter's layers by path; `same` rank, alpha and dropout everywhere if asked for."""
    ranks, alphas, dropouts = st.integers(1, 4), ALPHAS, st.sampled_from([0.0, 0.1, 0.25])
    if same:
        ranks, alphas, dropouts = (st.just(draw(item)) for item in (ranks, alphas, dropouts))
    layers = {}
    for path in draw(st.lists(PATHS, min_size=1, max_size=5, unique_by=lambda path: path.replace(".", "_"))):
        flags = {name: True for name, allowed in (("use_dora", dora), ("use_rslora", rslora))
                 if allowed and draw(st.booleans())}
        layer = draw(st.sampled_from(kinds))(
            draw(ranks), draw(alphas), (draw(st.integers(1, 5)), draw(st.integers(1, 5))),
            dtype=draw(st.sampled_from(DTYPES[:1] if flags.get("use_dora") else DTYPES)), seed=draw(st.integers(0, 99)),
            **flags)
        layer.settings["lora_dropout"] = draw(dropouts)
        layers[path] = layer
    return layers


def through_file(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None):
    """Write a safetensors file and read it again; return tensors and metadata."""
    path = Path("through.safetensors")
    path.write_bytes(to_bytes(tensors, metadata))
    return read(path)


def read(path: Path):
    """Return the tensors and the metadata of a safetensors file."""
    with open_tensors(path) as file:
        return {name: file.read(name) for name in file.keys()}, file.metadata


def assert_same(first: AdapterState, second: AdapterState, settings: bool = True, config: bool = True) -> None:
    """Compare two adapters bit for bit; with or without the settings of layers and the fields of the config."""
    assert first.method == second.method
    assert first.layers.keys() == second.layers.keys()
    for path, layer in first.layers.items():
        same_tensors(layer.tensors, second.layers[path].tensors, path)
        assert not settings or layer.settings == second.layers[path].settings, path
    same_tensors(first.trained, second.trained, "trained")
    assert not config or first.config == second.config


def same_tensors(first: dict[str, np.ndarray], second: dict[str, np.ndarray], where: str) -> None:
    assert first.keys() == second.keys(), where
    for name, value in first.items():
        other = second[name]
        assert (value.dtype, value.shape, value.tobytes()) == (other.dtype, other.shape, other.tobytes()), (where, name)
