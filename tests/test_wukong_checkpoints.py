"""Bases of strangers: Stable Diffusion 1.x folders of diffusers, Wukong checkpoints, and the report on them."""

import json
import math
import re
import sys
import zlib
from functools import partial
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from safetensors.numpy import load_file, save_file

WUKONG = Path(__file__).resolve().parent.parent / "examples" / "wukong"
sys.path.insert(0, str(WUKONG))

import load_report  # noqa: E402
import pipeline  # noqa: E402
import settings  # noqa: E402
from base import MODELS, BaseError  # noqa: E402
from bpe import BPETokenizer, byte_letters, words  # noqa: E402
from checkpoint import PREFIXES, load_checkpoint_base  # noqa: E402
from cpu_operators import exact_gelu  # noqa: E402
from diffusers_base import load_diffusers_base, opened, origins_of  # noqa: E402
from diffusers_config import UNET_SIZES, read_config, read_configs, unet_arguments  # noqa: E402
from diffusers_names import unet_origin  # noqa: E402
from loading import MismatchError, Report, fill, match, new  # noqa: E402
from unet import UNetModel  # noqa: E402

from mindpet_lite.formats.files import to_bfloat16, to_bytes  # noqa: E402

PIECES = [*byte_letters(), *(letter + "</w>" for letter in byte_letters()), "ca", "cat</w>", "at</w>",
          "<|startoftext|>", "<|endoftext|>"]
CONFIGS = {
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel", "attention_head_dim": [2, 2], "block_out_channels": [32, 64],
        "cross_attention_dim": 32, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "in_channels": 4,
        "layers_per_block": 1, "out_channels": 4, "sample_size": 8,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "use_linear_projection": False},
    "vae/config.json": {
        "block_out_channels": [32, 64], "down_block_types": ["DownEncoderBlock2D"] * 2, "in_channels": 3,
        "latent_channels": 4, "layers_per_block": 1, "out_channels": 3, "sample_size": 16,
        "up_block_types": ["UpDecoderBlock2D"] * 2, "scaling_factor": 0.25},
    "text_encoder/config.json": {
        "hidden_size": 32, "intermediate_size": 128, "max_position_embeddings": 8, "num_attention_heads": 2,
        "num_hidden_layers": 2, "vocab_size": len(PIECES), "hidden_act": "quick_gelu"},
    "scheduler/scheduler_config.json": {
        "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"},
    "tokenizer/vocab.json": {piece: number for number, piece in enumerate(PIECES)},
    "model_index.json": {"_class_name": "StableDiffusionPipeline"},
}
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    found = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    return found.astype(np.float16)


def resnet(into: int, out: int, emb: int | None = None) -> dict[str, tuple[int, ...]]:
    shapes = {"norm1.weight": (into,), "norm1.bias": (into,), "conv1.weight": (out, into, 3, 3), "conv1.bias": (out,),
              "norm2.weight": (out,), "norm2.bias": (out,), "conv2.weight": (out, out, 3, 3), "conv2.bias": (out,)}
    if emb:
        shapes |= {"time_emb_proj.weight": (out, emb), "time_emb_proj.bias": (out,)}
    if into != out:
        shapes |= {"conv_shortcut.weight": (out, into, 1, 1), "conv_shortcut.bias": (out,)}
    return shapes


