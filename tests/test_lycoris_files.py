"""LyCORIS' files of LoHa and LoKr: as kohya names layers and with dotted paths, against LyCORIS' formulas in numpy.

Yeh et al., 2024, https://arxiv.org/abs/2309.14859, section 3.1; the shapes of parts as LyCORIS' modules make them.
"""
from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from adapters import DTYPES, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor, nn
from nets import inputs, unchanged

import mindpet_lite as mp
from mindpet_lite.delta import METHODS
from mindpet_lite.formats import diffusers, kohya, lycoris
from mindpet_lite.formats.adapters import read_adapter
from mindpet_lite.formats.files import to_bytes
from mindpet_lite.graph.adapters import deltas
from mindpet_lite.offline.convert import convert
from mindpet_lite.offline.inspect import inspect

SHAPES = {"attn1.to_q": (32, 24), "ff.0": (20, 32), "conv_in": (16, 8, 3, 3), "proj_in": (8, 16, 1, 1),
          "time": (12, 8, 3)}


class Net(nn.Cell):
    """A layer of each kind, each with an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = nn.Cell()
        self.attn1.to_q = nn.Dense(24, 32)
        self.ff = nn.SequentialCell(nn.Dense(32, 20))
        self.conv_in = nn.Conv2d(8, 16, 3, has_bias=True)
        self.proj_in = nn.Conv2d(16, 8, 1)
        self.time = nn.Conv1d(8, 12, 3)
        rng = np.random.default_rng(7)
        for item in self.get_parameters():
            item.set_data(Tensor(rng.standard_normal(item.shape).astype(np.float32)))

    def construct(self, x, image, row):
        image = self.conv_in(image)
        return self.ff(self.attn1.to_q(x)), self.proj_in(image), self.time(row)


INPUTS = inputs(3, 24), inputs(2, 8, 6, 5), inputs(2, 8, 7)


def cut(dimension, factor):
    """Return the two sizes of LyCORIS' rule."""
    if factor > 0 and dimension % factor == 0:
        return tuple(sorted((factor, dimension // factor)))
    pairs = [(number, dimension // number) for number in range(1, dimension + 1) if dimension % number == 0]
    return max(pair for pair in pairs if pair[0] <= pair[1] and (factor < 0 or pair[0] <= factor))


def loha_parts(shape, rng, dim, tucker):
    outputs, into, *kernel = shape
    core = tucker and any(size != 1 for size in kernel)
    a, b = ((dim, outputs), (dim, into)) if core else ((outputs, dim), (dim, into * math.prod(kernel)))
    shapes = {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b,
              **({name: (dim, dim, *kernel) for name in ("t1", "t2")} if core else {})}
    return {f"hada_{name}": rng.standard_normal(size).astype(np.float32) for name, size in shapes.items()}


def lokr_parts(shape, rng, dim, tucker, factor=-1, both=False, full=False):
    outputs, into, *kernel = shape
    (first, inner), (second, size) = cut(outputs, factor), cut(into, factor)
    core = tucker and any(length != 1 for length in kernel)
    shapes = {"w1_a": (first, dim), "w1_b": (dim, second)} if both and dim < max(first, second) / 2 and not full \
        else {"w1": (first, second)}
    if full or dim >= max(inner, size) / 2:
        shapes |= {"w2": (inner, size, *kernel)}
    elif core:
        shapes |= {"w2_a": (dim, inner), "w2_b": (dim, size), "t2": (dim, dim, *kernel)}
    else:
        shapes |= {"w2_a": (inner, dim), "w2_b": (dim, size * math.prod(kernel))}
    return {f"lokr_{name}": rng.standard_normal(size).astype(np.float32) for name, size in shapes.items()}


def change(parts, shape, dim, alpha):
    """Return LyCORIS' ΔW in float64; `alpha` is None where the file has none."""
    p = {name.partition("_")[2]: value.astype(np.float64) for name, value in parts.items()}
    scale = (alpha or dim) / dim
    if "hada_w1_a" in parts:
        if "t1" in p:
            one, two = (np.einsum("ij...,jr,ip->pr...", p[f"t{n}"], p[f"w{n}_b"], p[f"w{n}_a"]) for n in (1, 2))
        else:
            one, two = p["w1_a"] @ p["w1_b"], p["w2_a"] @ p["w2_b"]
        return (one * two * scale).reshape(shape)
    if "w1" in p and "w2" in p:
        scale = 1
    first = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
    second = np.einsum("ij...,ip,jr->pr...", p["t2"], p["w2_a"], p["w2_b"]) if "t2" in p else \
        p["w2"] if "w2" in p else p["w2_a"] @ p["w2_b"]
    second = second.reshape(len(second), -1, *shape[2:])
    found = np.zeros(shape)
    for (i, j), value in np.ndenumerate(first):
        rows, columns = second.shape[:2]
        found[i * rows:(i + 1) * rows, j * columns:(j + 1) * columns] = value * second
    return found * scale


# What made the parts, and its arguments.
MADE = {"loha": (loha_parts, 3, {"tucker": False}), "loha, tucker": (loha_parts, 2, {"tucker": True}),
        "lokr": (lokr_parts, 2, {"tucker": False}), "lokr, tucker": (lokr_parts, 2, {"tucker": True, "factor": 2}),
        "lokr, factor 4": (lokr_parts, 1, {"tucker": False, "factor": 4}),
        "lokr, factor 3": (lokr_parts, 1, {"tucker": True, "factor": 3}),
        "lokr, both": (lokr_parts, 1, {"tucker": False, "both": True, "factor": 4}),
        "lokr, full": (lokr_parts, 10000, {"tucker": False, "full": True, "factor": 4})}
ALPHAS = {"none": None, "zero": 0.0, "given": 1.5}


def made(kind, alpha="given"):
    """Return the parts by path, and the change of each layer's weight."""
    maker, dim, arguments = MADE[kind]
    rng = np.random.default_rng(0)
    parts = {path: maker(shape, rng, dim, **arguments) for path, shape in SHAPES.items()}
    changes = {path: change(own, SHAPES[path], dim, ALPHAS[alpha]) for path, own in parts.items()}
    if ALPHAS[alpha] is not None:
        parts = {path: {**own, "alpha": np.asarray(ALPHAS[alpha], np.float32)} for path, own in parts.items()}
    return parts, changes


def named(parts, layout):
    """Return the tensors by a file's keys."""
    heads = {"kohya": lambda path: f"lora_unet_{path.replace('.', '_')}",
             "lycoris": lambda path: f"lycoris_{path.replace('.', '_')}",
             "unet.": "unet.{}".format, "dotted": "{}".format, "comfy": "diffusion_model.{}".format}
    return {f"{heads[layout](path)}.{part}": value for path, own in parts.items() for part, value in own.items()}


def write(parts, layout="kohya", **metadata):
    Path("file.safetensors").write_bytes(to_bytes(named(parts, layout), metadata))
    return Path("file.safetensors")


def expected(changes):
    """Return the net with the changes in its weights."""
    net = Net()
    for path, value in changes.items():
        layer = dict(net.cells_and_names())[path]
        weight = layer.weight.asnumpy()
        layer.weight.set_data(Tensor((weight + value.reshape(weight.shape)).astype(np.float32)))
    return net


def outputs(net):
    return [item.asnumpy() for item in net(*INPUTS)]


def close(ours, theirs):
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("kind", MADE)
def test_a_file_is_what_lycoris_computes(kind, mode):
    parts, changes = made(kind)
    net = mp.load_adapter(Net(), write(parts))
    wanted = expected(changes)
    assert {delta.method for delta in deltas(net).values()} == {kind[:4]} and set(deltas(net)) == set(SHAPES)
    found = outputs(net)
    close(found, outputs(wanted))
    mp.save_adapter(net, "peft")
    again = mp.load_adapter(Net(), "peft")
    for one, other in zip(outputs(again), found):
        assert np.array_equal(one, other)
    assert inspect(Path("peft"), None, METHODS)
    mp.merge(net)
    close(outputs(net), outputs(wanted))
    for path, value in changes.items():
        layers = [dict(item.cells_and_names())[path].weight.asnumpy() for item in (net, wanted)]
        np.testing.assert_allclose(*layers, rtol=1e-5, atol=1e-5 * np.abs(value).max())


@pytest.mark.parametrize(("kind", "alpha"), [*itertools.product(["loha", "lokr", "lokr, full"], ALPHAS)])
def test_alphas(kind, alpha):
    parts, changes = made(kind, alpha)
    state = kohya.decode(named(parts, "kohya"), {}, SHAPES)
    for path, layer in state.layers.items():
        method = METHODS[state.method].layer
        own = {name: value.astype(np.float64) for name, value in layer.tensors.items()}
        np.testing.assert_allclose(method.delta(own, layer.settings, SHAPES[path]), changes[path], rtol=1e-12)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("layout", ["lycoris", "unet.", "dotted", "comfy"])
def test_every_layout_is_the_same_adapter(kind, layout):
    parts, _ = made(kind)
    first = kohya.decode(named(parts, "kohya"), {}, SHAPES)
    found = read_adapter(write(parts, layout), None, METHODS, SHAPES).state
    assert found.method == first.method == kind[:4]
    assert {path: layer.settings for path, layer in found.layers.items()} == {
        path: layer.settings for path, layer in first.layers.items()}
    for path, layer in found.layers.items():
        assert {name: value.tobytes() for name, value in layer.tensors.items()} == {
            name: value.tobytes() for name, value in first.layers[path].tensors.items()}


@pytest.mark.parametrize("kind", MADE)
def test_conversion_to_peft(kind):
    parts, changes = made(kind)
    done = convert(write(parts, "dotted"), Path("peft"), "peft", methods=METHODS)
    assert done.kind == "diffusers" and done.layers == len(SHAPES)
    state = read_adapter(Path("peft"), None, METHODS).state
    config = state.config
    assert config["peft_type"] == kind[:4].upper()
    assert config["use_effective_conv2d"] == ("tucker" in kind or kind == "lokr, factor 3")
    if kind.startswith("lokr"):
        # 4 cuts these sizes as -1 does, which comes first.
        assert config["decompose_factor"] == {4: -1}.get(factor := MADE[kind][2].get("factor", -1), factor)
        assert config["decompose_both"] == MADE[kind][2].get("both", False)
    for path, layer in state.layers.items():
        own = {name: value.astype(np.float64) for name, value in layer.tensors.items()}
        np.testing.assert_allclose(METHODS[state.method].layer.delta(own, layer.settings, SHAPES[path]), changes[path],
                                   rtol=1e-12, atol=1e-12)


def test_ranks_that_differ_and_several_methods_in_one_file(mode):
    rng = np.random.default_rng(0)
    parts = {"attn1.to_q": loha_parts(SHAPES["attn1.to_q"], rng, 2, False),
             "ff.0": loha_parts(SHAPES["ff.0"], rng, 3, False)}
    changes = {path: change(own, SHAPES[path], own["hada_w1_b"].shape[0], None) for path, own in parts.items()}
    net = mp.load_adapter(Net(), write(parts))
    close(outputs(net), outputs(expected(changes)))
    convert(write(parts, "dotted"), Path("peft"), "peft", methods=METHODS)
    parts["conv_in"] = lokr_parts(SHAPES["conv_in"], rng, 1, False)
    changes["conv_in"] = change(parts["conv_in"], SHAPES["conv_in"], 1, None)
    lora = {"lora_down.weight": inputs(2, 16, 1, 1).asnumpy(), "lora_up.weight": inputs(8, 2, 1, 1).asnumpy(),
            "alpha": np.float32(1)}
    changes["proj_in"] = 0.5 * np.einsum("or,ri->oi", lora["lora_up.weight"][..., 0, 0],
                                         lora["lora_down.weight"][..., 0, 0])
    net = mp.load_adapter(Net(), write({**parts, "proj_in": lora}))
    close(outputs(net), outputs(expected(changes)))
    mp.save_adapter(net, "several")
    for one, other in zip(outputs(mp.load_adapter(Net(), "several")), outputs(net)):
        assert np.array_equal(one, other)


def test_half_precision_and_lycoris_scalar():
    parts, _ = made("loha")
    half = {path: {part: value.astype(np.float16) for part, value in own.items()} for path, own in parts.items()}
    state = kohya.decode(named(half, "kohya"), {}, SHAPES)
    assert state.layers["ff.0"].tensors["mindpet_delta_loha_w1_a"].dtype == np.float16
    scalar = {path: {**own, "scalar": np.float32(2)} for path, own in parts.items()}
    assert kohya.decode(named(scalar, "kohya"), {}, SHAPES).layers["ff.0"].settings["alpha"] == 3.0
    parts, _ = made("lokr, full")
    scalar = {path: {**own, "scalar": np.float32(2)} for path, own in parts.items()}
    found = kohya.decode(named(scalar, "kohya"), {}, SHAPES).layers["ff.0"].settings
    assert found["alpha"] == 2 * found["r"]


def test_metadata_that_say_another_alpha_are_named():
    with pytest.warns(UserWarning, match="ss_network_alpha='7'.* not used"):
        read_adapter(write(made("loha", "none")[0], ss_network_alpha="7"), None, METHODS, SHAPES)
    with pytest.warns(UserWarning, match="ss_network_alpha='7'.* not used"):
        read_adapter(write(made("lokr")[0], ss_network_alpha="7"), None, METHODS, SHAPES)


def unbalanced():
    rng = np.random.default_rng(0)
    return {"lokr_w1": rng.standard_normal((8, 4)), "lokr_w2": rng.standard_normal((4, 6))}


LOHA = loha_parts((4, 6), np.random.default_rng(0), 2, False)
LOKR = lokr_parts((64, 36), np.random.default_rng(0), 2, False)
BAD = [
    ({**LOHA, "dora_scale": np.ones((1, 6))}, "x: dora_scale beside LoHa .weight_decompose. cannot be read"),
    ({**LOKR, "dora_scale": np.ones((1, 6))}, "x: dora_scale beside LoKr"),
    ({**LOHA, "scalar": np.float32(-1)}, "LyCORIS' scalar must be one positive number"),
    ({**LOHA, "alpha": np.float32(-1)}, "alpha must be one positive number"),
    ({**LOHA, "hada_t1": np.ones((2, 2, 3))}, "x lacks hada_t2"),
    ({**LOHA, "hada_w2_b": np.ones((3, 6))}, "do not belong together"),
    ({**LOHA, "hada_w2_a": np.ones(4)}, "x.hada_w2_a of type F64 and shape .4,. is no factor"),
    ({**LOHA, "hada_w2_a": np.ones((4, 2), np.int32)}, "x.hada_w2_a of type I32"),
    ({**LOHA, **LOKR}, "x has parts of several methods"),
    ({**LOHA, "oft_blocks": np.ones((2, 2))}, "oft_blocks is OFT"),
    ({"lokr_w1": LOKR["lokr_w1"]}, "x has lokr_w1: expected"),
    ({**LOKR, "lokr_w2": np.ones((8, 6))}, "x has lokr_w1, lokr_w2, lokr_w2_a, lokr_w2_b: expected"),
    ({**LOKR, "lokr_w2_b": np.ones((3, 6))}, "do not belong together"),
    ({**LOKR, "lokr_w1": np.ones((2, 2, 2))}, "do not belong together"),
    (unbalanced(), "are those of no LoKr with PEFT's settings .*unbalanced_factorization"),
    ({**LOHA, "diff_b": np.ones(4)}, "diff_b is a difference of a bias"),
]


@pytest.mark.parametrize(("parts", "message"), BAD, ids=[message[:40] for _, message in BAD])
@pytest.mark.parametrize("layout", ["kohya", "unet."])
def test_what_cannot_be_read(parts, message, layout):
    decode = (lambda found: kohya.decode(found, {}, ["x"])) if layout == "kohya" else (
        lambda found: diffusers.decode(found, {}))
    with pytest.raises(ValueError, match=message):
        decode(named({"x": parts}, layout))


SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 4]), max_size=4).map(tuple)
ANY = st.dictionaries(st.sampled_from([*lycoris.PARTS, *lycoris.BESIDE]), st.builds(
    tensor, SIZES, st.sampled_from([*DTYPES, np.dtype(np.int64), np.dtype(bool)])), min_size=1, max_size=7)


@settings(max_examples=300, deadline=None)
@given(ANY, ANY)
def test_whatever_the_parts_are_they_are_a_layer_or_a_sentence(one, other):
    parts = {path: own for path, own in (("one", one), ("other", other)) if lycoris.is_of_lycoris(own)}
    problems = []
    found = lycoris.read_layers(parts, problems)
    assert all(problem.strip() for problem in problems) and len(found) + len(problems) >= len(parts)
    for layer in found.values():
        METHODS[layer.method](**layer.settings)


def test_what_stands_beside_in_dotted_files():
    for more, metadata, message in (
            ({"unet.y.alpha": np.float32(1)}, {}, "y.alpha belongs to no layer"),
            ({"unet.y.lora_down.weight": LOHA["hada_w1_a"]}, {}, "y.lora_down.weight cannot be read beside LoHa"),
            ({"x.hada_w1_a": LOHA["hada_w1_a"]}, {}, "stands twice in the file"),
            ({"lora_unet_y.hada_w1_a": LOHA["hada_w1_a"]}, {}, "is one of kohya's keys"),
            ({}, {"lora_adapter_metadata": "{}"}, "a config of LoRA")):
        with pytest.raises(ValueError, match=message):
            diffusers.decode({**named({"x": LOHA}, "unet."), **more}, metadata)


def test_a_file_that_does_not_fit_changes_nothing():
    net = Net()
    with unchanged(net), pytest.raises(ValueError, match="misshapen: ff.0"):
        mp.load_adapter(net, write({"ff.0": loha_parts((20, 30), np.random.default_rng(0), 2, False)}))
