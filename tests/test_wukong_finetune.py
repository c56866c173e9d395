"""Fine-tuning and sampling from the command line: results, both modes, and what users get wrong."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import yaml
from jobs import run_job
from mindspore import nn
from PIL import Image

WUKONG = Path(__file__).resolve().parent.parent / "examples" / "wukong"
FIXTURES = WUKONG.parents[2] / "shared" / "fixtures" / "wukong"
sys.path.insert(0, str(WUKONG))

import checkpoint  # noqa: E402
import errors  # noqa: E402
import finetune  # noqa: E402
import latents  # noqa: E402
import pictures  # noqa: E402
import pipeline  # noqa: E402
import run_folder  # noqa: E402
import settings  # noqa: E402
import training  # noqa: E402
import txt2img  # noqa: E402
from base import MODELS, load_base, save_base  # noqa: E402
from wordpiece import WordPieceTokenizer  # noqa: E402

VOCABULARY = "一个狐狸熊猫脸青蛙红苹果"
CONFIG = {
    "unet": {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1],
             "num_res_blocks": 1, "channel_mult": [1], "num_heads": 2, "context_dim": 32},
    "text_encoder": {"context_length": 8, "vocab_size": 4 + len(VOCABULARY), "output_dim": 32, "width": 32, "layers": 1,
                     "heads": 2},
    "autoencoder": {"embed_dim": 4, "ddconfig": {
        "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1],
        "num_res_blocks": 1, "attn_resolutions": []}},
    "schedule": {"timesteps": 1000, "linear_start": 0.00085, "linear_end": 0.012},
    "scale_factor": 0.5, "vocabulary": VOCABULARY,
}
SMALL = ["--image-size", "16", "--steps", "2", "--batch", "2", "--heldout-draws", "1", "--rank", "2", "--lr", "0.01",
         "--warmup", "1"]


def weight(path: str, shape: tuple[int, ...]) -> np.ndarray:
    value = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape).astype(np.float32)
    if path.endswith("gamma"):
        return 1 + 0.1 * value
    return value / np.sqrt(np.prod(shape[1:], dtype=np.float32)) if len(shape) > 1 else 0.1 * value


def weights() -> dict[str, dict[str, np.ndarray]]:
    return {name: {path: weight(path, p.shape) for path, p in net(**CONFIG[name]).parameters_and_names()}
            for name, net in MODELS.items()}


def write_data(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    rows = ["dir,text"]
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{VOCABULARY[2 + i]}")
    (folder / "captions.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a base, data, and an adapter trained for two steps in graph mode."""
    place = tmp_path_factory.mktemp("wukong")
    save_base(place / "base", CONFIG, weights())
    write_data(place / "data" / "train", 5)
    write_data(place / "data" / "heldout", 3)
    write_data(place / "alone" / "train", 5)            # without held-out images: two graphs less to compile
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert finetune.main(run_of(place, "out")) == 0
    return place


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def run_of(place: Path, out: str, *flags: str) -> list[str]:
    folders = ["--base", str(place / "base"), "--data", str(place / "data" / "train"), "--out", str(place / out)]
    return [*folders, *SMALL, *flags]


def adapter_of(folder: Path) -> dict[str, np.ndarray]:
    return {key: p.asnumpy() for key, p in ms.load_checkpoint(str(folder / "adapter_model.safetensors"),
                                                             format="safetensors").items()}


