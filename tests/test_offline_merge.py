"""Merging file to file: PEFT's numbers, ours, every other byte as it was, and what is refused."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from offline_bases import HALF_STEP, TYPES, A, B, linear, lora, reference, weights, write_adapter, write_shards
from peft_models import base_model

import mindpet_lite as mp
from mindpet_lite.formats import checkpoint_file, peft
from mindpet_lite.formats.files import as_float, read_tensors, to_bytes
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.offline import rewrite
from mindpet_lite.offline.merge import merge
from mindpet_lite.offline.numbers import Scratch, rounded, widen

PEFT = [f"llama_tiny/lora_{name}" for name in (
    "plain", "all_linear", "all_linear_exclude", "bias_all", "bias_lora_only", "dora", "embedding", "embedding_dora",
    "init_eva", "init_gaussian", "init_olora", "init_orthogonal", "init_pissa", "layers_to_transform",
    "modules_to_save", "rank_alpha_pattern", "regex", "rslora", "trainable_token_indices")] + [
    f"conv_tiny/lora_{name}" for name in ("plain", "dora", "rslora", "bias_lora_only")]


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", PEFT)
def test_equals_pefts_merged_weights(name, shared):
    folder = shared / "fixtures" / "peft" / name
    base = folder.parent / "base"
    done = merge(base, folder, Path("out"), quiet=True)
    before, after = read_tensors(base / "model.safetensors"), read_tensors(Path("out/model.safetensors"))
    io = np.load(folder / "io.npz")
    wanted = {key.removeprefix("merged_weight."): io[key] for key in io if key.startswith("merged_weight.")}
    assert wanted.keys() <= set(done.changed)
    for key, value in wanted.items():
        assert relative(after[key], value) < 1e-5, key
    for key, value in before.items():
        assert key in done.changed or after[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("file", ["peft", "diffusers", "diffusers_adapter", "diffusers_lora_down",
                                  "kohya/lora.safetensors"])
def test_merges_every_spelling_of_the_unets_adapter(file, shared):
    folder = shared / "fixtures" / "peft" / "unet_tiny"
    done = merge(folder / "base", folder / file, Path("out"), quiet=True)
    after = read_tensors(Path("out/diffusion_pytorch_model.safetensors"))
    wanted = read_tensors(folder / "merged_weights.safetensors")
    assert len(done.changed) == 32 and all(relative(after[key], value) < 1e-5 for key, value in wanted.items())


@pytest.mark.parametrize("name", [f"llama_tiny/lora_{name}" for name in (
    "plain", "rslora", "dora", "embedding_dora", "init_pissa", "init_olora", "modules_to_save",
    "trainable_token_indices")] + ["conv_tiny/lora_dora", "conv_tiny/lora_bias_lora_only"])
def test_equals_the_merge_of_a_net(name, shared):
    folder = shared / "fixtures/peft" / name
    net = mp.merge(mp.load_adapter(base_model(shared, folder.parent.name), folder))
    merge(folder.parent / "base", folder, Path("out"), quiet=True)
    after = read_tensors(Path("out/model.safetensors"))
    for path, parameter in net.parameters_and_names():
        key = path.replace("embedding_table", "weight")
        assert relative(after[key], parameter.asnumpy()) < 1e-6, key


def test_starts_that_the_base_does_not_tell_need_the_residual_base(shared):
    folder = shared / "fixtures/peft/llama_tiny/lora_init_lora_ga"
    with pytest.raises(ValueError, match="lora_ga.*residual base"):
        merge(folder.parent / "base", folder, Path("out"), quiet=True)
    tensors = {**read_tensors(folder.parent / "base/model.safetensors"),
               **read_tensors(folder / "residual_base.safetensors")}
    Path("base.safetensors").write_bytes(to_bytes(tensors))
    Path("adapter").mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))
    Path("adapter/adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    merge(Path("base.safetensors"), Path("adapter"), Path("out"), quiet=True)
    io, after = np.load(folder / "io.npz"), read_tensors(Path("out/base.safetensors"))
    keys = [key for key in io if key.startswith("merged_weight.")]
    assert keys and all(relative(after[key.removeprefix("merged_weight.")], io[key]) < 1e-5 for key in keys)


def test_convolutions_of_one_dimension_as_mindspore_has_them():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 4, 1, 3), np.float32)
    Path("base.safetensors").write_bytes(to_bytes({"conv.weight": weight}))
    a, b = rng.standard_normal((2, 4, 3), np.float32), rng.standard_normal((6, 2, 1), np.float32)
    state = AdapterState("lora", {"conv": LayerState({A: a, B: b}, {"lora_rank": 2, "lora_alpha": 2,
                                                                    "lora_dropout": 0.0})})
    merge(Path("base.safetensors"), write_adapter(Path("adapter"), state), Path("out"), quiet=True)
    wanted = weight + (b[:, :, 0] @ a.reshape(2, -1)).reshape(weight.shape)
    assert relative(read_tensors(Path("out/base.safetensors"))["conv.weight"], wanted) < 1e-6


@pytest.mark.parametrize("dtype", TYPES)
def test_shards_keep_every_other_byte(dtype):
    tensors = weights(dtype=dtype)
    write_shards(Path("base"), tensors, 3)
    state = lora(linear(tensors))
    done = merge(Path("base"), write_adapter(Path("adapter"), state), Path("out"), quiet=True)
    assert set(done.changed) == {f"{path}.weight" for path in state.layers} and done.tensors == len(tensors)
    assert sorted(os.listdir("out")) == sorted(os.listdir("base"))
    wanted = reference(tensors, state)
    for path in Path("base").iterdir():
        copy = Path("out", path.name)
        if path.suffix != ".safetensors":
            assert copy.read_bytes() == path.read_bytes()
            continue
        assert copy.stat().st_size == path.stat().st_size
        length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert copy.read_bytes()[:length] == path.read_bytes()[:length]
        before, after = read_tensors(path), read_tensors(copy)
        for name, value in after.items():
            if name in done.changed:
                # One rounding, of a sum in float32.
                error = np.abs(as_float(value) - wanted[name])
                assert np.all(error <= HALF_STEP[dtype] * 1.01 * np.abs(wanted[name]) + 1e-6), name
            else:
                assert value.tobytes() == before[name].tobytes()


def test_blocks_of_any_size_give_the_same(monkeypatch):
    tensors = weights(layers=1)
    write_shards(Path("base"), tensors, 1)
    adapter = write_adapter(Path("adapter"), lora(linear(tensors)))
    merge(Path("base"), adapter, Path("one"), quiet=True)
    monkeypatch.setattr(rewrite, "_BLOCK", 1000)
    monkeypatch.setattr(rewrite, "_SAMPLE", 100)
    monkeypatch.setattr("mindpet_lite.offline.changes._BLOCK", 70)
    merge(Path("base"), adapter, Path("other"), quiet=True)
    one, other = (read_tensors(Path(name, "model-00001-of-00001.safetensors")) for name in ("one", "other"))
    assert all(relative(one[name], other[name]) < 1e-6 for name in tensors)


@pytest.mark.parametrize("crc", [False, True])
def test_mindspores_checkpoint(crc):
    net = ms.nn.SequentialCell(ms.nn.Embedding(20, 8), ms.nn.Dense(8, 12), ms.nn.LayerNorm((12,)))
    ms.save_checkpoint(net, "base.ckpt", append_dict={"epoch": 3, "note": "as it was"}, crc_check=crc)
    before = {name: value.asnumpy() for name, value in ms.load_checkpoint("base.ckpt").items() if name[0].isdigit()}
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 8), np.float32), rng.standard_normal((12, 2), np.float32)
    table_a, table_b = rng.standard_normal((2, 20), np.float32), rng.standard_normal((8, 2), np.float32)
    settings = {"lora_rank": 2, "lora_alpha": 3}
    state = AdapterState("lora", {
        "1": LayerState({A: a, B: b}, {**settings, "lora_dropout": 0.0}),
        "0": LayerState({"mindpet_delta_lora_embedding_a": table_a, "mindpet_delta_lora_embedding_b": table_b},
                        settings)})
    merge(Path("base.ckpt"), write_adapter(Path("adapter"), state), Path("out"), quiet=True)
    assert os.listdir("out") == ["base.ckpt"]
    after = ms.load_checkpoint("out/base.ckpt", crc_check=crc)
    wanted = {**before, "1.weight": before["1.weight"] + 1.5 * b @ a,
              "0.embedding_table": before["0.embedding_table"] + 1.5 * (table_b @ table_a).T}
    for name, value in wanted.items():
        assert relative(after[name].asnumpy(), value) < 1e-6 if name in ("1.weight", "0.embedding_table") \
            else np.array_equal(after[name].asnumpy(), value), name
    assert after["epoch"] == 3 and after["note"] == "as it was"


def test_a_checkpoint_in_parts(monkeypatch):
    monkeypatch.setattr(checkpoint_file, "_PART", 100)
    monkeypatch.setattr(rewrite, "_BLOCK", 256)
    tensors = weights(layers=1)
    Path("base.ckpt").write_bytes(b"".join(checkpoint_file.to_parts(tensors.items())))
    state = lora(linear(tensors))
    merge(Path("base.ckpt"), write_adapter(Path("adapter"), state), Path("out"), quiet=True)
    with checkpoint_file.open_checkpoint(Path("out/base.ckpt")) as file:
        for name, value in reference(tensors, state).items():
            assert relative(file.read(name), value) < 1e-6, name


def test_names_of_other_libraries_and_tables():
    tensors = {"model.layers.0.attention.wq.weight": np.ones((4, 4), np.float32),
               "model.layers.0.attention.wk.weight": np.ones((4, 4), np.float32)}
    Path("base.safetensors").write_bytes(to_bytes(tensors))
    state = lora({"model.layers.0.self_attn.q_proj": (4, 4)})
    adapter = write_adapter(Path("adapter"), state)
    assert merge(Path("base.safetensors"), adapter, Path("out"), quiet=True).changed == (
        "model.layers.0.attention.wq.weight",)
    table = {"model.layers.0.self_attn.q_proj": "model.layers.0.attention.wk"}
    assert merge(Path("base.safetensors"), adapter, Path("by_table"), table=table, quiet=True).changed == (
        "model.layers.0.attention.wk.weight",)


def test_transposed_layers_and_their_magnitudes():
    """GPT-2's layers hold their weights as (in, out)."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 6))
    for dora in (False, True):
        state = lora({"c_proj": (6, 6)}, **({"use_dora": True} if dora else {}))
        state.config["fan_in_fan_out"] = True
        layer = state.layers["c_proj"]
        update = 5 / 3 * layer.tensors[B].astype(np.float64) @ layer.tensors[A]
        wanted = weight.T + update
        if dora:
            layer.tensors["mindpet_delta_lora_magnitude"] = np.linspace(1, 2, 6, dtype=np.float32)
            wanted *= (np.linspace(1, 2, 6) / np.linalg.norm(wanted, axis=1))[:, None]
        tensors, config = peft.encode(state)
        folder = Path(f"adapter{dora}")
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(to_bytes(tensors))
        (folder / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": True}))
        Path("base.safetensors").write_bytes(to_bytes({"c_proj.weight": weight.astype(np.float32)}))
        merge(Path("base.safetensors"), folder, Path(f"out{dora}"), quiet=True)
        assert relative(read_tensors(Path(f"out{dora}/base.safetensors"))["c_proj.weight"], wanted.T) < 1e-6


def test_a_bias_of_b_goes_into_the_bias():
    tensors = weights(layers=1)
    Path("base.safetensors").write_bytes(to_bytes(tensors))
    state = lora({"model.layers.0.self_attn.q_proj": (24, 24)}, lora_bias=True)
    bias = np.arange(24, dtype=np.float32)
    state.layers["model.layers.0.self_attn.q_proj"].tensors["mindpet_delta_lora_b_bias"] = bias
    merge(Path("base.safetensors"), write_adapter(Path("adapter"), state), Path("out"), quiet=True)
    name = "model.layers.0.self_attn.q_proj.bias"
    assert relative(read_tensors(Path("out/base.safetensors"))[name], tensors[name] + 5 / 3 * bias) < 1e-6


def test_other_forms_of_the_model_are_left_behind():
    write_shards(Path("base"), weights(layers=1), 2)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "sub/model.gguf"):
        Path("base", name).parent.mkdir(exist_ok=True)
        Path("base", name).write_bytes(to_bytes({"x": np.zeros(1, np.float32)}))
    Path("base/sub/README.md").write_text("kept")
    Path("base/.git").mkdir()
    Path("base/.git/HEAD").write_text("not kept")
    done = merge(Path("base"), write_adapter(Path("adapter"), lora({"lm_head": (50, 24)})), Path("out"), quiet=True)
    assert {str(path) for path in done.left_behind} == {"pytorch_model.bin", "consolidated.safetensors",
                                                        "sub/model.gguf"}
    assert {str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file()} == {
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.model", "sub/README.md"}


REFUSED = {
    "a layer that the base lacks": (dict(shapes={"model.layers.7.self_attn.q_proj": (24, 24)}), {},
                                    r"layers\.7\.self_attn\.q_proj is no layer"),
    "another shape": (dict(shapes={"model.layers.0.mlp.up_proj": (41, 24)}), {},
                      r"up_proj: the adapter's update has the shape \(41, 24\).*weight has \(40, 24\)"),
    "tied weights": (dict(shapes={"lm_head": (50, 24)}), {"tie_word_embeddings": True}, "tie_word_embeddings"),
    "a quantised base": (dict(shapes={"lm_head": (50, 24)}), {"quantization_config": {"bits": 4}}, "quantised"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case):
    adapter, config, message = REFUSED[case]
    write_shards(Path("base"), weights(), 2)
    Path("base/config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))
    write_adapter(Path("adapter"), lora(**adapter))
    with pytest.raises(ValueError, match=message):
        merge(Path("base"), Path("adapter"), Path("out"), quiet=True)
    assert sorted(os.listdir(".")) == ["adapter", "base"]


def test_tied_by_default_where_the_head_is_not_in_the_file():
    tensors = weights(layers=1)
    del tensors["lm_head.weight"]
    write_shards(Path("base"), tensors, 1)
    Path("base/config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))
    table = LayerState({"mindpet_delta_lora_embedding_a": np.ones((2, 50), np.float32),
                        "mindpet_delta_lora_embedding_b": np.ones((24, 2), np.float32)},
                       {"lora_rank": 2, "lora_alpha": 2})
    adapter = write_adapter(Path("adapter"), AdapterState("lora", {"model.embed_tokens": table}))
    with pytest.raises(ValueError, match="one weight for its embedding and its output layer"):
        merge(Path("base"), adapter, Path("out"), quiet=True)
    Path("base/config.json").write_text(json.dumps({"architectures": ["Qwen2Model"]}))
    assert merge(Path("base"), adapter, Path("out"), quiet=True).changed == ("model.embed_tokens.weight",)


def test_quantised_weights_are_told_by_type_and_by_what_stands_beside():
    adapter = write_adapter(Path("adapter"), lora({"q_proj": (4, 4)}))
    for tensors in ({"q_proj.weight": np.ones((4, 4), np.int8), "other.weight": np.ones((4, 4), np.float32)},
                    {"q_proj.qweight": np.ones((4, 4), np.int32)},
                    {"q_proj.weight": np.ones((4, 4), np.float32), "q_proj.SCB": np.ones(4, np.float32)}):
        Path("base.safetensors").write_bytes(to_bytes(tensors))
        with pytest.raises(ValueError, match="quantised"):
            merge(Path("base.safetensors"), adapter, Path("out"), quiet=True)


def test_a_filled_place_is_refused_and_an_empty_one_taken():
    tensors = weights(layers=1)
    Path("base.safetensors").write_bytes(to_bytes(tensors))
    adapter = write_adapter(Path("adapter"), lora(linear(tensors)))
    Path("out").mkdir()
    merge(Path("base.safetensors"), adapter, Path("out"), quiet=True)
    kept = Path("out/base.safetensors").read_bytes()
    for place in ("out", "base.safetensors", "."):
        with pytest.raises(FileExistsError, match="holds something already|is a file: give a directory"):
            merge(Path("base.safetensors"), adapter, Path(place), quiet=True)
    assert Path("out/base.safetensors").read_bytes() == kept


def test_too_little_space_is_said_before(monkeypatch):
    Path("base.safetensors").write_bytes(to_bytes(weights(layers=1)))
    adapter = write_adapter(Path("adapter"), lora({"lm_head": (50, 24)}))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="GB free"):
        merge(Path("base.safetensors"), adapter, Path("out"), quiet=True)
    assert not Path("out").exists()


@pytest.mark.parametrize("dtype, value", [("float16", 60000.0), ("bfloat16", 3.3e38), ("float32", np.inf)])
def test_sums_that_are_not_finite_leave_nothing(dtype, value):
    weight = np.full((4, 4), value, np.float32)
    stored = weight if np.isinf(value) else rounded(weight, TYPES[dtype])
    Path("base.safetensors").write_bytes(to_bytes({"q.weight": stored}))
    layer = LayerState({A: np.full((1, 4), value if np.isfinite(value) else 1, np.float32),
                        B: np.ones((4, 1), np.float32)}, {"lora_rank": 1, "lora_alpha": 1, "lora_dropout": 0.0})
    adapter = write_adapter(Path("adapter"), AdapterState("lora", {"q": layer}))
    with pytest.raises(ValueError, match=r"q.weight .*NaN or infinite"):
        merge(Path("base.safetensors"), adapter, Path("out"), quiet=True)
    assert sorted(os.listdir(".")) == ["adapter", "base.safetensors"]


@pytest.mark.parametrize("place, message", [("disk", "what was read back from the disk is not what was written"),
                                            ("memory", "does not hold what was written")])
def test_what_is_read_back_is_compared(monkeypatch, place, message):
    Path("base.safetensors").write_bytes(to_bytes(weights(layers=1)))
    adapter = write_adapter(Path("adapter"), lora({"lm_head": (50, 24)}))
    whole = rewrite._write

    def damaging(file, pieces, data):
        if len(data) == 50 * 24 * 4:
            data = np.bitwise_xor(data, 1, out=data if place == "memory" else None)
        whole(file, pieces, data)

    monkeypatch.setattr(rewrite, "_write", damaging)
    with pytest.raises(ValueError, match=message):
        merge(Path("base.safetensors"), adapter, Path("out"), quiet=True)
    assert not Path("out").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_are_rounded_once_to_nearest_and_ties_to_even(dtype):
    kind = TYPES[dtype]
    every = np.arange(1 << 16, dtype=np.uint16).view(kind)
    some = every[np.isfinite(as_float(every))].reshape(2, -1)
    numbers = np.unique(as_float(some).astype(np.float64))
    finite = numbers.astype(np.float32).astype(kind) if kind == np.float16 else rounded(numbers, kind)
    assert np.array_equal(as_float(finite), numbers)
    # What lies between neighbours: the middle, and what float32 has below and above it.
    middle = (numbers[1:] + (numbers[:-1] - numbers[1:]) / 2).astype(np.float32)
    exact = middle == numbers[1:] + (numbers[:-1] - numbers[1:]) / 2
    below, above = finite[:-1][exact], finite[1:][exact]
    even = np.where(below.view("<u2") % 2 == 0, below.view("<u2"), above.view("<u2"))
    assert np.array_equal(as_float(rounded(middle[exact], kind)), as_float(even.view(kind)))
    for side, wanted in ((-np.inf, below), (np.inf, above)):
        found = rounded(np.nextafter(middle[exact], np.float32(side)), kind)
        assert np.array_equal(as_float(found), as_float(wanted))
    assert exact.sum() > 60000 and np.signbit(as_float(rounded(np.float32([-0.0]), kind)))[0]
    found = widen(every.reshape(256, 256), Scratch()).reshape(-1)
    assert np.array_equal(found, as_float(every), equal_nan=True)
    assert np.array_equal(widen(some, Scratch()).view(np.uint32), as_float(some).astype(np.float32).view(np.uint32))


def test_memory_does_not_grow_with_the_base():
    rng = np.random.default_rng(0)
    tensors = {f"layer{number}.weight": rng.standard_normal((1024, 2048), np.float32) for number in range(12)}
    Path("base.safetensors").write_bytes(to_bytes(tensors))
    state = lora({name.removesuffix(".weight"): value.shape for name, value in tensors.items()})
    adapter = write_adapter(Path("adapter"), state)
    tensors.clear()
    tracemalloc.start()
    merge(Path("base.safetensors"), adapter, Path("out"), quiet=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60e6, f"{peak / 1e6:.0f} MB for a base of 100 MB"


KILLED = """
import os, signal, sys
from pathlib import Path
from mindpet_lite.offline import rewrite
from mindpet_lite.offline.merge import merge
left = int(sys.argv[1])
write = rewrite._write
def dying(*args):
    global left
    write(*args)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
rewrite._write = dying
merge(Path("base"), Path("adapter"), Path("out"), quiet=True)
"""


def test_a_killed_merge_leaves_nothing_that_looks_merged():
    tensors = weights()
    write_shards(Path("base"), tensors, 2)
    write_adapter(Path("adapter"), lora(linear(tensors)))
    root = Path(rewrite.__file__).parents[2]
    for blocks in (1, 9):
        done = subprocess.run([sys.executable, "-c", KILLED, str(blocks)], env={**os.environ, "PYTHONPATH": str(root)},
                              timeout=120)
        assert done.returncode == -signal.SIGKILL and not Path("out").exists()
    merge(Path("base"), Path("adapter"), Path("out"), quiet=True)
    assert sorted(name for name in os.listdir(".") if "out" in name) == ["out"]


def test_a_layer_that_the_base_lacks_is_asked_for():
    Path("base.safetensors").write_bytes(to_bytes({"teacher.q.weight": np.zeros((4, 6), np.float32)}))
    adapter = write_adapter(Path("adapter"), lora({"student.q": (4, 6)}))
    with pytest.raises(ValueError, match="student.q: the base has no such layer. Say with a name map"):
        merge(Path("base.safetensors"), adapter, Path("out"), quiet=True)


def test_whole_numbers_are_not_merged_into_fractions():
    tensors = {"q.weight": np.zeros((4, 6), np.float32), "head.weight": np.zeros((3, 4), np.float32)}
    Path("base.safetensors").write_bytes(to_bytes(tensors))
    adapter = write_adapter(Path("adapter"), lora({"q": (4, 6)}))
    stored = read_tensors(adapter / "adapter_model.safetensors")
    stored["base_model.model.head.weight"] = np.ones((3, 4), np.int64)
    (adapter / "adapter_model.safetensors").write_bytes(to_bytes(stored))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["head"]}))
    with pytest.raises(ValueError, match="the trained values are of type int64"):
        merge(Path("base.safetensors"), adapter, Path("out"), quiet=True)