def below(prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def layer(*shape: int) -> dict[str, tuple[int, ...]]:
    return {"weight": shape, "bias": shape[:1]}


def vae_shapes() -> dict[str, tuple[int, ...]]:
    """AutoencoderKL of diffusers at the sizes of CONFIGS, written down from its own module tree."""
    found = {**below("quant_conv", layer(8, 8, 1, 1)), **below("post_quant_conv", layer(4, 4, 1, 1))}
    for side, blocks in (("encoder", [[(32, 32)], [(32, 64)]]),
                         ("decoder", [[(64, 64), (64, 64)], [(64, 32), (32, 32)]])):
        way = "down" if side == "encoder" else "up"
        for level, resnets in enumerate(blocks):
            for number, (into, out) in enumerate(resnets):
                found |= below(f"{side}.{way}_blocks.{level}.resnets.{number}", resnet(into, out))
        width = 32 if side == "encoder" else 64
        found |= below(f"{side}.{way}_blocks.0.{way}samplers.0.conv", layer(width, width, 3, 3))
        for number in (0, 1):
            found |= below(f"{side}.mid_block.resnets.{number}", resnet(64, 64))
        found |= below(f"{side}.mid_block.attentions.0.group_norm", layer(64))
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            found |= below(f"{side}.mid_block.attentions.0.{name}", layer(64, 64))
    return found | below("encoder.conv_in", layer(32, 3, 3, 3)) | below("encoder.conv_norm_out", layer(64)) | \
        below("encoder.conv_out", layer(8, 64, 3, 3)) | below("decoder.conv_in", layer(64, 4, 3, 3)) | \
        below("decoder.conv_norm_out", layer(32)) | below("decoder.conv_out", layer(3, 32, 3, 3))


def text_shapes() -> dict[str, tuple[int, ...]]:
    """CLIPTextModel of transformers at the sizes of CONFIGS."""
    found = {"text_model.embeddings.token_embedding.weight": (len(PIECES), 32),
             "text_model.embeddings.position_embedding.weight": (8, 32)}
    for number in (0, 1):
        for name, shape in (("self_attn.q_proj", (32, 32)), ("self_attn.k_proj", (32, 32)),
                            ("self_attn.v_proj", (32, 32)), ("self_attn.out_proj", (32, 32)), ("layer_norm1", (32,)),
                            ("layer_norm2", (32,)), ("mlp.fc1", (128, 32)), ("mlp.fc2", (32, 128))):
            found |= below(f"text_model.encoder.layers.{number}.{name}", layer(*shape))
    return found | below("text_model.final_layer_norm", layer(32))


def unet_shapes() -> dict[str, tuple[int, ...]]:
    """The U-Net has the names of diffusers' own file, which another test holds; here, from our table."""
    arguments = unet_arguments(dict(CONFIGS["unet/config.json"]), Path("config.json"))
    return {unet_origin(path, 1)[0][0]: p.shape for path, p in new(UNetModel, **arguments).parameters_and_names()}


@pytest.fixture(scope="module")
def shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    return {"unet": unet_shapes(), "vae": vae_shapes(), "text_encoder": text_shapes()}


@pytest.fixture
def folder(shapes, tmp_path) -> Path:
    """A whole Stable Diffusion folder, in float16."""
    folder = tmp_path / "sd"
    for name, config in CONFIGS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\nc a\na t</w>\nca t</w>\n", encoding="utf-8")
    for name, file in WEIGHTS.items():
        save_file({key: value(key, shape) for key, shape in shapes[name].items()},
                  folder / name / f"{file}.safetensors")
    positions = {"text_model.embeddings.position_ids": np.arange(8)[None]}
    rewrite(folder / "text_encoder" / "model.safetensors", lambda tensors: {**tensors, **positions})
    return folder


def rewrite(path: Path, change) -> None:
    save_file(change(load_file(path)), path)


def edit(folder: Path, name: str, **changes) -> None:
    config = {**json.loads((folder / name).read_text()), **changes}
    (folder / name).write_text(json.dumps({key: one for key, one in config.items() if one != "absent"}))


def values_of(net) -> dict[str, np.ndarray]:
    return {path: p.asnumpy() for path, p in net.parameters_and_names()}


def read_part(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return value(name, shape).astype(np.float32)


def test_a_unet_of_diffusers_gives_its_numbers(shared, mode):
    """The mapping, proved on a U-Net that diffusers itself made: every name is used, and the outputs are its own."""
    place = shared / "fixtures" / "peft" / "unet_tiny"
    arguments = unet_arguments(*read_config(place / "base" / "config.json", UNET_SIZES))
    assert (arguments["groups"], arguments["num_heads"], arguments["channel_mult"]) == (8, 8, [1, 2])
    net, origin = new(UNetModel, **arguments), partial(unet_origin, num_res_blocks=1)
    with opened(place / "base") as file:
        report = match(net, file, origin, lambda name: True)
        fill(net, file, origin)
    assert (len(report.matched), len(load_file(place / "base" / "diffusion_pytorch_model.safetensors"))) == (208, 208)
    assert not (report.reshaped or report.missing or report.misshapen or report.unexpected)
    numbers = np.load(place / "io.npz")
    inputs = [ms.Tensor(numbers[f"input.{name}"]) for name in ("sample", "timestep", "encoder_hidden_states")]
    np.testing.assert_allclose(net(*inputs).asnumpy(), numbers["output_base"], atol=2e-5, rtol=0)


def test_a_folder_is_read_whole(folder, shapes):
    base = load_diffusers_base(folder)
    prefixed = {f"{name}/{key}" for name, keys in shapes.items() for key in keys}
    report = base.report
    assert sorted(report.matched + report.reshaped) == sorted(prefixed)
    assert not (report.missing or report.misshapen or report.unexpected)
    sides = ("vae/encoder", "vae/decoder")
    assert set(report.reshaped) == {f"{side}.mid_block.attentions.0.{name}.weight" for side in sides
                                    for name in ("to_q", "to_k", "to_v", "to_out.0")}
    vae, text, unet = values_of(base.autoencoder), values_of(base.text_encoder), values_of(base.unet)
    for path, name, shape in (
            ("encoder.down.1.block.0.nin_shortcut.weight", "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
             (64, 32, 1, 1)),
            ("encoder.down.0.downsample.conv.bias", "encoder.down_blocks.0.downsamplers.0.conv.bias", (32,)),
            ("encoder.mid.block_2.norm1.gamma", "encoder.mid_block.resnets.1.norm1.weight", (64,)),
            ("decoder.up.1.block.1.conv1.weight", "decoder.up_blocks.0.resnets.1.conv1.weight", (64, 64, 3, 3)),
            ("decoder.up.1.upsample.conv.bias", "decoder.up_blocks.0.upsamplers.0.conv.bias", (64,)),
            ("decoder.up.0.block.0.norm2.beta", "decoder.up_blocks.1.resnets.0.norm2.bias", (32,)),
            ("decoder.norm_out.gamma", "decoder.conv_norm_out.weight", (32,))):
        np.testing.assert_array_equal(vae[path], read_part(name, shape), err_msg=path)
    np.testing.assert_array_equal(vae["decoder.mid.attn_1.proj_out.weight"][:, :, 0, 0],
                                  read_part("decoder.mid_block.attentions.0.to_out.0.weight", (64, 64)))
    for last, shape in (("weight", (32, 32)), ("bias", (32,))):
        parts = [read_part(f"text_model.encoder.layers.1.self_attn.{one}_proj.{last}", shape) for one in "qkv"]
        np.testing.assert_array_equal(text[f"transformer_layer.resblocks.1.attn.attn.in_proj.{last}"],
                                      np.concatenate(parts))
    np.testing.assert_array_equal(text["embedding_table"],
                                  read_part("text_model.embeddings.token_embedding.weight", (len(PIECES), 32)))
    np.testing.assert_array_equal(unet["output_blocks.1.1.conv.conv.weight"],
                                  read_part("up_blocks.0.upsamplers.0.conv.weight", (64, 64, 3, 3)))
    assert (base.scale_factor, base.schedule.timesteps, base.schedule.linear_end) == (0.25, 1000, 0.012)
    assert pipeline.latent_shape(base, 16) == (4, 8, 8)
    assert not base.unet.training and base.unet.dtype == ms.float32


def test_the_text_encoder_is_clips(folder):
    """Against CLIP's text transformer written out in float64."""
    rewrite(folder / "text_encoder" / "model.safetensors",
            lambda tensors: {name: (one * 0.1).astype(np.float32) if one.dtype == np.float16 else one
                             for name, one in tensors.items()})
    weights = {name.removeprefix("text_model."): one.astype(np.float64)
               for name, one in load_file(folder / "text_encoder" / "model.safetensors").items()}
    ids = np.array([[3, 1, 4, 1, 5, 9, 2, 6]], np.int32)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = weights["embeddings.token_embedding.weight"][ids[0]] + weights["embeddings.position_embedding.weight"]
    for number in (0, 1):
        here = f"encoder.layers.{number}"
        h = norm(x, f"{here}.layer_norm1")
        query, key, one = (dense(h, f"{here}.self_attn.{part}_proj").reshape(8, 2, 16) for part in "qkv")
        scores = np.einsum("qhd,khd->hqk", query, key) / 4 + np.triu(np.full((8, 8), -1e9), 1)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + dense(np.einsum("hqk,khd->qhd", shares, one).reshape(8, 32), f"{here}.self_attn.out_proj")
        h = dense(norm(x, f"{here}.layer_norm2"), f"{here}.mlp.fc1")
        x = x + dense(h / (1 + np.exp(-1.702 * h)), f"{here}.mlp.fc2")
    found = load_diffusers_base(folder).text_encoder(ms.Tensor(ids)).asnumpy()[0]
    np.testing.assert_allclose(found, norm(x, "final_layer_norm"), atol=2e-5)


def test_shards_old_names_and_bfloat16_are_the_same_base(folder, shapes):
    expected = values_of(load_diffusers_base(folder).autoencoder)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = {re.sub(r"to_(q|k|v|out\.0)", lambda found: old[found[0]], name): one
               for name, one in load_file(path).items()}
    path.unlink()
    names = sorted(tensors)
    table = {}
    for number, some in enumerate((names[:40], names[40:]), start=1):
        shard = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, path.parent / shard)
        table |= dict.fromkeys(some, shard)
    index = path.parent / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    base = load_diffusers_base(folder)
    for name, one in values_of(base.autoencoder).items():
        np.testing.assert_array_equal(one, expected[name], err_msg=name)
    assert "vae/decoder.mid_block.attentions.0.query.weight" in base.report.reshaped
    (path.parent / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BaseError, match="names files that are not beside it: .*00002-of-00002"):
        load_diffusers_base(folder)
    index.unlink()
    (path.parent / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    path.write_bytes(to_bytes({name: to_bfloat16(one.astype(np.float32)) for name, one in tensors.items()}))
    for name, one in values_of(load_diffusers_base(folder).autoencoder).items():
        bits = np.ascontiguousarray(expected[name]).view(np.uint32) & np.uint32(0xFFFF0000)
        np.testing.assert_array_equal(one, bits.view(np.float32), err_msg=name)


def test_a_partial_match_is_refused_unless_it_is_named(folder, capsys):
    first, second = "encoder.conv_in.bias", "decoder.conv_in.bias"
    q = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    rewrite(folder / "vae" / "diffusion_pytorch_model.safetensors",
            lambda tensors: {name: one for name, one in tensors.items() if name not in (first, second)})
    rewrite(folder / "text_encoder" / "model.safetensors",
            lambda tensors: {**{name: one for name, one in tensors.items() if name != q}, "extra": np.ones(1)})
    argv = ["--base", str(folder), "--allow-missing"]
    assert load_report.main([*argv, "vae/encoder.*", "text_encoder/extra"]) == 2
    out, err = capsys.readouterr()
    assert err.endswith(f": 2 missing in the file: text_encoder/{q}, vae/{second}\n") and err.count("\n") == 1
    assert "3  missing in the file" in out and f"  vae/{first}\n" in out and "1  unexpected in the file" in out
    assert load_report.main([*argv, "vae/*", f"text_encoder/{q}", "text_encoder/extra", "--all"]) == 0
    assert "\n  unet/conv_in.weight\n" in capsys.readouterr().out
    base = load_diffusers_base(folder, ["vae/*", "text_encoder/*"])
    text = values_of(base.text_encoder)["transformer_layer.resblocks.0.attn.attn.in_proj.weight"]
    np.testing.assert_array_equal(text[32:64], read_part(q.replace("q_proj", "k_proj"), (32, 32)))
    assert np.abs(text[:32]).max() > 0 and np.isfinite(text).all()
    rewrite(folder / "vae" / "diffusion_pytorch_model.safetensors",
            lambda tensors: {**tensors, first: np.ones(7, np.float16)})
    with pytest.raises(MismatchError, match=r"1 of another size: vae/encoder.conv_in.bias \(\(7,\) instead of \(32,\)"):
        load_diffusers_base(folder, ["*"])


@pytest.mark.parametrize(("name", "changes", "words"), [
    ("unet/config.json", {"use_linear_projection": True}, "use_linear_projection must be false, got true"),
    ("unet/config.json", {"attention_head_dim": [2, 4]}, r"attention_head_dim must be one whole number.*\[2, 4\]"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type must be null"),
    ("unet/config.json", {"some_new_part": 3}, "some_new_part=3 is not known here"),
    ("unet/config.json", {"in_channels": 9}, "in_channels=9, but vae/config.json gives latent_channels=4"),
    ("unet/config.json", {"cross_attention_dim": 64}, "cross_attention_dim=64, but .* hidden_size=32"),
    ("unet/config.json", {"block_out_channels": [32, 48]}, "block_out_channels must be multiples"),
    ("unet/config.json", {"up_block_types": ["UpBlock2D"]}, "up_block_types must be .*CrossAttnUpBlock2D"),
    ("unet/config.json", {"layers_per_block": "absent"}, "lacks layers_per_block"),
    ("vae/config.json", {"scaling_factor": 0}, "scaling_factor must be a number above 0"),
    ("vae/config.json", {"use_quant_conv": False}, "use_quant_conv must be true"),
    ("text_encoder/config.json", {"hidden_act": "gelu"}, 'hidden_act must be "quick_gelu", got "gelu"'),
    ("text_encoder/config.json", {"intermediate_size": 64}, "four times hidden_size=32"),
    ("text_encoder/config.json", {"vocab_size": 9}, f"has the id {len(PIECES) - 1}, but .* vocab_size=9"),
    ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, 'prediction_type must be "epsilon"'),
    ("scheduler/scheduler_config.json", {"beta_schedule": "absent"}, 'must be "scaled_linear", got "linear"'),
    ("scheduler/scheduler_config.json", {"beta_end": 2}, "scheduler_config.json: .*linear_end=2"),
])
def test_what_our_models_cannot_be_is_refused(folder, name, changes, words):
    edit(folder, name, **changes)
    with pytest.raises(BaseError, match=words):
        load_diffusers_base(folder)


@pytest.mark.parametrize(("name", "words"), [
    ("unet/config.json", "no file .*unet/config.json"),
    ("vae/diffusion_pytorch_model.safetensors", "no weights in .*vae"),
    ("tokenizer/merges.txt", "tokenizer cannot be used"),
])
def test_a_missing_file_is_named(folder, name, words):
    (folder / name).unlink()
    with pytest.raises(BaseError, match=words):
        load_diffusers_base(folder)


def test_damaged_weights_are_refused(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    rewrite(path, lambda tensors: {**tensors, "conv_in.bias": np.full(32, np.nan, np.float16)})
    with pytest.raises(BaseError, match="conv_in.bias holds NaN or infinity"):
        load_diffusers_base(folder)
    path.write_bytes(whole[:-100])
    with pytest.raises(BaseError, match="the weights in .*unet cannot be read: .*cut short"):
        load_diffusers_base(folder)


def test_settings_choose_the_kind_of_base(folder, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"base: {folder}\nallow_missing: vae/*\n", encoding="utf-8")
    arguments = load_report.parse(["--config", "run.yaml"])
    base = pipeline.load_models(settings.read(arguments))
    assert base.unet.dtype == ms.float32 and base.tokenizer("cat")[1] == PIECES.index("cat</w>")
    assert pipeline.load_models(settings.Settings(base=folder, fp16=True)).unet.dtype == ms.float16
    with pytest.raises(pipeline.UserError, match="leave the model block out"):
        pipeline.load_models(settings.Settings(base=folder, model={}))
    (folder / "model_index.json").unlink()
    with pytest.raises(pipeline.UserError, match="leave allow_missing out"):
        pipeline.load_models(settings.Settings(base=folder, allow_missing=["vae/*"]))
    assert load_report.main(["--base", str(folder)]) == 2
    assert "load_report.py: error: no base in" in capsys.readouterr().err


def test_a_report_shows_ten_names_of_a_kind():
    report = Report(matched=["m"], missing=[f"name{i}" for i in range(12)])
    report.add(Report(reshaped=["x"]), "vae/")
    lines = report.table().splitlines()
    assert lines[:5] == ["     1  matched", "     1  matched in another form", "    12  missing in the file",
                         "     0  of another size", "     0  unexpected in the file"]
    assert lines[5:8] == ["", "matched in another form:", "  vae/x"] and lines[-2:] == ["  name9", "  and 2 more"]
    assert "  m" not in lines and {"  m", "  name11"} <= set(report.table(None).splitlines())
    with pytest.raises(MismatchError, match="12 missing in the file: name0, name1, name2, and 9 more") as caught:
        report.check("x.ckpt", ["vae/*"])
    assert caught.value.report is report
    report.check("x.ckpt", ["name?", "name1?"])


class Gelu(nn.Cell):
    def construct(self, x):
        return exact_gelu(x)


def test_exact_gelu(mode):
    """x Phi(x), and its derivative Phi(x) + x phi(x), by Python's own error function; float16 within its last bits."""
    x = np.linspace(-6, 6, 49)
    share = np.array([0.5 * (1 + math.erf(one / math.sqrt(2))) for one in x])
    value, slope = ms.value_and_grad(Gelu())(ms.Tensor(x, ms.float32))
    np.testing.assert_allclose(value.asnumpy(), x * share, atol=2e-6)
    np.testing.assert_allclose(slope.asnumpy(), share + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi), atol=2e-6)
    np.testing.assert_allclose(exact_gelu(ms.Tensor(x, ms.float16)).asnumpy(), x * share, atol=2e-3, rtol=2e-3)


def test_bpe(folder):
    tokenizer = BPETokenizer(folder / "tokenizer", 8)
    ids = {piece: number for number, piece in enumerate(PIECES)}
    begin, end, cat = ids["<|startoftext|>"], ids["<|endoftext|>"], ids["cat</w>"]
    assert tokenizer("") == [begin, *[end] * 7]
    # "c a" is joined before "a t</w>", so that "cat" is one piece and "at" another.
    assert tokenizer("Cat  at") == [begin, cat, ids["at</w>"], *[end] * 5]
    assert tokenizer("é") == [begin, ids["Ã"], ids["©</w>"], *[end] * 5]
    assert tokenizer("cat " * 9) == [begin, *[cat] * 6, end]
    assert tokenizer.unread("cat " * 7 + "dog") == ([], "cat dog")
    del tokenizer.ids["x</w>"]
    assert tokenizer.unread("x cat x") == (["x"], "") and tokenizer("x")[1] == end
    assert words("It's a b4, 42!? 狐狸²") == ["it", "'s", "a", "b", "4", ",", "4", "2", "!?", "狐狸", "²"]
    assert words("they'll <|endoftext|>'x") == ["they", "'ll", "<|endoftext|>", "'", "x"]
    (folder / "tokenizer" / "merges.txt").write_text("a b c\n")
    with pytest.raises(ValueError, match="two pieces a line"):
        BPETokenizer(folder / "tokenizer", 8)


def test_sizes_of_stable_diffusion_1_5(shared, folder):
    """The real configs: the paths and shapes are those of Wukong's models, which have the same architecture."""
    edit(folder, "unet/config.json", attention_head_dim=8, block_out_channels=[320, 640, 1280, 1280],
         layers_per_block=2, cross_attention_dim=768, sample_size=64,
         down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
         up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    edit(folder, "vae/config.json", block_out_channels=[128, 256, 512, 512], layers_per_block=2, sample_size=512,
         down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor="absent")
    edit(folder, "text_encoder/config.json", hidden_size=768, intermediate_size=3072, max_position_embeddings=77,
         num_attention_heads=12, num_hidden_layers=12, vocab_size=49408)
    config = read_configs(folder)
    assert config["scale_factor"] == 0.18215
    origins = origins_of(config)
    spare = {f"{side}.{last}" for side in ("encoder.down.3.downsample.conv", "decoder.up.0.upsample.conv")
             for last in ("weight", "bias")}
    for name, file, entries in (("unet", "unet", 686), ("text_encoder", "text", 196), ("autoencoder", "vae", 248)):
        net = new(MODELS[name], **config[name])
        expected = json.loads((shared / "fixtures" / "wukong" / f"{file}_full_shapes.json").read_text())
        found = {path: list(p.shape) for path, p in net.parameters_and_names()}
        assert found == {path: shape for path, shape in expected.items() if name != "autoencoder" or path not in spare}
        names = [part[-1] for path in found for part in origins[name](path)]
        assert len(names) == len(set(names)) == entries


def test_a_checkpoint_of_other_sizes_is_refused(folder):
    """The same base under Wukong's paths comes back; where the sizes say fewer layers, the others are unexpected."""
    base, config = load_diffusers_base(folder), read_configs(folder)
    Path("vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n", encoding="utf-8")
    model = {**config, "vocabulary": "vocab.txt"}
    entries = [{"name": PREFIXES[name] + path, "data": ms.Tensor(one.astype(np.float16))}
               for name in MODELS for path, one in values_of(getattr(base, name)).items()]
    ms.save_checkpoint(entries, "w.ckpt")
    loaded = load_checkpoint_base("w.ckpt", model)
    assert loaded.report.matched == [entry["name"] for entry in entries]
    for name in MODELS:
        for path, one in values_of(getattr(loaded, name)).items():
            np.testing.assert_array_equal(one, values_of(getattr(base, name))[path], err_msg=path)
    model["text_encoder"] = {**model["text_encoder"], "layers": 1}
    with pytest.raises(MismatchError, match="12 unexpected in the file: cond_stage_model.*resblocks.1") as caught:
        load_checkpoint_base("w.ckpt", model)
    assert len(caught.value.report.matched) == len(entries) - 12
    assert len(load_checkpoint_base("w.ckpt", model, ["*.resblocks.1.*"]).report.unexpected) == 12
