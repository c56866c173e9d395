"""Wukong's three models against the reference data: paths, shapes, outputs, and what the U-Net's arguments do."""

import json
import sys
import zlib
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops
from mindspore.nn.utils import no_init_parameters

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "wukong"))

import cpu_operators  # noqa: E402
import layers  # noqa: E402
from autoencoder import AutoencoderKL  # noqa: E402
from text_encoder import TextEncoder  # noqa: E402
from unet import UNetModel, timestep_embedding  # noqa: E402

from mindpet_lite.delta import LoRADense  # noqa: E402
from mindpet_lite.graph import freeze_delta  # noqa: E402

FIXTURES = ROOT.parent / "shared" / "fixtures" / "wukong"
MODES = [pytest.param(ms.GRAPH_MODE, id="graph"), pytest.param(ms.PYNATIVE_MODE, id="pynative")]
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no reference data in {FIXTURES}")

UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
        "attention_resolutions": [4, 2, 1], "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4], "num_heads": 8,
        "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 768,
        "use_checkpoint": True, "legacy": False, "use_fp16": True}
TEXT = {"context_length": 77, "vocab_size": 49408, "output_dim": 768, "width": 768, "layers": 12, "heads": 12}
DDCONFIG = {"double_z": True, "z_channels": 4, "resolution": 512, "in_channels": 3, "out_ch": 3, "ch": 128,
            "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
FULL = {"unet": lambda: UNetModel(**UNET), "text": lambda: TextEncoder(**TEXT),
        "vae": lambda: AutoencoderKL(DDCONFIG, embed_dim=4)}
PARAMETERS = {"unet": (686, 859_520_964), "text": (148, 123_060_480), "vae": (252, 86_161_255)}
SMALL = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1, 2],
         "num_res_blocks": 1, "channel_mult": [1, 2], "num_heads": 4, "context_dim": 24}


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def weight(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The reference weights, as the README of the reference data gives them."""
    w = np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape).astype(np.float32)
    if path.endswith("gamma"):
        return 1 + np.float32(0.1) * w
    if len(shape) >= 2:
        return (w / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return (0.1 * w).astype(np.float32)


def set_weights(net: nn.Cell) -> nn.Cell:
    for path, parameter in net.parameters_and_names():
        parameter.set_data(ms.Tensor(weight(path, parameter.shape)))
    return net


def shapes(net: nn.Cell) -> dict[str, list[int]]:
    return {path: list(parameter.shape) for path, parameter in net.parameters_and_names()}


def reference(name: str) -> tuple[dict, dict[str, np.ndarray], dict[str, list[int]]]:
    """Config, arrays and shapes of one of the small models."""
    with np.load(FIXTURES / f"{name}.npz") as data:
        arrays = {key: data[key] for key in data.files}
    return json.loads(str(arrays.pop("config"))), arrays, json.loads((FIXTURES / f"{name}_shapes.json").read_text())


def small_inputs(batch: int = 2) -> tuple[ms.Tensor, ms.Tensor, ms.Tensor]:
    rng = np.random.default_rng(0)
    x, context = rng.standard_normal((batch, 4, 8, 8)), rng.standard_normal((batch, 7, 24))
    return ms.Tensor(x, ms.float32), ms.Tensor([3, 700][:batch], ms.int32), ms.Tensor(context, ms.float32)


def gradients(net: nn.Cell, *inputs: ms.Tensor) -> dict[str, np.ndarray]:
    """d sum(net(inputs)^2) / d parameter, by path."""
    parameters = net.trainable_params()

    def energy(*inputs):
        return (net(*inputs) ** 2).sum()

    values = ms.grad(energy, None, parameters)(*inputs)
    return {parameter.name: value.asnumpy() for parameter, value in zip(parameters, values)}


@needs_fixtures
@pytest.mark.parametrize("name", FULL)
def test_full_size_paths_and_shapes(name):
    with no_init_parameters():  # the names and shapes without 4 GB of values
        net = FULL[name]()
    expected = json.loads((FIXTURES / f"{name}_full_shapes.json").read_text())
    assert shapes(net) == expected
    assert (len(expected), sum(p.size for p in net.get_parameters())) == PARAMETERS[name]
    assert all(path == parameter.name for path, parameter in net.parameters_and_names())


def test_lora_of_rank_4_on_the_full_unet():
    with no_init_parameters():
        net = UNetModel(**UNET, enable_lora=True, lora_rank=4, lora_alpha=4)
    layers = [path for path, cell in net.cells_and_names() if isinstance(cell, LoRADense)]
    assert len(layers) == 128
    assert all(path.endswith(("to_q", "to_k", "to_v", "to_out.0")) for path in layers)
    assert all(path == parameter.name for path, parameter in net.parameters_and_names())
    freeze_delta(net, "lora")
    assert sum(parameter.size for parameter in net.trainable_params()) == 797_184


@needs_fixtures
@pytest.mark.parametrize("mode", MODES)
def test_unet_output(mode):
    ms.set_context(mode=mode)
    config, arrays, expected = reference("unet_tiny_a")
    net = set_weights(UNetModel(**config))
    assert shapes(net) == expected
    y = net(*(ms.Tensor(arrays[key]) for key in ("x", "t", "context")))
    np.testing.assert_allclose(y.asnumpy(), arrays["y"], rtol=0, atol=1e-5)


@needs_fixtures
@pytest.mark.parametrize("mode", MODES)
def test_text_encoder_output(mode):
    ms.set_context(mode=mode)
    config, arrays, expected = reference("text_tiny")
    net = set_weights(TextEncoder(**config))
    assert shapes(net) == expected
    np.testing.assert_allclose(net(ms.Tensor(arrays["ids"])).asnumpy(), arrays["y"], rtol=0, atol=1e-5)


@needs_fixtures
@pytest.mark.parametrize("mode", MODES)
def test_autoencoder_output(mode):
    ms.set_context(mode=mode)
    config, arrays, expected = reference("vae_tiny")
    net = set_weights(AutoencoderKL(**config))
    assert shapes(net) == expected
    moments = net.encode_moments(ms.Tensor(arrays["img"])).asnumpy()
    np.testing.assert_allclose(moments, arrays["moments"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(net.decode(ms.Tensor(arrays["z"])).asnumpy(), arrays["decoded"], rtol=0, atol=1e-5)
    mean, logvar = np.split(moments, 2, axis=1)
    noise = np.random.default_rng(0).standard_normal(mean.shape).astype(np.float32)
    decoded, again = net(ms.Tensor(arrays["img"]), ms.Tensor(noise))
    np.testing.assert_allclose(again.asnumpy(), moments, rtol=0, atol=1e-6)
    np.testing.assert_allclose(decoded.asnumpy(), net.decode(ms.Tensor(mean + np.exp(logvar / 2) * noise)).asnumpy(),
                               rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_autoencoder_with_attention_in_its_levels(mode):
    ms.set_context(mode=mode)
    net = AutoencoderKL({"double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
                         "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8]}, embed_dim=3)
    paths = shapes(net)
    assert "encoder.down.1.attn.0.q.weight" in paths and "decoder.up.1.attn.1.q.weight" in paths
    assert not any(path.startswith(("encoder.down.0.attn", "decoder.up.0.attn")) for path in paths)
    moments = net.encode_moments(ms.Tensor(np.zeros((1, 3, 16, 16), np.float32)))
    assert moments.shape == (1, 6, 8, 8)
    assert net.decode(moments[:, :3]).shape == (1, 3, 16, 16)


def test_a_new_unet_predicts_nothing_yet():
    assert not np.any(UNetModel(**SMALL)(*small_inputs()).asnumpy())


def test_timestep_embedding():
    t = np.array([0, 1, 999])
    angles = t[:, None] * np.exp(-np.log(10000.0) * np.arange(16) / 16)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    got = timestep_embedding(ms.Tensor(t, ms.int32), 32).asnumpy()
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3)  # float32 frequencies, times 999


@pytest.mark.parametrize("mode", MODES)
def test_fp16_agrees_with_fp32(mode):
    ms.set_context(mode=mode)
    inputs = small_inputs()
    full = set_weights(UNetModel(**SMALL))(*inputs)
    half = set_weights(UNetModel(**SMALL, use_fp16=True))(*inputs)
    lora = UNetModel(**SMALL, use_fp16=True, enable_lora=True, lora_rank=2, lora_alpha=2)
    for path, parameter in lora.parameters_and_names():
        if "mindpet_delta" not in path:
            parameter.set_data(ms.Tensor(weight(path, parameter.shape)))
    assert full.dtype == half.dtype == ms.float32
    assert 0 < np.abs(half.asnumpy() - full.asnumpy()).max() < 2e-2
    np.testing.assert_array_equal(lora(*inputs).asnumpy(), half.asnumpy())


def test_checkpointing_gives_the_same_gradients():
    inputs = small_inputs()
    plain = gradients(set_weights(UNetModel(**SMALL)), *inputs)
    recomputed = gradients(set_weights(UNetModel(**SMALL, use_checkpoint=True)), *inputs)
    assert plain.keys() == recomputed.keys() and len(plain) > 200
    for path, value in plain.items():
        assert np.any(value), path
        # A norm takes out what a bias just before it adds to a whole group: its gradient is rounding, up to 2e-6 here.
        np.testing.assert_allclose(recomputed[path], value, rtol=1e-4, atol=1e-4 * np.abs(value).max() + 3e-6,
                                   err_msg=path)


def test_no_dropout_operator_without_dropout():
    inputs = small_inputs()
    net = set_weights(UNetModel(**SMALL)).set_train()
    np.testing.assert_array_equal(net(*inputs).asnumpy(), net(*inputs).asnumpy())
    dropping = set_weights(UNetModel(**SMALL, dropout=0.5)).set_train()
    assert np.any(dropping(*inputs).asnumpy() != net(*inputs).asnumpy())


@pytest.mark.parametrize("wrong, error, words", [
    ({"num_head": 4}, TypeError, "num_head"),
    ({"use_spatial_transformer": False}, ValueError, "use_spatial_transformer=True"),
    ({"legacy": True}, ValueError, "legacy=False"),
    ({"image_size": 9}, ValueError, "multiple of 2"),
    ({"attention_resolutions": [3]}, ValueError, "powers of 2"),
    ({"model_channels": 40}, ValueError, "multiples of 32"),
    ({"num_heads": 5}, ValueError, "num_heads"),
    ({"enable_lora": True}, ValueError, "lora_rank and lora_alpha"),
    ({"lora_rank": 4, "lora_alpha": 4}, ValueError, "enable_lora=True"),
])
def test_unet_refuses(wrong, error, words):
    with pytest.raises(error, match=words):
        UNetModel(**{**SMALL, **wrong})


@pytest.mark.parametrize("wrong, error, words", [
    ({"double_z": False}, ValueError, "double_z=True"),
    ({"attn_resolutions": [100]}, ValueError, "attn_resolutions"),
    ({"channels": 3}, TypeError, "channels"),
])
def test_autoencoder_refuses(wrong, error, words):
    with pytest.raises(error, match=words):
        AutoencoderKL({**DDCONFIG, **wrong}, embed_dim=4)


@pytest.mark.parametrize("wrong, words", [({"output_dim": 512}, "output_dim"), ({"heads": 5}, "multiple of heads")])
def test_text_encoder_refuses(wrong, words):
    with pytest.raises(ValueError, match=words):
        TextEncoder(**{**TEXT, **wrong})


class GroupNorm(nn.Cell):
    def construct(self, x, gamma, beta):
        return ops.group_norm(x, 8, gamma, beta, 1e-5)


class Softmax(nn.Cell):
    def construct(self, x):
        return ops.softmax(x, -1)


class LayerNorm(nn.Cell):
    def __init__(self):
        super().__init__()
        self.norm = ops.LayerNorm(-1, -1, 1e-5)

    def construct(self, x, gamma, beta):
        return self.norm(x, gamma, beta)[0]


class Gelu(nn.Cell):
    def construct(self, x):
        return ops.gelu(x, approximate="tanh")


class GatedGelu(nn.Cell):
    def __init__(self, approximate):
        super().__init__()
        self.approximate = approximate

    def construct(self, x):
        a, b = ops.split(x, 25, axis=-1)
        return a * ops.gelu(b, approximate=self.approximate)


class Attention(nn.Cell):
    def construct(self, query, key, value):
        outputs = ()
        for i in range(0, 12, 4):
            q, k, v = query[..., i:i + 4], key[..., i:i + 4], value[..., i:i + 4]
            outputs = outputs + (ops.matmul(ops.softmax(ops.matmul(q, k.swapaxes(1, 2)) / 2.0, -1), v),)
        return ops.concat(outputs, -1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ours, theirs, shapes_in", [
    (lambda: cpu_operators.GroupNorm(8, 1e-5), GroupNorm, ((3, 32, 5, 7), (32,), (32,))),
    (cpu_operators.Softmax, Softmax, ((2, 3, 5, 6),)),
    (lambda: cpu_operators.LayerNorm(1e-5), LayerNorm, ((3, 5, 24), (24,), (24,))),
    (cpu_operators.Gelu, Gelu, ((3, 50),)),
    (lambda: cpu_operators.GatedGelu(False), lambda: GatedGelu("tanh"), ((3, 50),)),
    (lambda: cpu_operators.GatedGelu(True), lambda: GatedGelu("none"), ((3, 50),)),
    (lambda: cpu_operators.AttendByHead(3), Attention, ((2, 7, 12), (2, 5, 12), (2, 5, 12))),
], ids=["group_norm", "softmax", "layer_norm", "gelu", "gated", "gated_exactly", "attend"])
def test_cpu_operators_are_the_operators_they_stand_for(mode, ours, theirs, shapes_in):
    ms.set_context(mode=mode)
    rng = np.random.default_rng(0)
    # Scores of attention grow with the square of what goes in, and so does their rounding.
    spread = 1 if theirs is Attention else 2
    inputs = [ms.Tensor(spread * (1.5 + rng.standard_normal(shape)), ms.float32) for shape in shapes_in]
    factor = ms.Tensor(rng.standard_normal(theirs()(*inputs).shape), ms.float32)
    for index, (a, b) in enumerate(zip(value_and_gradients(ours(), inputs, factor),
                                       value_and_gradients(theirs(), inputs, factor))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * max(1, np.abs(b).max()), err_msg=str(index))


@pytest.mark.parametrize("mode", MODES)
def test_many_queries_go_head_by_head_with_the_same_numbers(mode, monkeypatch):
    ms.set_context(mode=mode)
    rng = np.random.default_rng(0)
    inputs = [ms.Tensor(rng.standard_normal(shape), ms.float32) for shape in ((2, 8, 12), (2, 5, 12), (2, 5, 12))]
    factor = ms.Tensor(rng.standard_normal((2, 8, 12)), ms.float32)
    whole = value_and_gradients(layers.Attend(3), inputs, factor)
    monkeypatch.setattr(layers.Attend, "MANY", 8)
    for a, b in zip(value_and_gradients(layers.Attend(3), inputs, factor), whole):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
    attend = layers.Attend(3)
    attend.scores = None  # Without it only the heads' way is left.
    np.testing.assert_allclose(attend(*inputs).asnumpy(), whole[0], rtol=1e-5, atol=2e-6)


def test_a_unet_that_recomputes_has_plain_norms_and_gates():
    for recomputes in (False, True):
        cells = [cell for _, cell in UNetModel(**SMALL, use_checkpoint=recomputes).cells_and_names()
                 if hasattr(cell, "written_out")]
        assert {type(cell).__name__ for cell in cells} == {"GroupNorm", "LayerNorm", "GatedGelu"}
        assert all((cell.written_out is None) == recomputes for cell in cells)


def value_and_gradients(cell: nn.Cell, inputs: list[ms.Tensor], factor: ms.Tensor) -> list[np.ndarray]:
    def weighted(*inputs):
        return (cell(*inputs) * factor).sum()

    found = ms.grad(weighted, tuple(range(len(inputs))))(*inputs)
    return [value.asnumpy() for value in (cell(*inputs), *(found if isinstance(found, tuple) else (found,)))]
