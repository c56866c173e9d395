"""Pretraining and the base folder: exact resumption, the standardised latents, files that are refused."""

import json
import sys
from collections import Counter
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import yaml
from mindspore import nn
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "wukong"))

import pretrain  # noqa: E402
from autoencoder import AutoencoderKL  # noqa: E402
from base import BaseError, load_base, load_weights, save_base, save_weights  # noqa: E402
from pretrain_loop import Trainer, TrainingError  # noqa: E402
from text_encoder import TextEncoder  # noqa: E402
from tokenizer import CharTokenizer  # noqa: E402
from training import learning_rates  # noqa: E402
from unet import UNetModel  # noqa: E402
from whole_files import write_atomically  # noqa: E402

DD = {"double_z": True, "z_channels": 8, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 8, "ch_mult": [1, 1],
      "num_res_blocks": 1, "attn_resolutions": [], "groups": 4}
CONFIG = {
    "unet": {"image_size": 4, "in_channels": 8, "out_channels": 8, "model_channels": 32, "attention_resolutions": [1],
             "num_res_blocks": 1, "channel_mult": [1], "num_heads": 2, "context_dim": 8},
    "text_encoder": {"context_length": 6, "vocab_size": 7, "output_dim": 8, "width": 8, "layers": 1, "heads": 2},
    "autoencoder": {"ddconfig": DD, "embed_dim": 8},
    "schedule": {"timesteps": 1000, "linear_start": 0.00085, "linear_end": 0.012},
    "scale_factor": 0.9,
    "vocabulary": "狐狸猫",
}


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture(scope="module")
def weights():
    nets = {"unet": UNetModel(**CONFIG["unet"]), "text_encoder": TextEncoder(**CONFIG["text_encoder"]),
            "autoencoder": AutoencoderKL(**CONFIG["autoencoder"])}
    return {name: {path: p.asnumpy() for path, p in net.parameters_and_names()} for name, net in nets.items()}


def test_a_base_comes_back(weights):
    save_base(Path("base"), CONFIG, weights)
    base = load_base("base")
    for name, net in (("unet", base.unet), ("text_encoder", base.text_encoder), ("autoencoder", base.autoencoder)):
        for path, parameter in net.parameters_and_names():
            assert parameter.dtype == ms.float32
            assert (parameter.asnumpy() == weights[name][path].astype(np.float16).astype(np.float32)).all(), path
    assert base.scale_factor == 0.9 and base.schedule.timesteps == 1000
    assert base.tokenizer("狐狸?") == [2, 4, 5, 1, 3, 0]
    assert sorted(p.name for p in Path("base").iterdir()) == [
        "autoencoder.safetensors", "config.yaml", "text_encoder.safetensors", "unet.safetensors"]


def edit(**changes):
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    Path("base/config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda: Path("base/config.yaml").unlink(), "no base in base: config.yaml is missing"),
        (lambda: Path("base/config.yaml").write_text("{", encoding="utf-8"), "cannot be read"),
        (lambda: edit(vocabulary=None), "must hold the keys"),
        (lambda: edit(scale_factor="1e-1"), "scale_factor must be a number above 0, got '1e-1'"),
        (lambda: edit(vocabulary="狐狐"), "every character stands once"),
        (lambda: edit(unet={**CONFIG["unet"], "widht": 3}), "the part unet does not describe a UNetModel.*widht"),
        (lambda: edit(unet={**CONFIG["unet"], "context_dim": 16}), "has shape"),
        (lambda: Path("base/unet.safetensors").unlink(), "the base is not complete"),
        (lambda: Path("base/unet.safetensors").write_bytes(Path("base/unet.safetensors").read_bytes()[:-50]),
         "cannot be read"),
        (lambda: save_weights({"a": np.zeros(1)}, Path("base/unet.safetensors")), "is missing"),
    ],
)
def test_a_spoilt_base_is_refused(weights, spoil, message):
    save_base(Path("base"), CONFIG, weights)
    spoil()
    with pytest.raises(BaseError, match=message):
        load_base("base")