def refused(capsys, code: int, *words: str) -> str:
    """Checks that a script ended with one sentence on stderr that holds these words."""
    captured = capsys.readouterr().err
    lines = [line for line in captured.splitlines() if line.strip()]
    assert code == 2 and len(lines) == 1, captured
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def test_run_leaves_adapter_curve_and_figures(place):
    assert sorted(path.name for path in (place / "out").iterdir()) == [
        "adapter", "log.jsonl", "loss.png", "report.html", "results.json", "settings.yaml"]
    measured = json.loads((place / "out" / "results.json").read_text())
    tensors = adapter_of(place / "out" / "adapter")
    parts = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
             "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
    assert {key.split("transformer_blocks.0.")[1].rsplit(".lora", 1)[0] for key in tensors} == set(parts)
    assert sum(value.size for value in tensors.values()) == measured["trainable"] == 4 * 8 * 2 * (32 + 32)
    assert all(np.abs(value).max() > 0 for value in tensors.values())
    assert measured["adapter_bytes"] == (place / "out" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert measured["heldout_loss_base"] != measured["heldout_loss_adapter"]
    assert Image.open(place / "out" / "loss.png").size == (840, 480)
    log = [json.loads(line) for line in (place / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2] and all(row["norm"] > 0 and row["loss"] > 0 for row in log)
    assert [row["rate"] for row in log] == [0.01, 0.01] and set(log[0]) == {
        "step", "loss", "rate", "norm", "seconds", "images_per_second"}
    again = settings.read(finetune.parse(["--config", str(place / "out" / "settings.yaml")]))
    assert again == settings.read(finetune.parse(run_of(place, "out")))
    report = (place / "out" / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in report and "<td>learning_rate</td><td>0.01</td>" in report


def test_pynative_trains_the_same_adapter(place):
    assert finetune.main(run_of(place, "pynative", "--mode", "pynative")) == 0
    graph, pynative = adapter_of(place / "out" / "adapter"), adapter_of(place / "pynative" / "adapter")
    for key, value in graph.items():
        np.testing.assert_allclose(pynative[key], value, atol=2e-5, err_msg=key)


def test_lora_plus_ratio(place):
    chosen = settings.read(finetune.parse(run_of(place, "plus", "--lora-plus-ratio", "8", "--lr", "1e-3", "--warmup",
                                                 "2")))
    base = load_base(place / "base")
    finetune.adapt(base, chosen)
    step, rates = training.make_step(base, chosen, training.Trained(base, chosen))
    found = zip(step.optimizer.parameters, step.optimizer.get_lr())
    assert {(one.name[-1], round(float(rate.asnumpy()), 9)) for one, rate in found} == {("a", 5e-4), ("b", 4e-3)}
    assert rates == pytest.approx([5e-4, 1e-3])


def test_bad_rows_are_counted_skips(place, tmp_path, capsys):
    write_data(tmp_path / "train", 3)
    (tmp_path / "train" / "1.png").write_bytes(b"no image")
    with (tmp_path / "train" / "captions.csv").open("a", encoding="utf-8") as file:
        file.write("9.png,狐狸\nonly one value\n")
    chosen = settings.read(finetune.parse(run_of(place, "x")))
    (pictures_,) = finetune.read_data(tmp_path / "train", load_base(place / "base"), chosen, training.Ranks())
    assert pictures_.images.shape == (2, 3, 16, 16) and len(pictures_.texts) == 2
    out = capsys.readouterr().out
    assert "2 images, 3 rows skipped" in out and "line 3" in out and "9.png" in out and "line 6" in out


def pixels_of(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / f"{i:02d}.png")).astype(int) for i in range(2)])


def test_txt2img_scale_and_merge(place, tmp_path, capsys):
    drawing = ["狐狸", "--prompts", "more.txt", "--base", str(place / "base"), "--image-size", "16", "--steps", "2"]
    adapter = ["--adapter", str(place / "out" / "adapter")]
    (tmp_path / "more.txt").write_text("熊猫\n\n", encoding="utf-8")
    runs = {"base": [], "adapter": adapter, "off": [*adapter, "--scale", "0"], "merged": [*adapter, "--merge"]}
    for name, flags in runs.items():
        assert txt2img.main([*drawing, *flags, "--out", name]) == 0
    images = {name: pixels_of(tmp_path / name) for name in runs}
    assert images["base"].shape == (2, 16, 16, 3)
    np.testing.assert_array_equal(images["off"], images["base"])
    assert np.abs(images["adapter"] - images["base"]).max() > 0
    assert np.abs(images["merged"] - images["adapter"]).max() <= 1
    assert "2 images and grid.png" in capsys.readouterr().out


