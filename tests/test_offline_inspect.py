"""What `mindpet-lite inspect` says of an adapter, and what it says of everything else."""
from __future__ import annotations

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from offline_bases import A, B, lora, weights, write_adapter

import mindpet_lite as mp
from mindpet_lite.cli import main
from mindpet_lite.delta import METHODS
from mindpet_lite.formats.adapters import to_files, write_files
from mindpet_lite.formats.files import as_float, to_bytes
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.offline.inspect import inspect

pytest.importorskip("click")
SHAPES = {"unet.mid_block.attentions.0.to_q": (12, 8), "unet.mid_block.attentions.0.to_k": (6, 8)}
TARGETS = {"peft": "adapter", "diffusers": "d.safetensors", "kohya": "k.safetensors", "mindpet": "m.ckpt",
           "mindformers": "folder"}


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
@pytest.mark.parametrize("kind", TARGETS)
def test_every_format(kind, dtype):
    state = lora(SHAPES, dtype=dtype)
    write_files(to_files(state, kind, Path(TARGETS[kind])))
    report = inspect(Path(TARGETS[kind]), methods=METHODS)
    assert (report["format"], report["method"], report["parameters"]) == (kind, "lora", 3 * (12 + 8 + 6 + 8))
    assert report["bytes"] == sum(path.stat().st_size for path in [Path(TARGETS[kind])] if path.is_file()) or \
        sum(path.stat().st_size for path in Path(TARGETS[kind]).iterdir())
    layers = {layer["path"].removeprefix("unet."): layer for layer in report["layers"]}
    for path, layer in state.layers.items():
        found = layers[path.removeprefix("unet.")]
        a, b = (as_float(layer.tensors[name]).astype(np.float64) for name in (A, B))
        assert (found["rank"], found["alpha"], found["dtypes"]) == (3, 5, ["F32" if dtype == "<f4" else "F16"])
        assert found["norm"] == pytest.approx(np.linalg.norm(5 / 3 * b @ a), rel=1e-12)
    assert report["norm"] == pytest.approx(np.sqrt(sum(layer["norm"] ** 2 for layer in layers.values())), rel=1e-12)


def test_norms_of_convolutions_groups_embeddings_and_rslora():
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    plain, table = {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0}, {"lora_rank": 4, "lora_alpha": 8}
    state = AdapterState("lora", {
        "conv": LayerState({A: random(4, 3, 3, 3), B: random(6, 4, 1, 1)}, plain),
        "grouped": LayerState({A: random(4, 8, 3, 3), B: random(6, 2, 1, 1)}, plain),
        "table": LayerState({"mindpet_delta_lora_embedding_a": random(4, 20),
                             "mindpet_delta_lora_embedding_b": random(5, 4)}, table)})
    found = {layer["path"]: layer["norm"] for layer in
             inspect(write_adapter(Path("adapter"), state))["layers"]}
    a, b = (state.layers["grouped"].tensors[name].astype(np.float64) for name in (A, B))
    halves = [2 * b[3 * part:3 * part + 3, :, 0, 0] @ a[2 * part:2 * part + 2].reshape(2, -1) for part in (0, 1)]
    a, b = (state.layers["conv"].tensors[name].astype(np.float64) for name in (A, B))
    one, other = (value.astype(np.float64) for value in state.layers["table"].tensors.values())
    assert found == pytest.approx({
        "conv": np.linalg.norm(2 * b[:, :, 0, 0] @ a.reshape(4, -1)), "grouped": np.linalg.norm(np.concatenate(halves)),
        "table": np.linalg.norm(2 * other @ one)}, rel=1e-12)
    state = lora({"q": (8, 8)}, rank=4, alpha=8, use_rslora=True)
    assert inspect(write_adapter(Path("rslora"), state))["layers"][0]["scale"] == 4


@pytest.mark.parametrize("name", ["bitfit", "low_rank_adapter", "adapter"])
def test_other_methods(name, capfd):
    net = ms.nn.SequentialCell(ms.nn.Dense(8, 8), ms.nn.Dense(8, 8))
    settings = {"bitfit": {}, "low_rank_adapter": {"reduction_factor": 2, "low_rank_size": 2},
                "adapter": {"bottleneck_size": 4}}[name]
    mp.get_pet_model(net, {"pet_type": name, **({} if name == "bitfit" else {"target_modules": ["0", "1"]}),
                           **settings})
    mp.save_adapter(net, "adapter")
    report = inspect(Path("adapter"), methods=METHODS)
    assert (report["format"], report["method"], len(report["layers"])) == ("mindpet_lite", name, 2)
    assert report["parameters"] > 0 and report["norm"] is None
    assert main(["inspect", "adapter"]) == 0 and f"of method {name}: 2 layers" in capfd.readouterr().out