def test_a_refused_file_sets_nothing(weights):
    net = TextEncoder(**CONFIG["text_encoder"])
    before = [p.asnumpy().copy() for p in net.get_parameters()]
    spoilt = {**weights["text_encoder"], "positional_embedding": np.full((6, 8), np.nan)}
    save_weights(spoilt, Path("t.safetensors"))
    with pytest.raises(BaseError, match="positional_embedding holds NaN or infinity"):
        load_weights(net, Path("t.safetensors"))
    assert all((a == p.asnumpy()).all() for a, p in zip(before, net.get_parameters(), strict=True))


def test_standardised_latents_decode_to_the_same(weights):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (6, 3, 8, 8)).astype(np.float32)
    nets = [AutoencoderKL(**CONFIG["autoencoder"]) for _ in range(2)]
    for net in nets:
        for path, p in net.parameters_and_names():
            p.set_data(ms.Tensor(weights["autoencoder"][path]))
    latents = pretrain.encode(nets[0], images)
    changed = {path: value.copy() for path, value in weights["autoencoder"].items()}
    pretrain.standardise(changed, latents)
    for path, p in nets[1].parameters_and_names():
        p.set_data(ms.Tensor(changed[path]))
    after = pretrain.encode(nets[1], images)
    np.testing.assert_allclose(after.mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(after.std((0, 2, 3)), 1, atol=1e-4)
    decoded = [net.decode(ms.Tensor(z)).asnumpy() for net, z in zip(nets, (latents, after), strict=True)]
    np.testing.assert_allclose(decoded[1], decoded[0], atol=2e-4)


class Line(nn.Cell):
    """Mean square of a dense layer's error."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, x, y):
        error = self.net(x) - y
        return (error * error).mean()


def trainer(folder: Path, steps: int, seed: int = 0) -> Trainer:
    ms.set_seed(1)
    net = nn.Dense(3, 2, weight_init="ones")
    return Trainer({"net": net}, Line(net), folder, learning_rates(0.1, 0.01, 5, 20)[:steps], 0.01, {"seed": seed}, 0.9)


def batch(step: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(step)
    x = rng.standard_normal((4, 3), dtype=np.float32)
    return x, x[:, :2] * 2


def test_a_continued_run_equals_an_unbroken_one():
    whole = trainer(Path("whole"), 20)
    whole.run(batch, 1e9, lambda: None)
    trainer(Path("parts"), 10).run(batch, 1e9, lambda: None)
    part = trainer(Path("parts"), 20)
    assert part.step == 10
    part.run(batch, 1e9, lambda: None)
    for path, parameter in whole.weights.items():
        assert (parameter.asnumpy() == part.weights[path].asnumpy()).all()
        assert (whole.averages[path] == part.averages[path]).all()
    rows = [json.loads(line) for line in Path("whole/log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 20 and rows[-1]["loss"] > 0


def test_a_foreign_state_is_refused():
    trainer(Path("run"), 2).run(batch, 1e9, lambda: None)
    with pytest.raises(TrainingError, match="written with other settings"):
        trainer(Path("run"), 2, seed=1)
    state = Path("run/state.safetensors")
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(TrainingError, match="cannot be read"):
        trainer(Path("run"), 2)


def test_learning_rates():
    rates = learning_rates(1.0, 0.1, 4, 12)
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    assert len(rates) == 12 and rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True) and rates[-1] > 0.1


def test_a_failed_write_leaves_the_old_file():
    Path("f").write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(Path("f"), fail)
    assert Path("f").read_text() == "old" and [p.name for p in Path().iterdir()] == ["f"]


def test_tokenizer():
    tokenizer = CharTokenizer("ab", 4)
    assert tokenizer.vocab_size == 6
    assert tokenizer("") == [2, 3, 0, 0] and tokenizer(" a b b") == [2, 4, 5, 3]
    for vocabulary, length in (("aa", 4), (["a"], 4), ("a", 2)):
        with pytest.raises(ValueError):
            CharTokenizer(vocabulary, length)


@pytest.mark.parametrize("arguments", [["autoencoder"], ["unet", "--out", "b"]])
def test_user_errors_end_with_2(arguments, capsys):
    assert pretrain.main([*arguments, "--data", "nowhere", "--work", "w"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("pretrain.py: error: no data folder nowhere") and said.count("\n") == 1


def test_a_base_loads_below_lora_layers_built_by_hand():
    base = Path(__file__).parents[1] / "examples" / "wukong" / "base"
    plain, adapted = load_base(base), load_base(base, enable_lora=True, lora_rank=4, lora_alpha=4)
    own = dict(adapted.unet.parameters_and_names())
    for path, parameter in plain.unet.parameters_and_names():
        assert np.array_equal(own[path].asnumpy(), parameter.asnumpy()), path


def test_texts_name_the_style_in_many_ways_or_with_a_made_up_word():
    corpus = pretrain.Corpus.__new__(pretrain.Corpus)
    corpus.texts, corpus.characters = ["狐狸，扁平"], list("狐狸扁平，一个的图片")
    corpus.tokenizer = CharTokenizer("".join(corpus.characters), 16)
    characters = dict(enumerate(["", "?", "", "", *corpus.characters]))
    ids = corpus.ids(np.zeros(2000, int), np.random.default_rng(0), dropped=0.2)
    counts = Counter("".join(characters[i] for i in row) for row in ids.tolist())
    written = {"狐狸，扁平": 12, "一个狐狸，扁平": 1, "狐狸的图片，扁平": 1, "扁平的狐狸": 1, "狐狸": 1}
    for text, share in {**{text: 0.8 * count / 19 for text, count in written.items()}, "": 0.2}.items():
        assert abs(counts.pop(text) / 2000 - share) < 0.03, text
    # What is left are made-up words, drawn anew for each text.
    assert abs(sum(counts.values()) / 2000 - 0.8 * 3 / 19) < 0.03 and len(counts) > 50
    assert all(text[:3] == "狐狸，" and len(text) == 5 for text in counts)


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
def test_text_loss_is_the_error_of_the_last_vector(mode):
    ms.set_context(mode=mode)
    encoder, head = TextEncoder(**CONFIG["text_encoder"]), nn.Dense(8, 5)
    ids = np.array([[2, 4, 5, 3, 0, 0], [2, 6, 3, 0, 0, 0]], np.int32)
    latents = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    last = encoder(ms.Tensor(ids)).asnumpy()[:, -1].astype(np.float64)
    expected = ((last @ head.weight.asnumpy().T + head.bias.asnumpy() - latents) ** 2).mean()
    loss = pretrain.TextLoss(encoder, head)(ms.Tensor(ids), ms.Tensor(latents))
    np.testing.assert_allclose(loss.asnumpy(), expected, rtol=1e-5)


def test_the_stages_end_in_a_base_and_go_on_from_one(monkeypatch, capsys):
    for name, value in {"SIZE": 8, "AUTOENCODER": CONFIG["autoencoder"], "UNET": CONFIG["unet"],
                        "TEXT_WIDTH": {"output_dim": 8, "width": 8, "layers": 1, "heads": 2}}.items():
        monkeypatch.setattr(pretrain, name, value)
    Path("data").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(f"data/{i}.png")
    Path("data/captions.csv").write_text("dir,text\n0.png,狐狸，扁平\n1.png,猫，扁平\n", encoding="utf-8")
    common = ["--data", "data", "--work", "work", "--batch", "2", "--steps"]
    monkeypatch.setattr(pretrain, "augment", lambda images, rng: images)
    assert pretrain.main(["unet", *common, "1", "--out", "base"]) == 2
    assert "no file work/autoencoder.safetensors" in capsys.readouterr().err
    assert pretrain.main(["autoencoder", *common, "2"]) == 0
    assert pretrain.main(["text", *common, "3"]) == 0
    assert pretrain.main(["unet", *common, "2", "--out", "base"]) == 0
    base = load_base("base")
    assert set("狐狸猫扁平，一个的图片") == set(base.config["vocabulary"])
    assert pretrain.main(["unet", *common, "1", "--out", "more", "--start", "base", "--rate", "1e-9"]) == 2
    assert "written with other settings" in capsys.readouterr().err
    common[3] = "further"
    Path("further").mkdir()
    for name in ("autoencoder", "text_encoder"):
        Path(f"work/{name}.safetensors").rename(f"further/{name}.safetensors")
    assert pretrain.main(["unet", *common, "1", "--out", "more", "--start", "base", "--rate", "1e-9"]) == 0
    further = dict(load_base("more").unet.parameters_and_names())
    for path, parameter in base.unet.parameters_and_names():
        np.testing.assert_allclose(further[path].asnumpy(), parameter.asnumpy(), atol=1e-6, err_msg=path)