def test_scale_zero_and_merge_on_floats(place):
    base = load_base(place / "base")
    shape, pair = (4, 8, 8), ["狐狸", "熊猫"]
    noise = pipeline.start_noise(shape, 2, 0)
    np.testing.assert_array_equal(noise[:1], pipeline.start_noise(shape, 1, 0))

    def draw() -> np.ndarray:
        step = pipeline_step(base.unet)
        return pipeline.generate(base, step, pair, noise, solver="ddim", steps=2, guidance=2.0)

    before = draw()
    txt2img.load_adapter(base.unet, place / "out" / "adapter")
    after = draw()
    txt2img.set_lora_scale(base.unet, 0)
    np.testing.assert_array_equal(draw(), before)
    txt2img.set_lora_scale(base.unet, 1)
    txt2img.merge(base.unet)
    assert np.abs(draw() - after).max() < 1e-3 < np.abs(after - before).max()


def pipeline_step(unet: nn.Cell) -> nn.Cell:
    return txt2img.GuidedStep(unet)


@pytest.mark.parametrize(("line", "words"), [
    ("lora_rnak: 4", ("unknown key 'lora_rnak'", "did you mean 'lora_rank'")),
    ("learning_rate: 1e-5", ("learning_rate must be a number, got '1e-5'", "write 1.0e-05")),
    ("steps: true", ("steps must be a whole number, got True",)),
    ("steps: 2.5", ("steps must be a whole number, got 2.5",)),
    ("steps: '20'", ("steps must be a whole number, got '20'", "without quotes")),
    ("steps: 0", ("steps must be at least 1, got 0",)),
    ("learning_rate: .nan", ("learning_rate must be a number, got nan",)),
    ("fp16: 1", ("fp16 must be true or false, got 1",)),
    ("device: GPU", ("device must be CPU or Ascend, got 'GPU'",)),
    ("target_modules: 3", ("target_modules must be a list of names or one text, got 3",)),
    ("base: 5", ("base must be a path, got 5",)),
    ("- steps", ("expected keys and values at the top",)),
    ("steps: [", ("cannot be read as YAML",)),
    ("steps: 1\nsteps: 2", ("the key 'steps' stands twice, in lines 1 and 2",)),
])
def test_wrong_yaml(tmp_path, capsys, line, words):
    (tmp_path / "run.yaml").write_text(line + "\n", encoding="utf-8")
    refused(capsys, finetune.main(["--config", "run.yaml"]), "finetune.py: error:", "run.yaml", *words)


def test_flags_override_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text("steps: 7\nlearning_rate: 1.0e-5\nlora_alpha: 3\nfp16: true\n", encoding="utf-8")
    chosen = settings.read(finetune.parse(["--config", "run.yaml", "--steps", "9", "--no-fp16"]))
    assert (chosen.steps, chosen.learning_rate, chosen.lora_alpha, chosen.fp16) == (9, 1e-5, 3.0, False)
    assert settings.Settings().learning_rate == 1e-4 and settings.Settings().final_learning_rate == 1e-6


