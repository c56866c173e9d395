"""The commands for files as they are typed: help, exit codes, one sentence for every error, progress, pipelines."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from offline_bases import linear, lora, weights, write_adapter, write_shards

import mindpet_lite as mp
from mindpet_lite.cli import main
from mindpet_lite.endings import ended_by_signals
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


def report_of(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_every_command_says_as_json_what_it_did(folders, capfd):
    report = report_of(capfd, *MERGE, "-q")
    names = sorted(name for name in weights() if "self_attn" in name or "mlp" in name)
    assert report["out"] == "out" and report["tensors"] == 12 and set(report["changed"]) <= set(names)
    assert len(report["changed"]) == 6 and report["left_behind"] == [] and report["size"] > 0
    report = report_of(capfd, "extract", "--base", "base", "--tuned", "out", "--rank", "2", "--out", "found", "-q")
    assert report["out"] == "found" and len(report["layers"]) == 6 and 0 <= report["error"] < 1
    assert {layer["path"] for layer in report["layers"]} == set(linear(weights()))
    assert all(layer["rank"] == 2 and 0 <= layer["error"] < 1 for layer in report["layers"])
    assert report_of(capfd, "convert", "adapter", "a.safetensors", "--to", "kohya") == {
        "from": "peft", "to": "kohya", "layers": 6, "files": ["a.safetensors"]}
    report = report_of(capfd, "combine", "adapter=1", "found=-0.5", "--out", "both")
    assert report == {"out": "both", "how": "svd", "layers": report["layers"],
                      "adapters": [{"path": "adapter", "weight": 1.0}, {"path": "found", "weight": -0.5}]}
    assert set(report["layers"]) == set(linear(weights()))
    report = report_of(capfd, "quantize", "--base", "base", "--kind", "int8", "--out", "few", "-q")
    assert report["kind"] == "int8" and 0 < report["after"] < report["before"] and report["tensors"] == 12
    assert all(0 < error < 0.05 for error in report["errors"].values()) and len(report["errors"]) >= 6
    assert report_of(capfd, "inspect", "adapter")["format"] == "peft"


def test_messages_name_their_option(folders, capfd):
    Path("file").write_text("mine")
    of_base = ["--base", "base", "--tuned", "base", "--rank", "2"]
    for arguments, sentence in (
            (["extract", *of_base, "--seed", "-1"], "'--seed': -1 is not in the range x>=0"),
            (["extract", *of_base, "--out", "file"], "'--out': file is a file: give a directory that is empty or not"),
            ([*MERGE[:-1], "file"], "'--out': file is a file"),
            ([*MERGE[:-1], "base"], "'--out': base holds something"),
            ([*MERGE[:-1], ""], "'--out': an empty path names nothing"),
            (["combine", "adapter=1", "--out", "file"], "'--out': file is a file"),
            (["combine", "adapter=1", "--out", "x", "--density", "2"], "'--density': 2.0 is not in the range 0<x<=1"),
            (["quantize", "--base", "base", "--kind", "nf4", "--out", "file"], "'--out': file is a file"),
            (["estimate", "--config", "base/config.json", "--batch", "1", "--lora-dropout", "1"],
             "'--lora-dropout': 1.0 is not in the range 0<=x<1")):
        assert main(arguments) == 2
        output, errors = capfd.readouterr()
        assert output == "" and f"mindpet-lite: Invalid value for {sentence}" in errors and errors.count("\n") == 1
    assert Path("file").read_text() == "mine"


# A merge that waits where it has begun to write.
WAITING = """
import signal, sys, time
import mindpet_lite.offline.merge
def wait(*_):
    print("begun", flush=True)
    time.sleep(60)
mindpet_lite.offline.merge.rewrite = wait
if sys.argv.pop(1) == "ignored":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
from mindpet_lite.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_with_a_sentence_and_nothing_is_left(folders, number):
    before = sorted(os.listdir("."))
    root = Path(mp.__file__).parents[1]
    running = subprocess.Popen([sys.executable, "-c", WAITING, "", *MERGE, "-q"], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)})
    assert running.stdout.readline() == "begun\n" and len(os.listdir(".")) == len(before) + 1
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + number
    assert errors == (f"mindpet-lite: merge was ended by {number.name} before it was done; what it had begun is "
                      f"removed.\n")
    assert sorted(os.listdir(".")) == before


def test_a_signal_that_the_caller_ignores_ends_nothing(folders):
    """As below nohup."""
    root = Path(mp.__file__).parents[1]
    running = subprocess.Popen([sys.executable, "-c", WAITING, "ignored", *MERGE, "-q"], stdout=subprocess.PIPE,
                               text=True, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)})
    assert running.stdout.readline() == "begun\n"
    running.send_signal(signal.SIGHUP)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM and "SIGTERM" in errors


def test_signals_of_a_program_around_it_stay_its_own():
    handler = signal.getsignal(signal.SIGTERM)
    mine = lambda number, frame: None  # noqa: E731
    signal.signal(signal.SIGTERM, mine)
    try:
        with ended_by_signals("merge"):
            assert signal.getsignal(signal.SIGTERM) is mine and signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: ended_by_signals("merge").__enter__()).result() is None
    finally:
        signal.signal(signal.SIGTERM, handler)


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
