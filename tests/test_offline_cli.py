"""The commands for files as they are typed: help, exit codes, one sentence for every error, progress, pipelines."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from offline_bases import linear, lora, weights, write_adapter, write_shards

import mindpet_lite as mp
from mindpet_lite.cli import main
from mindpet_lite.formats.files import read_tensors, to_bytes
from mindpet_lite.offline import progress
from mindpet_lite.offline.merge import merge

pytest.importorskip("click")
MERGE = ["merge", "--base", "base", "--adapter", "adapter", "--out", "out"]


@pytest.fixture
def folders() -> None:
    tensors = weights()
    write_shards(Path("base"), tensors, 2)
    write_adapter(Path("adapter"), lora(linear(tensors)))


@pytest.mark.parametrize("command", ["inspect", "convert", "merge", "extract", "quantize"])
def test_help_shows_an_example(command, capfd):
    assert main([command, "--help"]) == 0
    assert f":\n    mindpet-lite {command} " in capfd.readouterr().out
    assert main(["--help"]) == 0 and f"  {command} " in capfd.readouterr().out
    assert main([command]) == 2
    output, errors = capfd.readouterr()
    assert output == "" and errors.startswith("mindpet-lite: Missing ") and errors.count("\n") == 1


def test_merge(folders, capfd):
    Path("base/pytorch_model.bin").write_bytes(b"old")
    assert main(MERGE) == 0
    output, errors = capfd.readouterr()
    assert output == "merged 6 of 12 tensors into out\n"
    assert errors == "mindpet-lite: pytorch_model.bin was left behind: it is not merged.\n"
    assert main(MERGE) == 2
    output, errors = capfd.readouterr()
    assert output == "" and "holds something already" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("option, value, message", [
    ("--base", "nowhere", "no base at nowhere"), ("--adapter", "nowhere", "There is no nowhere"),
    ("--base", "adapter", "no weights that can be merged"), ("--adapter", "base", "no directory of one adapter"),
    ("--names", "names.yaml", "no YAML file"), ("--from", "gguf", "is not one of"),
    ("--from", "kohya", "no key of kohya")])
def test_errors_are_one_sentence(folders, option, value, message, capfd):
    arguments = [*MERGE, option, value] if option not in MERGE else \
        [value if MERGE[place - 1] == option else item for place, item in enumerate(MERGE)]
    assert main(arguments) == 2
    output, errors = capfd.readouterr()
    assert output == "" and message in errors and errors.count("\n") == 1 and errors.startswith("mindpet-lite: ")
    assert not Path("out").exists()


def test_many_problems_are_the_first_of_them(folders, capfd):
    shapes = {f"model.layers.{number}.self_attn.q_proj": (24, 24) for number in range(40)}
    write_adapter(Path("adapter"), lora(shapes))
    assert main(MERGE) == 2
    errors = capfd.readouterr().err
    assert "and 28 more." in errors and ".self_attn.q_proj is no layer" in errors and len(errors) < 2500


def test_without_traceback_in_a_process_of_its_own(folders):
    root = Path(mp.__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "mindpet_lite", *MERGE[:-1], "base"], capture_output=True, text=True,
                          env={"PYTHONPATH": str(root), "PATH": ""}, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""


def test_progress_is_on_standard_error(folders, capfd, monkeypatch):
    monkeypatch.setattr(progress, "_EVERY", -1)
    assert main(MERGE) == 0
    output, errors = capfd.readouterr()
    assert output.startswith("merged") and "mindpet-lite: merge 0 of 0 MB\n" in errors
    assert main([*MERGE[:-1], "quiet", "-q"]) == 0 and capfd.readouterr().err == ""
    pytest.importorskip("tqdm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main([*MERGE[:-1], "bar"]) == 0 and "merge: " in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main([*MERGE[:-1], "line"]) == 0 and "merge 0 of 0 MB\n" in capfd.readouterr().err


def test_another_base_is_told_or_refused(capfd):
    net = ms.nn.SequentialCell(ms.nn.Dense(8, 8), ms.nn.Dense(8, 8))
    ms.save_checkpoint(net, "base.ckpt")
    ms.save_checkpoint([{"name": name, "data": ms.Tensor(value.asnumpy().astype(np.float16))}
                        for name, value in ms.load_checkpoint("base.ckpt").items()], "half.ckpt")
    ms.save_checkpoint(ms.nn.SequentialCell(ms.nn.Dense(8, 8), ms.nn.Dense(8, 8)), "other.ckpt")
    mp.save_adapter(mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0", "1"])), "adapter")
    if "mindpet_lite_base" not in json.loads(Path("adapter/adapter_config.json").read_text()):
        pytest.skip("save_adapter does not say which base an adapter belongs to")
    for base in ("base", "half", "other"):
        assert main(["merge", "--base", f"{base}.ckpt", "--adapter", "adapter", "--out", base, "-q"]) == 0
        errors = capfd.readouterr().err
        assert ("trained on another base: the weights of 0, 1 are not" in errors) == (base == "other")
        assert errors.count("\n") == (base == "other")
        assert main(["merge", "--base", f"{base}.ckpt", "--adapter", "adapter", "--out", f"{base}-strict",
                     "--strict-base"]) == (2 if base == "other" else 0)
        capfd.readouterr()
    assert not Path("other-strict").exists()


def test_a_pipeline_of_diffusers():
    rng = np.random.default_rng(0)
    tensors = {"unet": {"down.to_q.weight": rng.standard_normal((8, 8), np.float32)},
               "text_encoder": {"layers.0.q_proj.weight": rng.standard_normal((6, 6), np.float32)}}
    for component, own in tensors.items():
        Path("base", component).mkdir(parents=True)
        name = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        Path("base", component, f"{name}.safetensors").write_bytes(to_bytes(own))
        Path("base", component, f"{name}.fp16.safetensors").write_bytes(to_bytes(own))
        Path("base", component, "config.json").write_text("{}")
    Path("base/model_index.json").write_text("{}")
    state = lora({"unet.down.to_q": (8, 8), "text_encoder.layers.0.q_proj": (6, 6)})
    done = merge(Path("base"), write_adapter(Path("adapter"), state), Path("out"), quiet=True)
    assert done.changed == ("text_encoder.layers.0.q_proj.weight", "unet.down.to_q.weight")
    assert len(done.left_behind) == 2 and Path("out/unet/config.json").is_file()
    after = read_tensors(Path("out/unet/diffusion_pytorch_model.safetensors"))["down.to_q.weight"]
    a, b = state.layers["unet.down.to_q"].tensors.values()
    assert np.abs(after - tensors["unet"]["down.to_q.weight"] - 5 / 3 * b @ a).max() < 1e-5


@pytest.mark.parametrize("text, message", [
    ('{"weight_map": {"lm_head.weight": "../x.safetensors"}}', "not beside it"), ("{", "not valid JSON"),
    ("{}", "must hold a 'weight_map'"), ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "does not fit")])
def test_damaged_indexes(folders, text, message, capfd):
    Path("base/model.safetensors.index.json").write_text(text)
    assert main(MERGE) == 2 and message in capfd.readouterr().err and not Path("out").exists()


def test_the_index_may_be_named_and_files_that_repeat_a_tensor_are_refused(folders, capfd):
    assert main(["merge", "--base", "base/model.safetensors.index.json", *MERGE[3:]]) == 0
    assert Path("out/config.json").is_file()
    Path("base/model.safetensors.index.json").unlink()
    Path("base/more.safetensors").write_bytes(Path("base/model-00001-of-00002.safetensors").read_bytes())
    assert main([*MERGE[:-1], "again"]) == 2 and "name the file to use" in capfd.readouterr().err