def test_what_users_get_wrong(place, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    damaged = tmp_path / "damaged"
    save_base(damaged, CONFIG, weights())
    whole = (damaged / "unet.safetensors").read_bytes()
    (damaged / "unet.safetensors").write_bytes(whole[:len(whole) // 2])
    cases = [
        (["--config", "none.yaml"], ("no file none.yaml",)),
        (run_of(place, "x", "--base", "nowhere"), ("no base in nowhere",)),
        (run_of(place, "x", "--base", str(damaged)), ("unet.safetensors cannot be read",)),
        (run_of(place, "x", "--base", "w.ckpt"), ("model block",)),
        (run_of(place, "x", "--data", "nowhere"), ("no data folder nowhere",)),
        (run_of(place, "x", "--data", "empty"), ("no CSV file in empty",)),
        (run_of(place, "x", "--target-modules", "to_qq"), ("'to_qq' hits nothing", "to_q")),
        (run_of(place, "x", "--image-size", "17"), ("image_size must be a multiple of 2",)),
        (run_of(place, "x", "--out", "file"), ("file is a file",)),
        (run_of(place, "x", "--out", "file/below"), ("file",)),
        (run_of(place, "out"), ("holds adapter already: give --resume to go on, --overwrite to delete",)),
        (run_of(place, "data", "--overwrite"), ("holds heldout, which is none of it: give another --out",)),
        (run_of(place, "out", "--overwrite", "--resume"), ("give one of them",)),
        (run_of(place, "x", "--parallel", "data"), ("--parallel data: ", "msrun --worker_num=2")),
    ]
    if not ms.hal.is_available("Ascend"):
        cases.append((run_of(place, "x", "--device", "Ascend"), ("finds no Ascend", "--device CPU")))
    for argv, words in cases:
        refused(capsys, finetune.main(argv), *words)
    with pytest.raises(SystemExit) as ended:
        finetune.main(["--steps", "many"])
    refused(capsys, ended.value.code, "--steps", "'many'")
    assert not (place / "x").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "rank_0") == ["damaged", "empty", "file"]


def test_wrong_adapters(place, tmp_path, capsys):
    drawing = ["狐狸", "--base", str(place / "base"), "--image-size", "16", "--steps", "1", "--out", "x", "--adapter"]
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in (place / "out" / "adapter").iterdir():
        content = file.read_bytes()
        (cut / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
    refused(capsys, txt2img.main([*drawing, "cut"]), "txt2img.py: error:", "not a whole safetensors file")
    refused(capsys, txt2img.main([*drawing, "nowhere"]), "There is no nowhere")
    refused(capsys, txt2img.main([*drawing[1:], "cut"]), "no prompt")
    with pytest.raises(SystemExit) as ended:
        txt2img.main(["狐狸", "--scale", "0.5"])
    refused(capsys, ended.value.code, "need --adapter")
    assert not (tmp_path / "x").exists()


def test_script_ends_without_a_trace(tmp_path):
    """As a user calls it: from another folder, in its own process."""
    command = [sys.executable, str(WUKONG / "finetune.py"), "--data", "nowhere", "--base", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("finetune.py: error: ") and done.stderr.count("\n") == 1


def test_what_a_signal_ends_is_said_with_its_exit_code(capsys):
    def stop():
        raise errors.Stopped("stopped after step 3", 143)

    assert errors.run_script("s", stop) == 143 and capsys.readouterr().err == "s: stopped after step 3\n"
    assert errors.run_script("s", lambda: (_ for _ in ()).throw(KeyboardInterrupt)) == 130


def lines_of(place: Path, out: str) -> list[dict]:
    return [json.loads(line) for line in (place / out / "log.jsonl").read_text().splitlines()]


def started(place: Path, out: str, *flags: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(WUKONG / "finetune.py"), *run_of(place, out, *flags)],
                            cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "GLOG_v": "3"})


def killed_after(place: Path, out: str, steps: int, number: int, *flags: str) -> tuple[int, str]:
    """Sends a signal when a run has made some steps more than its checkpoint; returns the exit code and its stderr."""
    log, checkpoints = place / out / "log.jsonl", (place / out / "checkpoints").glob("checkpoint-*")
    first, begin = max((int(path.name[11:]) for path in checkpoints), default=0), time.time_ns()
    process = started(place, out, *flags)
    while process.poll() is None:
        if log.exists() and log.stat().st_mtime_ns > begin and log.read_text().count("\n") >= first + steps:
            process.send_signal(number)
            break
        time.sleep(0.02)
    said = process.communicate()[1]
    return process.returncode, said


def test_a_run_that_is_killed_ends_with_the_same_bytes(place):
    flags = ["--steps", "60", "--save-every", "4", "--ema-decay", "0.9", "--gradient-accumulation", "2",
             "--random-flip", "--data", str(place / "alone" / "train")]
    whole = started(place, "whole", *flags)
    killed = killed_after(place, "killed", 6, signal.SIGKILL, *flags)
    assert killed[0] == -signal.SIGKILL and 6 <= len(lines_of(place, "killed")) < 60
    code, said = killed_after(place, "killed", 6, signal.SIGINT, *flags, "--resume")
    assert code == 130 and "--resume goes on from it" in said
    process = started(place, "killed", *flags, "--resume")
    assert process.wait() == 0 and whole.wait() == 0
    for name in ("adapter/adapter_model.safetensors", "ema/adapter/adapter_model.safetensors"):
        assert (place / "killed" / name).read_bytes() == (place / "whole" / name).read_bytes(), name
    kept = [(row["step"], row["loss"], row["rate"], row["norm"]) for row in lines_of(place, "whole")]
    assert kept == [(row["step"], row["loss"], row["rate"], row["norm"]) for row in lines_of(place, "killed")]
    assert sorted(path.name for path in (place / "killed" / "checkpoints").iterdir()) == [
        "checkpoint-56", "checkpoint-60"]
    code = finetune.main(run_of(place, "killed", *flags, "--resume", "--lr", "0.5"))
    assert code == 2
    assert finetune.main(run_of(place, "killed", "--overwrite")) == 0
    assert [row["step"] for row in lines_of(place, "killed")] == [1, 2] and not (place / "killed" / "ema").exists()


def test_dreambooth_and_validation(place, capsys):
    flags = ["--instance-prompt", "一个狐", "--class-prompt", "狐狸", "--class-images", "3",
             "--prior-loss-weight", "0.5", "--validation-every", "1", "--validation-prompts", "熊猫", "青蛙",
             "--noise-offset", "0.1", "--prediction", "v", "--data", str(place / "alone" / "train")]
    assert finetune.main(run_of(place, "dog", *flags)) == 0
    assert sorted(path.name for path in (place / "dog" / "class_images").iterdir()) == ["000.png", "001.png", "002.png"]
    assert sorted(path.name for path in (place / "dog" / "validation").iterdir()) == [
        "step-000001.png", "step-000002.png"]
    drawn = {path.read_bytes() for path in (place / "dog" / "validation").iterdir()}
    assert len(drawn) == 2
    assert "step-000002" in (place / "dog" / "report.html").read_text(encoding="utf-8")


def chosen_of(place: Path, *flags: str) -> settings.Settings:
    return settings.read(finetune.parse(run_of(place, "x", *flags)))


def test_batches_follow_from_seed_and_step_and_shares_make_the_whole(place):
    base = load_base(place / "base")
    chosen = chosen_of(place, "--batch", "4", "--random-flip", "--caption-dropout", "0.5", "--noise-offset", "0.3")
    half = chosen_of(place, "--batch", "2", "--random-flip", "--caption-dropout", "0.5", "--noise-offset", "0.3")
    (some,) = finetune.read_data(place / "data" / "train", base, chosen, training.Ranks())
    examples = latents.encode(base, some, chosen, flip=True)
    np.testing.assert_allclose(examples.latents[1], pipeline.encode_images(base, some.images[..., ::-1].copy()),
                               atol=1e-6)
    whole = latents.Batches(base, [examples], examples, chosen, 0, 1)
    shares = [iter(latents.Batches(base, [examples], examples, half, rank, 2)) for rank in range(2)]
    later = latents.Batches(base, [examples], examples, chosen, 0, 1)
    stream, empty = iter(whole), pipeline.embed_texts(base, [""])[0]
    for step in range(6):
        batch = next(stream)
        parts = [next(share) for share in shares]
        for array, first, second in zip(batch, *parts):
            # Each process has its share of the images and its share of the class images.
            np.testing.assert_array_equal(array, np.concatenate([first[:2], second[:2], first[2:], second[2:]]))
        later.sampler.step = step
        for array, again in zip(batch, next(iter(later))):
            np.testing.assert_array_equal(array, again)
        views = {examples.latents[view, row].tobytes() for view in range(2) for row in range(5)}
        assert all(one.tobytes() in views for one in batch[0])
        texts = {row.tobytes() for row in examples.text} | {empty.tobytes()}
        assert all(one.tobytes() in texts for one in batch[1])
    assert whole.sampler.step == 6


def test_buckets_take_turns_and_every_row_comes_once_in_an_epoch():
    sampler = latents.BucketSampler([5, 2, 9], 4, seed=1)
    epochs = [[next(sampler) for _ in range(6)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(bucket for bucket, _ in epoch) == [0, 0, 1, 2, 2, 2]
    assert [bucket for bucket, _ in epochs[0]] != [bucket for bucket, _ in epochs[1]]
    for bucket, count in enumerate([5, 2, 9]):
        rows = np.concatenate([rows for epoch in epochs for found, rows in epoch if found == bucket])
        assert all(np.array_equal(np.sort(rows[i:i + count]), np.arange(count)) for i in range(0, 2 * count - 1, count))
    again = latents.BucketSampler([5, 2, 9], 4, seed=1)
    again.step = 7
    bucket, rows = next(again)
    assert bucket == epochs[1][1][0] and np.array_equal(rows, epochs[1][1][1])


def test_shapes_of_their_own_and_a_text_encoder_that_trains(place, tmp_path, capsys):
    for i, shape in enumerate([(16, 32), (16, 32), (32, 16), (20, 20)]):
        (tmp_path / "data").mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (*shape, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": VOCABULARY[2 + i]}) for i in range(4)]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    flags = ["--data", "data", "--buckets", "3", "--train-text-encoder", "--steps", "4", "--save-every", "2",
             "--latent-cache", "cache"]
    assert finetune.main(run_of(place, "shapes", *flags)) == 0
    said = capsys.readouterr().out
    assert "data: 4 images" in said and "24 x 10: 2 images" in said and "16 x 16: 1 images" in said
    tensors = adapter_of(place / "shapes" / "text_encoder_adapter")
    assert {key.split(".lora_")[0].rsplit(".", 1)[1] for key in tensors} == {"in_proj", "out_proj"}
    assert all(np.abs(value).max() > 0 for value in tensors.values())
    cached = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert len(cached) == 3
    base, chosen = load_base(place / "base"), chosen_of(place, *flags, "--overwrite")
    for one in finetune.read_data(chosen.data, base, chosen, training.Ranks()):
        before = pipeline.encode_images(base, one.images)
        np.testing.assert_array_equal(latents.encode(base, one, chosen, flip=False).latents[0], before)
    assert cached == {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    drawing = ["狐狸", "熊猫", "--base", str(place / "base"), "--image-size", "16", "--steps", "2", "--adapter",
               str(place / "shapes" / "adapter")]
    text = ["--text-encoder-adapter", str(place / "shapes" / "text_encoder_adapter")]
    assert txt2img.main([*drawing, "--out", "unet"]) == 0 and txt2img.main([*drawing, *text, "--out", "both"]) == 0
    assert np.abs(pixels_of(tmp_path / "unet") - pixels_of(tmp_path / "both")).max() > 0


def test_two_processes_train_the_adapter_of_one(place, tmp_path):
    flags = ["--random-flip", "--caption-dropout", "0.5", "--steps", "4", "--save-every", "2", "--seed", "3",
             "--data", str(place / "alone" / "train")]
    script = "import sys\nsys.path.insert(0, {!r})\nimport finetune\nsys.exit(finetune.main({!r}))\n"
    argv = run_of(place, "one", *flags, "--batch", "4")
    assert finetune.main(argv) == 0
    argv = run_of(place, "two", *flags, "--batch", "2", "--parallel", "data")
    done = run_job(script.format(str(WUKONG), argv), tmp_path, 2)
    assert done.returncode == 0, done.stdout
    assert "each of 2 processes sends 16,384 bytes of gradients for an update" in done.stdout
    expected = adapter_of(place / "one" / "adapter")
    for key, value in adapter_of(place / "two" / "adapter").items():
        np.testing.assert_allclose(value, expected[key], atol=1e-5, err_msg=key)
    assert [row["step"] for row in lines_of(place, "two")] == [1, 2, 3, 4]


def test_recomputation_and_accumulation_give_the_plain_adapter(place):
    assert finetune.main(run_of(place, "again", "--recompute", "--data", str(place / "alone" / "train"))) == 0
    plain = adapter_of(place / "out" / "adapter")
    for key, value in adapter_of(place / "again" / "adapter").items():
        np.testing.assert_allclose(value, plain[key], atol=2e-5, err_msg=key)


def test_pictures_of_an_earlier_call_are_not_left_beside_new_ones(place, tmp_path, capsys):
    drawing = ["--base", str(place / "base"), "--image-size", "16", "--steps", "1", "--out", "p"]
    assert txt2img.main(["狐狸", "熊猫", *drawing]) == 0
    refused(capsys, txt2img.main(["狐狸", *drawing]), "holds 00.png already", "--overwrite")
    assert txt2img.main(["狐狸", *drawing, "--overwrite"]) == 0
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["00.png", "grid.png"]
    (tmp_path / "p" / "mine.txt").write_text("x")
    refused(capsys, txt2img.main(["狐狸", *drawing, "--overwrite"]), "holds mine.txt, which is none")


def test_the_log_drops_what_is_done_again(tmp_path):
    log = run_folder.Log(tmp_path, 0)
    for step in range(1, 6):
        log.add(step=step, loss=float(step))
    log.close()
    again = run_folder.Log(tmp_path, 3)
    assert again.losses() == [1.0, 2.0, 3.0]
    again.add(step=4, loss=9.0)
    again.close()
    assert [json.loads(row)["loss"] for row in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 9]


def vocabulary(folder: Path) -> Path:
    path = folder / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n狐\n狸\nem\n##oji\n!\n", encoding="utf-8")
    return path


def test_checkpoint_is_the_folder_base(place, tmp_path):
    model = {**CONFIG, "vocabulary": str(vocabulary(tmp_path))}
    entries = {checkpoint.PREFIXES[name] + path: value.astype(np.float16).astype(np.float32)
               for name, arrays in weights().items() for path, value in arrays.items()}
    def save(name: str, values: dict[str, np.ndarray]) -> Path:
        ms.save_checkpoint([{"name": key, "data": ms.Tensor(value)} for key, value in values.items()], name)
        return Path(name)

    loaded = checkpoint.load_checkpoint_base(save("w.ckpt", {**entries, "model_ema.decay": np.ones(1)}), model)
    folder = load_base(place / "base")
    for name in MODELS:
        expected = {path: p.asnumpy() for path, p in getattr(folder, name).parameters_and_names()}
        for path, parameter in getattr(loaded, name).parameters_and_names():
            np.testing.assert_array_equal(parameter.asnumpy(), expected[path], err_msg=path)
    assert loaded.tokenizer("狐狸") == [2, 4, 5, 3, 0, 0, 0, 0]
    first = next(iter(entries))
    for values, word in (({k: v for k, v in entries.items() if k != first}, f"1 missing in the file: {first}"),
                         ({**entries, first: np.ones((1, 1), np.float32)}, f"{first} ((1, 1) instead of")):
        with pytest.raises(checkpoint.BaseError, match="does not fit its models") as caught:
            checkpoint.load_checkpoint_base(save("bad.ckpt", values), model)
        assert word in str(caught.value)
    Path("cut.ckpt").write_bytes(Path("w.ckpt").read_bytes()[:5000])
    for path, word in (("cut.ckpt", "cut short"), ("none.ckpt", "no base at none.ckpt")):
        with pytest.raises(checkpoint.BaseError, match=word):
            checkpoint.load_checkpoint_base(path, model)


def test_wordpiece(tmp_path):
    tokenizer = WordPieceTokenizer(vocabulary(tmp_path), 8)
    assert tokenizer("一狐 Emoji!") == [2, 1, 4, 6, 7, 8, 3, 0]
    assert tokenizer("狐" * 20) == [2, *[4] * 6, 3] and tokenizer("") == [2, 3, *[0] * 6]
    (tmp_path / "bad.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"lacks \[CLS\]"):
        WordPieceTokenizer(tmp_path / "bad.txt", 8)


def test_grid(tmp_path, capsys, monkeypatch):
    images = np.stack([np.full((3, 4, 4), -1.0), np.full((3, 4, 4), 1.0)])
    rows = {"base": images, "adapter": -images}
    pictures.save_grid(rows, ["狐狸", "没有这个"], tmp_path / "grid.png")
    page = np.asarray(Image.open(tmp_path / "grid.png"))
    left, top = page.shape[1] - 2 * 136, page.shape[0] - 2 * 136
    for row, column, value in ((0, 0, 0), (0, 1, 255), (1, 0, 255), (1, 1, 0)):
        assert page[top + row * 136 + 64, left + column * 136 + 64].tolist() == [value] * 3
    assert page[:top, left:].min() < 128
    monkeypatch.setattr(pictures, "chinese_font", lambda size: None)
    pictures.save_grid(rows, ["狐狸", "没有这个"], tmp_path / "english.png")
    assert "captions in English" in capsys.readouterr().err
    assert pictures.english(["狐狸", "没有这个", "熊猫，黑白"]) == ["fox", "prompt 2", "panda"]


def test_chinese_font_is_installed():
    font = pictures.chinese_font(18)
    assert font is not None
    assert bytes(font.getmask("狐")) != bytes(font.getmask("狸")), "no glyph of its own for a Chinese character"


def test_saturation():
    image = np.array([[[1.0, -1.0]], [[0.0, -1.0]], [[-1.0, -1.0]]])[None]
    assert pipeline.saturation(image) == pytest.approx(0.5)


def test_full_size_config():
    """The full-size YAML file is Wukong's: all paths and shapes; LoRA is 128 layers and 797,184 parameters."""
    if not FIXTURES.is_dir():
        pytest.skip(f"no fixtures in {FIXTURES}")
    chosen = settings.read(finetune.parse(["--config", str(WUKONG / "configs" / "wukong_full_lora.yaml")]))
    files = {"unet": "unet", "text_encoder": "text", "autoencoder": "vae"}
    for name, file in files.items():
        with nn.utils.no_init_parameters():
            net = MODELS[name](**chosen.model[name])
        shapes = json.loads((FIXTURES / f"{file}_full_shapes.json").read_text())
        assert {path: list(p.shape) for path, p in net.parameters_and_names()} == shapes
    assert (chosen.lora_rank, chosen.lora_alpha, chosen.batch_size, chosen.image_size) == (4, 4, 3, 512)
    assert (chosen.learning_rate, chosen.final_learning_rate, chosen.model["scale_factor"]) == (1e-4, 1e-6, 0.18215)


def test_tiny_config_is_read():
    path = WUKONG / "configs" / "wukong_tiny.yaml"
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= set(settings.FIELDS)
    chosen = settings.read(finetune.parse(["--config", str(path)]))
    assert chosen.base == WUKONG / "base" and chosen.heldout_folder() == WUKONG / "data" / "heldout"