def test_checkpoints_that_do_not_say_rank_and_alpha():
    tensors = {f"layer.{name}": value for name, value in lora({"layer": (4, 6)}).layers["layer"].tensors.items()}
    ms.save_checkpoint([{"name": name, "data": ms.Tensor(value)} for name, value in tensors.items()], "mindpet.ckpt")
    layer, = inspect(Path("mindpet.ckpt"))["layers"]
    assert (layer["rank"], layer["alpha"], layer["norm"]) == (3, None, None)


def test_names_of_kohyas_that_hide_their_paths():
    Path("k.safetensors").write_bytes(to_bytes({
        "lora_unet_my_own_layer.lora_down.weight": np.ones((2, 4), np.float32),
        "lora_unet_my_own_layer.lora_up.weight": np.ones((4, 2), np.float32),
        "lora_unet_my_own_layer.alpha": np.float32(4).reshape(())}))
    layer, = inspect(Path("k.safetensors"))["layers"]
    assert (layer["path"], layer["scale"]) == ("my_own_layer", 2)


def test_table_and_json_on_the_command_line(shared, capfd):
    path = str(shared / "fixtures/peft/llama_tiny/lora_rank_alpha_pattern")
    assert main(["inspect", path]) == 0
    output, errors = capfd.readouterr()
    lines = output.splitlines()
    assert errors == "" and lines[0].startswith("peft adapter of method lora: 4 layers, 1,920 parameters")
    assert lines[2].split() == ["layer", "rank", "alpha", "scale", "shapes", "type", "norm"]
    assert lines[4].split()[:7] == ["model.layers.0.self_attn.v_proj", "2", "32", "16", "2x64", "32x2", "F32"]
    assert len({len(line) for line in lines[2:7]}) == 1
    assert main(["inspect", path, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["layers"][1]["alpha"] == 32


def test_a_trained_parameter_and_the_base_are_shown(capfd):
    net = mp.get_pet_model(ms.nn.SequentialCell(ms.nn.Dense(8, 8), ms.nn.Dense(8, 3)), mp.LoraConfig(
        2, 4, target_modules=["0"], modules_to_save=["1"]))
    mp.save_adapter(net, "adapter")
    assert main(["inspect", "adapter"]) == 0
    output = capfd.readouterr().out
    assert "trained beside the deltas: 1.weight 3x8 F32" in output and "1.bias 3 F32" in output
    assert "fingerprint of the base's adapted layers " in output
    assert inspect(Path("adapter"))["fingerprint"].keys() == {"0"}


def test_values_that_are_not_finite_are_named(capfd):
    state = lora({"q": (4, 4)})
    state.layers["q"].tensors[A][0, 0] = np.nan
    write_adapter(Path("adapter"), state)
    assert main(["inspect", "adapter"]) == 0 and "q holds NaN or infinite values" in capfd.readouterr().out
    assert main(["inspect", "adapter", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["layers"][0]["finite"] is False


@pytest.mark.parametrize("what", ["nothing", "empty", "folder", "base", "pickle", "text", "cut"])
def test_no_adapter_is_one_sentence(what, capfd):
    path = Path("thing.safetensors")
    if what in ("empty", "text", "pickle"):
        path.write_bytes({"empty": b"", "text": b"# Read me\n" * 20, "pickle": b"\x80\x02}q\x00."}[what])
    elif what == "base":
        path.write_bytes(to_bytes(weights(layers=1)))
    elif what == "cut":
        path.write_bytes(to_bytes(weights(layers=1))[:-100])
    elif what == "folder":
        path.mkdir()
    assert main(["inspect", str(path)]) == 2
    output, errors = capfd.readouterr()
    assert output == "" and errors.count("\n") == 1 and "thing.safetensors" in errors
    wanted = {"nothing": "There is no", "folder": "no directory of one adapter", "base": "no adapter of a format",
              "pickle": "pickle", "cut": "cut short"}
    assert wanted.get(what, "not a whole safetensors file") in errors
