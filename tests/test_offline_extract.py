"""The adapter between two models: exact where the difference has the rank, the least error where it has not."""
from __future__ import annotations

import json
import re
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from offline_bases import TYPES, linear, lora, weights, write_adapter, write_shards

import mindpet_lite as mp
from mindpet_lite.cli import main
from mindpet_lite.formats.adapters import read_adapter
from mindpet_lite.formats.files import as_float, read_tensors, to_bytes
from mindpet_lite.offline import extract as extraction
from mindpet_lite.offline.extract import extract
from mindpet_lite.offline.merge import merge
from mindpet_lite.offline.numbers import rounded

pytest.importorskip("click")


def write(name: str, tensors: dict[str, np.ndarray]) -> Path:
    Path(name).write_bytes(to_bytes(tensors))
    return Path(name)


@pytest.mark.parametrize("count", [1, 3])
def test_what_was_merged_comes_out_again(count):
    tensors = weights()
    write_shards(Path("base"), tensors, count)
    state = lora(linear(tensors), rank=3)
    merge(Path("base"), write_adapter(Path("adapter"), state), Path("tuned"), quiet=True)
    found = extract(Path("base"), Path("tuned"), 3, Path("out"), quiet=True)
    assert found.errors.keys() == state.layers.keys() and max(found.errors.values()) < 1e-6 and found.error < 1e-6
    assert found.trained == found.left_out == ()
    adapter = read_adapter(Path("out"))
    assert adapter.kind == "peft"
    assert all(layer.settings == {"lora_rank": 3, "lora_alpha": 3, "lora_dropout": 0.0}
               for layer in adapter.state.layers.values())
    merge(Path("base"), Path("out"), Path("again"), strict_base=True, quiet=True)
    for path in Path("tuned").glob("*.safetensors"):
        one, other = read_tensors(path), read_tensors(Path("again", path.name))
        assert all(np.abs(one[name] - other[name]).max() < 1e-5 for name in one)


@pytest.mark.parametrize("shape, rank", [((30, 20), 4), ((20, 30), 4), ((900, 700), 8), ((700, 900), 8)])
def test_error_is_the_least_there_is(shape, rank):
    rng = np.random.default_rng(0)
    # Singular values that fall slowly: the hard case.
    u, v = (np.linalg.qr(rng.standard_normal((size, min(shape))))[0] for size in shape)
    sizes = 1 / np.arange(1, min(shape) + 1)
    base = rng.standard_normal(shape)
    tuned = base + (u * sizes) @ v.T
    found = extract(write("a.safetensors", {"q.weight": base.astype(np.float32)}),
                    write("b.safetensors", {"q.weight": tuned.astype(np.float32)}), rank, quiet=True)
    least = np.sqrt(np.sum(sizes[rank:] ** 2) / np.sum(sizes ** 2))
    assert least - 1e-6 < found.error < least * (1.0001 if min(shape) < 512 else 1.02)
    layer = found.state.layers["q"]
    left = np.linalg.norm(tuned - base - layer.tensors["mindpet_delta_lora_b"].astype(np.float64)
                          @ layer.tensors["mindpet_delta_lora_a"])
    assert found.errors["q"] == pytest.approx(left / np.linalg.norm(sizes), rel=1e-3)


def test_the_seed_decides():
    rng = np.random.default_rng(0)
    one = write("a.safetensors", {"q.weight": rng.standard_normal((600, 600), np.float32)})
    other = write("b.safetensors", {"q.weight": rng.standard_normal((600, 600), np.float32)})
    first, second, third = (extract(one, other, 2, seed=seed, quiet=True).state.layers["q"].tensors
                            for seed in (5, 5, 6))
    for name in first:
        assert np.array_equal(first[name], second[name]) and not np.array_equal(first[name], third[name])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_types(dtype):
    tensors = weights(dtype=dtype)
    name = "model.layers.0.self_attn.q_proj.weight"
    tuned = {**tensors, name: rounded(as_float(tensors[name]).astype(np.float32) * np.float32(1.5), TYPES[dtype])}
    found = extract(write("a.safetensors", tensors), write("b.safetensors", tuned), 24, quiet=True)
    assert list(found.errors) == [name.removesuffix(".weight")] and found.error < 1e-6
    # The same numbers in another type are no change.
    wide = {name: as_float(value).astype(np.float64) for name, value in tensors.items()}
    with pytest.raises(ValueError, match="no layer whose weight differs"):
        extract(write("a.safetensors", tensors), write("c.safetensors", wide), 4, quiet=True)


def test_biases_norms_embeddings_and_what_has_no_place():
    tensors = {**weights(layers=1), "model.mask": np.zeros((4, 4), np.int32), "logit": np.zeros(3, np.float32)}
    rng = np.random.default_rng(3)
    changed = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight",
               "model.layers.0.self_attn.q_proj.bias", "model.layers.0.norm.weight", "model.mask", "logit"]
    tuned = {name: value + rng.integers(1, 4, value.shape).astype(value.dtype) if name in changed else value
             for name, value in tensors.items()}
    found = extract(write("a.safetensors", tensors), write("b.safetensors", tuned), 24, Path("out"), quiet=True)
    assert set(found.errors) == {"model.embed_tokens", "model.layers.0.self_attn.q_proj"}
    assert set(found.trained) == {"model.layers.0.self_attn.q_proj.bias", "model.layers.0.norm.weight"}
    assert set(found.left_out) == {"model.mask", "logit"}
    assert set(found.state.layers["model.embed_tokens"].tensors) == {"mindpet_delta_lora_embedding_a",
                                                                     "mindpet_delta_lora_embedding_b"}
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.layers.0.norm"] and config["bias"] == "lora_only"
    merge(Path("a.safetensors"), Path("out"), Path("again"), quiet=True)
    again = read_tensors(Path("again/a.safetensors"))
    for name in tensors:
        wanted = tensors[name] if name in found.left_out else tuned[name]
        assert np.abs(again[name] - wanted).max() < 1e-4, name


