"""`mindpet-lite quantize`: files in 8 and 4 bits that nets of quantize_base load, and GGUF's blocks as they are."""
from __future__ import annotations

import json
import struct
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from nets import inputs
from offline_bases import weights, write_shards

import mindpet_lite as mp
from mindpet_lite.cli import main
from mindpet_lite.formats.files import read_tensors, to_bytes
from mindpet_lite.formats.gguf import open_gguf
from mindpet_lite.formats.quantised import KINDS, dequantise, parts_of, quantise
from mindpet_lite.offline.quantise import quantise_files

pytest.importorskip("click")
RNG = np.random.default_rng(2)


class Net(nn.Cell):
    """Two linear layers and a norm, with Hugging Face's names."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Dense(64, 96), nn.Dense(96, 32, has_bias=False)

    def construct(self, x):
        return self.down(self.up(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_net_loads_what_was_written(kind, ending, pynative_mode, capfd):
    net, x = Net(), inputs(2, 64)
    ms.save_checkpoint(net, f"base.{ending}", format=ending)
    assert main(["quantize", "--base", f"base.{ending}", "--kind", kind, "--out", "out"]) == 0
    out, errors = capfd.readouterr()
    assert out.startswith("quantised 2 of 3 tensors into out: 0.0 MB after 0.0 MB of numbers; rounding changed ")
    assert errors == ""
    other = mp.quantize_base(Net(), kind)
    missing, unused = ms.load_param_into_net(other, ms.load_checkpoint(f"out/base.{ending}", format=ending))
    assert not missing and not unused
    assert np.array_equal(other(x).asnumpy(), mp.quantize_base(net, kind)(x).asnumpy())


def test_shards_keep_their_files_and_the_index_is_written_anew(capfd):
    tensors = weights()
    write_shards(Path("base"), tensors, 2)
    Path("base/config.json").write_text("{}")
    Path("base/model.gguf").write_bytes(b"old")
    assert main(["quantize", "--base", "base", "--kind", "int8", "--out", "out", "--targets", "q_proj,up_proj"]) == 0
    out, errors = capfd.readouterr()
    assert errors == "mindpet-lite: model.gguf was left behind: it is not quantised.\n"
    assert Path("out/config.json").read_text() == "{}"
    index = json.loads(next(Path("out").glob("*.index.json")).read_text())["weight_map"]
    found = {name: value for file in set(index.values()) for name, value in read_tensors(Path("out") / file).items()}
    assert set(found) == set(index)
    chosen = [name for name in tensors if name.endswith(("q_proj.weight", "up_proj.weight"))]
    assert chosen and f"quantised {len(chosen)} of {len(tensors)}" in out
    for name, value in tensors.items():
        if name in chosen:
            own = quantise("int8", value.astype(np.float32))
            assert all(np.array_equal(found[name.removesuffix("weight") + part], own[part]) for part in own)
        else:
            assert found[name].tobytes() == value.tobytes() and found[name].dtype == value.dtype


def test_heads_and_tables_stay_where_no_names_are_given():
    names = ["model.embed_tokens", "model.layers.0.mlp.up_proj", "lm_head", "score", "model.layers.0.output"]
    Path("base.safetensors").write_bytes(to_bytes({f"{name}.weight": RNG.standard_normal((8, 64)).astype(np.float32)
                                                   for name in names}))
    done = quantise_files(Path("base.safetensors"), "nf4", Path("out"), quiet=True)
    assert list(done.errors) == ["model.layers.0.mlp.up_proj.weight", "model.layers.0.output.weight"]


def test_memory_is_that_of_one_weight(monkeypatch):
    Path("base.safetensors").write_bytes(to_bytes({f"layer{number}.weight": np.ones((64, 64), np.float32)
                                                   for number in range(5)}))
    from mindpet_lite.offline import quantise as module
    reads = []
    monkeypatch.setattr(module, "quantise", lambda kind, weight: reads.append(len(list(Path(".").rglob(
        "base.safetensors")))) or quantise(kind, weight))
    quantise_files(Path("base.safetensors"), "int8", Path("out"), quiet=True)
    # The new file was there, being written, from the first weight on.
    assert reads == [2] * 5


@pytest.mark.parametrize("arguments, message", [
    ({"--base": "nowhere"}, "no base at nowhere"), ({"--kind": "int4"}, "'int4' is not one of"),
    ({"--out": "base"}, "holds something already"), ({"--targets": "upp"}, "'upp' hits nothing"),
    ({"--targets": "x(.*)"}, "hits no layer"), ({"--targets": "("}, "("),
    ({"--targets": "norm"}, "norm.weight of shape (64,) is no matrix"),
    ({"--targets": "whole"}, "whole.weight is of type I8"), ({"--targets": "nan"}, "nan.weight holds NaN"),
    ({"--targets": "odd", "--kind": "q8_0"}, "odd.weight: q8_0 has a scale for each 32 inputs"),
    ({"--base": "bad.gguf"}, "bad.gguf is no GGUF file"), ({"--base": "cut.gguf"}, "not a whole GGUF file"),
    ({"--base": "q6.gguf"}, "a.weight is of type Q6_K, which is not read")])
def test_errors_are_one_sentence_and_leave_nothing(arguments, message, capfd):
    Path("base").mkdir()
    tensors = {"up.weight": np.ones((4, 64), np.float32), "norm.weight": np.ones(64, np.float32),
               "whole.weight": np.ones((4, 64), np.int8), "nan.weight": np.full((4, 64), np.nan, np.float32),
               "odd.weight": np.ones((4, 50), np.float32)}
    Path("base/model.safetensors").write_bytes(to_bytes(tensors))
    Path("bad.gguf").write_bytes(b"no")
    whole = gguf_file({"a.weight": ("Q8_0", (4, 64))})
    Path("cut.gguf").write_bytes(whole[:-40])
    Path("q6.gguf").write_bytes(gguf_file({"a.weight": ("Q6_K", (4, 64))}))
    call = {"--base": "base", "--kind": "nf4", "--out": "out", **arguments}
    before = sorted(Path(".").rglob("*"))
    assert main(["quantize", *(part for pair in call.items() for part in pair)]) == 2
    out, errors = capfd.readouterr()
    assert out == "" and message in errors and errors.count("\n") == 1 and errors.startswith("mindpet-lite: ")
    assert sorted(Path(".").rglob("*")) == before


def test_what_is_quantised_is_not_quantised_again(capfd):
    Path("base.safetensors").write_bytes(to_bytes({"up.weight": np.ones((4, 64), np.float32)}))
    quantise_files(Path("base.safetensors"), "int8", Path("out"), quiet=True)
    assert main(["quantize", "--base", "out", "--kind", "nf4", "--out", "again"]) == 2
    assert "up.weight is of type I8: only floats are quantised" in capfd.readouterr().err


NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q6_K": 14}


def gguf_file(tensors: dict[str, tuple[str, tuple[int, ...]]], values: dict | None = None) -> bytes:
    """Return a GGUF file as its specification has it, of random blocks; their numbers in float64 go into `values`."""
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 3)
    head += text("general.architecture") + struct.pack("<I", 8) + text("llama")
    head += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    head += text("tokenizer.ggml.scores") + struct.pack("<IIQff", 9, 6, 2, 0.5, 0.25)
    data = b""
    for name, (kind, shape) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], NUMBERS[kind], len(data))
        numbers, blocks = [], int(np.prod(shape)) // 32
        for _ in range(blocks):
            d, m = (np.float16(item) for item in (RNG.uniform(0.001, 0.1), RNG.uniform(-1, 1)))
            if kind == "Q8_0":
                q = RNG.integers(-127, 128, 32)
                data += struct.pack("<e32b", d, *q)
                numbers += [float(d) * item for item in q]
            elif kind in ("Q4_0", "Q4_1"):
                q = RNG.integers(0, 16, 32)
                data += struct.pack("<e", d) + (struct.pack("<e", m) if kind == "Q4_1" else b"")
                data += bytes(int(low) | int(high) << 4 for low, high in zip(q[:16], q[16:]))
                numbers += [float(d) * item + float(m) if kind == "Q4_1" else float(d) * (item - 8) for item in q]
            elif kind in ("F32", "F16"):
                own = RNG.standard_normal(32).astype({"F32": "<f4", "F16": "<f2"}[kind])
                data += own.tobytes()
                numbers += own.astype(float).tolist()
        data += b"\0" * (-len(data) % 32)
        if values is not None:
            values[name] = np.array(numbers).reshape(shape)
    return head + b"\0" * (-len(head) % 32) + data


GGUF = {"blk.0.attn_q.weight": ("Q8_0", (8, 64)), "blk.0.attn_k.weight": ("Q4_0", (4, 96)),
        "blk.0.attn_norm.weight": ("F32", (64,)), "token_embd.weight": ("Q8_0", (5, 32)),
        "blk.0.ffn_up.weight": ("F16", (4, 64))}


def test_blocks_of_gguf_are_taken_as_they_are(capfd):
    values: dict = {}
    Path("model.gguf").write_bytes(gguf_file(GGUF, values))
    with open_gguf(Path("model.gguf")) as file:
        for name, value in values.items():
            assert file.kind(name) == GGUF[name][0]
            assert np.array_equal(file.read(name).astype(float), value), name
    assert main(["quantize", "--base", "model.gguf", "--kind", "q8_0", "--out", "out", "--targets",
                 "attn_q,attn_k"]) == 0
    out, errors = capfd.readouterr()
    assert out.endswith("of numbers; nothing was lost\n") and "quantised 2 of 5" in out and errors == ""
    found = read_tensors(Path("out/model.safetensors"))
    for name, value in values.items():
        if "attn_norm" in name or "embd" in name or "ffn" in name:
            assert np.array_equal(found[name].astype(float), value)
            continue
        layer = name.removesuffix("weight")
        own = {part: found[layer + part] for part in parts_of("q8_0", value.shape)}
        assert np.array_equal(dequantise("q8_0", own, value.shape).astype(float), value), "exactly"


@pytest.mark.parametrize("kind, name, why", [
    ("q8_0", "Q4_1", "has a minimum for each block, for which no kind has a place"),
    ("nf4", "Q8_0", "is kept without loss by --kind q8_0 alone, not by nf4")])
def test_where_something_is_lost_the_command_says_so(kind, name, why, capfd):
    values: dict = {}
    Path("model.gguf").write_bytes(gguf_file({"blk.0.attn_q.weight": (name, (8, 64))}, values))
    assert main(["quantize", "--base", "model.gguf", "--kind", kind, "--out", "out"]) == 0
    out, errors = capfd.readouterr()
    assert errors == f"mindpet-lite: 1 tensors are {name}, which {why}: they were rounded once more.\n"
    assert "rounding changed" in out
    found, (value,) = read_tensors(Path("out/model.safetensors")), values.values()
    own = {part: found["blk.0.attn_q." + part] for part in parts_of(kind, value.shape)}
    error = np.linalg.norm(dequantise(kind, own, value.shape) - value) / np.linalg.norm(value)
    np.testing.assert_allclose(own["weight_error"], error, rtol=1e-4)
    assert 0 < error < {"q8_0": 0.01, "nf4": 0.2}[kind]


def test_a_net_quantised_so_loads_what_gguf_gave(pynative_mode):
    values: dict = {}
    Path("model.gguf").write_bytes(gguf_file({"up.weight": ("Q8_0", (96, 64)), "down.weight": ("Q4_0", (32, 96)),
                                              "up.bias": ("F32", (96,))}, values))
    quantise_files(Path("model.gguf"), "q8_0", Path("out"), quiet=True)
    net, x = mp.quantize_base(Net(), "q8_0"), inputs(2, 64)
    missing, _ = ms.load_param_into_net(net, ms.load_checkpoint("out/model.safetensors", format="safetensors"))
    assert not missing
    wanted = (x.asnumpy() @ values["up.weight"].T + values["up.bias"]) @ values["down.weight"].T
    np.testing.assert_allclose(net(x).asnumpy(), wanted, rtol=1e-4, atol=1e-3)


def test_gguf_s_own_library_writes_what_is_read():
    gguf = pytest.importorskip("gguf")
    writer, value = gguf.GGUFWriter("model.gguf", "llama"), RNG.standard_normal((4, 64)).astype(np.float32)
    for name in ("Q8_0", "Q4_0", "Q4_1"):
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    for action in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file,
                   writer.close):
        action()
    with open_gguf(Path("model.gguf")) as file:
        for name in ("Q8_0", "Q4_0", "Q4_1"):
            kind = gguf.GGMLQuantizationType[name]
            wanted = gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
            np.testing.assert_array_equal(file.read(name), wanted)


def test_the_disk_is_told_of_when_it_is_full(monkeypatch, capfd):
    Path("base.safetensors").write_bytes(to_bytes({"up.weight": np.ones((4, 64), np.float32)}))
    from mindpet_lite.offline import quantise as module

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_indexes", full)
    assert main(["quantize", "--base", "base.safetensors", "--kind", "int8", "--out", "out"]) == 2
    assert "No space left on device" in capfd.readouterr().err and not Path("out").exists()
    assert not list(Path(".").glob(".out*"))