def test_convolutions_and_mindspores_names():
    net = ms.nn.SequentialCell(ms.nn.Conv2d(3, 8, 3), ms.nn.Embedding(10, 8), ms.nn.LayerNorm((8,)), ms.nn.Dense(8, 4))
    ms.save_checkpoint(net, "a.ckpt")
    for parameter in net.get_parameters():
        parameter.set_data(parameter + ms.Tensor(np.random.standard_normal(parameter.shape), ms.float32))
    ms.save_checkpoint(net, "b.ckpt")
    found = extract(Path("a.ckpt"), Path("b.ckpt"), 8, Path("out"), quiet=True)
    assert set(found.errors) == {"0", "1", "3"} and found.error < 1e-6
    assert found.state.layers["0"].tensors["mindpet_delta_lora_a"].shape == (8, 3, 3, 3)
    fresh = ms.nn.SequentialCell(ms.nn.Conv2d(3, 8, 3), ms.nn.Embedding(10, 8), ms.nn.LayerNorm((8,)),
                                 ms.nn.Dense(8, 4))
    ms.load_param_into_net(fresh, ms.load_checkpoint("a.ckpt"))
    mp.merge(mp.load_adapter(fresh, "out"))
    for one, other in zip(fresh.get_parameters(), net.get_parameters()):
        assert np.abs(one.asnumpy() - other.asnumpy()).max() < 1e-4, one.name


def test_gpt2_holds_its_weights_transposed():
    rng = np.random.default_rng(0)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        write(f"{folder}/model.safetensors", {"h.0.attn.c_proj.weight": rng.standard_normal((6, 6), np.float32),
                                              "h.0.attn.c_attn.weight": rng.standard_normal((6, 18), np.float32)})
        Path(folder, "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    found = extract(Path("a"), Path("b"), 6, Path("out"), quiet=True)
    assert found.state.layers["h.0.attn.c_attn"].tensors["mindpet_delta_lora_a"].shape == (6, 6)
    assert json.loads(Path("out/adapter_config.json").read_text())["fan_in_fan_out"] is True
    merge(Path("a"), Path("out"), Path("again"), quiet=True)
    one, other = (read_tensors(Path(folder, "model.safetensors")) for folder in ("b", "again"))
    assert all(np.abs(one[name] - other[name]).max() < 1e-5 for name in one)


def test_ranks_above_what_a_layer_has():
    tensors = {"small.weight": np.zeros((3, 8), np.float32), "large.weight": np.zeros((20, 8), np.float32)}
    rng = np.random.default_rng(0)
    tuned = {name: rng.standard_normal(value.shape).astype(np.float32) for name, value in tensors.items()}
    extract(write("a.safetensors", tensors), write("b.safetensors", tuned), 6, Path("out"), quiet=True)
    state = read_adapter(Path("out")).state
    assert {path: layer.settings["lora_rank"] for path, layer in state.layers.items()} == {"small": 3, "large": 6}
    assert all(layer.settings["lora_rank"] == layer.settings["lora_alpha"] for layer in state.layers.values())


@pytest.mark.parametrize("change, message", [
    ({"more": np.zeros((2, 2), np.float32)}, "more is in b.safetensors only"),
    ({"lm_head.weight": np.zeros((51, 24), np.float32)}, r"lm_head.weight has the shape \(50, 24\) in a.safetensors"),
    ({"lm_head.weight": np.zeros((50, 24), np.int8)}, "quantised"),
    ({"lm_head.weight": np.full((50, 24), np.nan, np.float32)}, "NaN or infinite"),
    ({}, "no layer whose weight differs")])
def test_refusals(change, message, capfd):
    tensors = weights(layers=1)
    write("a.safetensors", tensors)
    write("b.safetensors", {**tensors, **change})
    assert main(["extract", "--base", "a.safetensors", "--tuned", "b.safetensors", "--rank", "2", "--out", "out"]) == 2
    errors = capfd.readouterr().err
    assert re.search(message, errors) and errors.count("\n") == 1 and not Path("out").exists()


def test_on_the_command_line(capfd):
    tensors = weights(layers=1)
    write("a.safetensors", tensors)
    write("b.safetensors", {**tensors, "lm_head.weight": tensors["lm_head.weight"] * 2,
                            "model.layers.0.norm.weight": tensors["model.layers.0.norm.weight"] * 2})
    arguments = ["extract", "--base", "a.safetensors", "--tuned", "b.safetensors", "--rank", "2"]
    assert main(arguments) == 0 and not Path("out").exists()
    output, errors = capfd.readouterr()
    assert errors == "" and [line.split()[:2] for line in output.splitlines()[:2]] == [["layer", "rank"],
                                                                                       ["lm_head", "2"]]
    assert "changed, and in the adapter as it is: model.layers.0.norm.weight" in output
    assert main([*arguments, "--out", "out"]) == 0 and len(list(Path("out").iterdir())) == 2
    assert main([*arguments, "--out", "out"]) == 2 and "holds something already" in capfd.readouterr().err
    assert main([*arguments[:-1], "0"]) == 2


def test_large_and_small_differences_do_not_overflow():
    for size in (1e30, 1e-30):
        update = np.outer(np.arange(1, 9), np.arange(1, 7)).astype(np.float32) * np.float32(size)
        found = extract(write("a.safetensors", {"q.weight": np.zeros((8, 6), np.float32)}),
                        write("b.safetensors", {"q.weight": update}), 1, quiet=True)
        assert found.error < 1e-6
    assert extraction._LARGE >= 512
