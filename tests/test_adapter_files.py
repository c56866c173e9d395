"""save_adapter and load_adapter: PEFT's layout, round trips, all or nothing, atomic writes; MindPet's checkpoints."""
from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from nets import Attention, config, inputs, load_values, randomise, unchanged
from safetensors.numpy import load_file, save_file

import mindpet_lite as mp
from mindpet_lite.delta import LoRADense
from mindpet_lite.formats.adapters import read_adapter, to_files, write_files
from mindpet_lite.formats.files import BF16
from mindpet_lite.formats.state import LayerState
from mindpet_lite.formats.values import in_type

TARGETS = ["to_q", "to_out.0", "blocks.1.0"]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def adapted(targets=TARGETS, **fields) -> Attention:
    net = mp.get_pet_model(Attention(), config(targets, **fields))
    randomise(net)
    return net


def fresh_like(net: nn.Cell) -> Attention:
    other = Attention()
    load_values(other, net)
    return other


def edit_config(directory: str, **fields) -> None:
    path = Path(directory, CONFIG)
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(directory: str, change) -> None:
    tensors = load_file(Path(directory, TENSORS))
    change(tensors)
    save_file(tensors, Path(directory, TENSORS))


# Layout

def test_pefts_layout_and_keys():
    net = adapted()
    assert mp.save_adapter(net, "a/b/adapter") == Path("a/b/adapter")
    assert sorted(os.listdir("a/b/adapter")) == [CONFIG, TENSORS]
    tensors = load_file(f"a/b/adapter/{TENSORS}")
    assert {name: (value.shape, value.dtype) for name, value in tensors.items()} == {
        f"base_model.model.{path}.lora_{factor}.weight": (shape, np.float32)
        for path in TARGETS for factor, shape in (("A", (2, 6)), ("B", (6, 2)))}
    assert np.array_equal(tensors["base_model.model.to_q.lora_A.weight"], net.to_q.mindpet_delta_lora_a.asnumpy())
    assert np.array_equal(tensors["base_model.model.to_q.lora_B.weight"], net.to_q.mindpet_delta_lora_b.asnumpy())
    text = json.loads(Path("a/b/adapter", CONFIG).read_text(encoding="utf-8"))
    wanted = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "lora_dropout": 0.0, "bias": "none",
              "fan_in_fan_out": False, "target_modules": sorted(TARGETS), "rank_pattern": {}, "alpha_pattern": {}}
    assert {name: text[name] for name in wanted} == wanted


def test_files_can_be_read_by_others():
    mp.save_adapter(adapted(), "adapter")
    mask = os.umask(0)
    os.umask(mask)
    for name in (CONFIG, TENSORS):
        assert Path("adapter", name).stat().st_mode & 0o777 == 0o666 & ~mask


# Round trips

def test_round_trip_into_a_plain_and_an_adapted_net(mode):
    net = adapted()
    before = net(inputs(5, 6)).asnumpy()
    mp.save_adapter(net, "adapter")
    plain = fresh_like(net)
    called = plain(inputs(5, 6)).asnumpy()
    assert not np.allclose(called, before)
    assert mp.load_adapter(plain, "adapter") is plain
    assert np.array_equal(plain(inputs(5, 6)).asnumpy(), before)
    other = mp.get_pet_model(fresh_like(net), config(TARGETS, lora_alpha=100))
    mp.load_adapter(other, Path("adapter"))
    assert np.array_equal(other(inputs(5, 6)).asnumpy(), before) and other.to_q.lora_alpha == 3
    mp.save_adapter(plain, "again")
    for name in (CONFIG, TENSORS):
        assert Path("adapter", name).read_bytes() == Path("again", name).read_bytes()


def test_what_trains_after_loading_is_the_adapter():
    first = adapted()
    mp.save_adapter(first, "adapter")
    frozen = adapted()
    mp.freeze_modules(frozen, include=["*"])
    for net in (Attention(), frozen):
        mp.load_adapter(net, "adapter")
        assert [item.name for item in net.trainable_params()] == [item.name for item in first.trainable_params()]
    net = Attention()
    with unchanged(net), pytest.raises(ValueError, match="trainable must be one of 'adapter', 'keep', but got 'kept'"):
        mp.load_adapter(net, "adapter", trainable="kept")


def test_what_trains_stays_what_trains_where_that_is_asked_for():
    mp.save_adapter(adapted(), "adapter")
    net = Attention()
    mp.load_adapter(net, "adapter", trainable="keep")
    assert net.to_q.weight.requires_grad and net.to_q.mindpet_delta_lora_a.requires_grad
    frozen = adapted()
    mp.freeze_modules(frozen, include=["*"])
    mp.load_adapter(frozen, "adapter", trainable="keep")
    assert not frozen.trainable_params()


@pytest.mark.parametrize("kind, name", [("peft", "adapter"), ("diffusers", "a.safetensors"), ("kohya", "a.safetensors"),
                                        ("mindpet", "a.ckpt"), ("mindformers", "adapter")])
@pytest.mark.parametrize("delta_type", [ms.float16, ms.bfloat16], ids=str)
def test_a_half_precision_file_trains_in_float32_and_is_saved_as_it_was(kind, name, delta_type, pynative_mode):
    net = mp.get_pet_model(Attention(), config(TARGETS))
    randomise(net)
    for item in net.trainable_params():
        item.set_data(item.astype(delta_type).astype(ms.float32))
    mp.save_adapter(net, "whole", kind) if kind in ("peft", "mindformers") else mp.save_adapter(net, "w" + name, kind)
    state = read_adapter(Path("whole" if kind in ("peft", "mindformers") else "w" + name)).state
    narrow = {ms.float16: np.dtype(np.float16), ms.bfloat16: BF16}[delta_type]
    layers = {path: LayerState({own: in_type(value, narrow) for own, value in layer.tensors.items()}, layer.settings)
              for path, layer in state.layers.items()}
    write_files(to_files(dataclasses.replace(state, layers=layers), kind, Path(name)))
    fresh = fresh_like(net)
    mp.load_adapter(fresh, name)
    assert {item.dtype for item in fresh.trainable_params()} == {ms.float32}
    again = "again" + Path(name).suffix
    mp.save_adapter(fresh, again, kind)
    pairs = [(Path(name), Path(again))] if Path(name).is_file() else [(Path(name, CONFIG), Path(again, CONFIG)),
                                                                      (Path(name, TENSORS), Path(again, TENSORS))]
    for before, after in pairs:
        assert before.read_bytes() == after.read_bytes()
    fresh.to_q.mindpet_delta_lora_a.set_data(fresh.to_q.mindpet_delta_lora_a + 1e-4)
    mp.save_adapter(fresh, again, kind)
    stored = read_adapter(Path(again)).state.layers["to_q"].tensors
    assert {item.dtype for item in stored.values()} == {np.dtype(np.float32), narrow}


def test_a_half_precision_file_on_a_half_precision_layer(pynative_mode):
    net = mp.get_pet_model(Attention(), config(["to_q"], param_init_type=ms.float16))
    mp.save_adapter(net, "adapter")
    other = Attention()
    other.to_q.weight.set_dtype(ms.float16)
    mp.load_adapter(other, "adapter")
    assert {item.dtype for item in other.to_q.delta_parameters().values()} == {ms.float16}


def test_an_adapter_of_two_methods(pynative_mode):
    def base():
        net = Attention().set_train(False)
        for number, item in enumerate(net.get_parameters()):
            item.set_data(Tensor(np.random.default_rng(number).standard_normal(item.shape).astype(np.float32) / 3))
        return net

    net = mp.get_pet_model(base(), config(["to_q"], modules_to_save=["norm"]))
    mp.get_pet_model(net, mp.AdapterConfig(bottleneck_size=2, target_modules=["to_k", "blocks.0"]))
    randomise(net)
    net.norm.gamma.set_data(Tensor(np.full(6, 2, np.float32)))
    plain, wanted = base()(inputs(5, 6)).asnumpy(), net(inputs(5, 6)).asnumpy()
    mp.save_adapter(net, "adapter")
    mp.save_adapter(net, "both.ckpt", "mindpet")
    for name in ("adapter", "both.ckpt"):
        fresh = base()
        mp.load_adapter(fresh, name)
        assert np.array_equal(fresh(inputs(5, 6)).asnumpy(), wanted)
        assert {item.name for item in fresh.trainable_params()} == {item.name for item in net.trainable_params()}
        with mp.adapters_disabled(fresh):
            assert np.array_equal(fresh(inputs(5, 6)).asnumpy(), plain)
    with pytest.raises(ValueError, match="kohya's files hold LoRA only, but this adapter is of method 'adapter.lora'"):
        mp.save_adapter(net, "both.safetensors", "kohya")
    for kind, method in (("adapter+lora", "x"), ("x", "x"), ("adapter", "lora")):
        stored = json.loads(Path("adapter", CONFIG).read_text())
        stored["pet_type"] = kind
        for layer in stored["layers"].values():
            layer["method"] = method
        shutil.copytree("adapter", "strange", dirs_exist_ok=True)
        Path("strange", CONFIG).write_text(json.dumps(stored))
        with pytest.raises(ValueError, match="needs 'settings' and 'tensors'|of method 'x', which is none of"):
            mp.load_adapter(base(), "strange")


@pytest.mark.parametrize("delta_type", [ms.float16, ms.bfloat16], ids=str)
def test_half_precision_deltas(delta_type, pynative_mode):
    net = mp.get_pet_model(Attention(), config(["to_q"], param_init_type=delta_type))
    mp.save_adapter(net, "adapter")
    other = mp.get_pet_model(Attention(), config(["to_q"], param_init_type=delta_type))
    mp.load_adapter(other, "adapter")
    for ours, theirs in zip(other.to_q.delta_parameters().values(), net.to_q.delta_parameters().values()):
        assert ours.dtype == delta_type
        assert np.array_equal(ours.astype(ms.float32).asnumpy(), theirs.astype(ms.float32).asnumpy())


def test_ranks_and_alphas_by_layer(mode):
    net = Attention()
    mp.get_pet_model(net, config(["to_q", "blocks.0"]))
    mp.get_pet_model(net, config(["to_k", "blocks.1.0"], lora_rank=3, lora_alpha=7.5))
    mp.get_pet_model(net, config(["to_out.0"], lora_rank=2, lora_alpha=12))
    randomise(net)
    mp.save_adapter(net, "adapter")
    other = mp.load_adapter(fresh_like(net), "adapter")
    assert np.array_equal(other(inputs(5, 6)).asnumpy(), net(inputs(5, 6)).asnumpy())
    assert (other.to_k.lora_rank, other.to_k.lora_alpha, other.to_out[0].lora_alpha) == (3, 7.5, 12)


def test_a_pattern_means_one_layer_where_a_path_ends_like_another():
    class Inner(nn.Cell):
        def __init__(self):
            super().__init__()
            self.q = nn.Dense(6, 6)
            self.inner = nn.SequentialCell(nn.SequentialCell(nn.Dense(6, 6)))
            self.inner[0].insert_child_to_cell("q", nn.Dense(6, 6))

    net = Inner()
    mp.get_pet_model(net, config(["inner.0.q", "inner.0.0"]))
    mp.get_pet_model(net, mp.LoraConfig(lora_rank=3, lora_alpha=9, target_modules="q"))
    mp.save_adapter(net, "adapter")
    other = mp.load_adapter(Inner(), "adapter")
    assert (other.q.lora_rank, other.q.lora_alpha) == (3, 9)
    assert (other.inner[0].q.lora_rank, other.inner[0].q.lora_alpha) == (2, 3)


def test_a_running_scale_is_not_written():
    net = adapted()
    mp.save_adapter(net, "one")
    mp.set_lora_scale(net, 0.5)
    with mp.adapters_disabled(net):
        mp.save_adapter(net, "two")
    assert Path("one", CONFIG).read_bytes() == Path("two", CONFIG).read_bytes()


def test_loading_keeps_the_running_scale_and_the_switch(pynative_mode):
    net = adapted()
    base = fresh_like(net)(inputs(5, 6)).asnumpy()
    mp.save_adapter(net, "adapter")
    mp.set_lora_scale(net, 0.5)
    half = net(inputs(5, 6)).asnumpy()
    with mp.adapters_disabled(net):
        mp.load_adapter(net, "adapter")
        assert np.array_equal(net(inputs(5, 6)).asnumpy(), base)
    assert np.array_equal(net(inputs(5, 6)).asnumpy(), half)


def test_a_shared_layer_is_written_once_and_read():
    class Shared(nn.Cell):
        def __init__(self):
            super().__init__()
            self.first = nn.Dense(6, 6)
            self.second = self.first

    net = mp.get_pet_model(Shared(), config(["second"]))
    randomise(net)
    mp.save_adapter(net, "adapter")
    assert len(load_file(f"adapter/{TENSORS}")) == 2
    for other in (Shared(), mp.get_pet_model(Shared(), config(["first"]))):
        mp.load_adapter(other, "adapter")
        assert other.first is other.second
        assert np.array_equal(other.first.mindpet_delta_lora_b.asnumpy(), net.first.mindpet_delta_lora_b.asnumpy())


# PEFT's own files

@pytest.mark.parametrize("name", ["lora_plain", "lora_rank_alpha_pattern"])
def test_pefts_files_load_and_merge_to_its_weights(name, shared):
    folder = shared / "fixtures/peft/llama_tiny"
    base, merged = load_file(folder / "base/model.safetensors"), np.load(folder / name / "io.npz")
    state = read_adapter(folder / name).state
    checked = 0
    for path, layer in state.layers.items():
        if f"merged_weight.{path}.weight" in merged.files:
            settings = layer.settings
            update = layer.tensors["mindpet_delta_lora_b"].astype(np.float64) @ layer.tensors["mindpet_delta_lora_a"]
            np.testing.assert_allclose(
                base[f"{path}.weight"] + settings["lora_alpha"] / settings["lora_rank"] * update,
                merged[f"merged_weight.{path}.weight"], rtol=1e-5, atol=1e-6)
            checked += 1
    assert checked


def test_a_peft_file_loads_into_a_net_of_the_same_paths(shared):
    folder = shared / "fixtures/peft/llama_tiny"
    base, merged = load_file(folder / "base/model.safetensors"), np.load(folder / "lora_plain/io.npz")

    def tree(paths: list[list[str]], values) -> nn.Cell:
        cell = nn.Cell()
        for first in dict.fromkeys(path[0] for path in paths):
            below = [path[1:] for path in paths if path[0] == first]
            where = [*values, first]
            weight = base.get(".".join(where) + ".weight")
            cell.insert_child_to_cell(first, tree(below, where) if below[0] else nn.Dense(
                weight.shape[1], weight.shape[0], weight_init=Tensor(weight), has_bias=False))
        return cell

    net = tree([path[:-len(".weight")].split(".") for path in base if "proj.weight" in path], [])
    mp.load_adapter(net, folder / "lora_plain")
    assert len(mp.summary(net).rows) == 4
    mp.merge(net)
    weights = {path: item.asnumpy() for path, item in net.parameters_and_names()}
    for key in merged.files:
        if key.startswith("merged_weight."):
            np.testing.assert_allclose(weights[key[len("merged_weight."):]], merged[key], rtol=0, atol=1e-7)


# All or nothing

def test_missing_unexpected_and_misshapen_stand_in_one_message():
    mp.save_adapter(adapted(), "adapter")

    def change(tensors):
        tensors["base_model.model.to_v.lora_A.weight"] = tensors.pop("base_model.model.to_q.lora_A.weight")
        tensors["base_model.model.to_v.lora_B.weight"] = tensors.pop("base_model.model.to_q.lora_B.weight")
        key = "base_model.model.to_out.0.lora_B.weight"
        tensors[key] = np.zeros((5, 2), np.float32)
        tensors["base_model.model.blocks.1.0.lora_B.weight"][0, 0] = np.nan

    edit_tensors("adapter", change)
    net = adapted()
    with unchanged(net), pytest.raises(ValueError) as caught:
        mp.load_adapter(net, "adapter")
    for part in ("unexpected: to_v is no layer of the net. Close to it: to_q", "missing: the net's adapted layer to_q",
                 "misshapen: to_out.0.mindpet_delta_lora_b is (6, 2) in the net, (5, 2) in the file",
                 "not finite: blocks.1.0.mindpet_delta_lora_b", "which is unchanged"):
        assert part in str(caught.value), str(caught.value)


CONFIG_DAMAGE = [
    ({"peft_type": "LOHAS"}, "peft_type must be one of LORA, .*LOHA"), ({"peft_type": None}, "peft_type"),
    ({"r": 3}, "do not fit rank 3"), ({"r": "2"}, "r must be a positive number"), ({"r": 0}, "r must be"),
    ({"r": True}, "r must be"), ({"lora_alpha": None}, "lora_alpha must be"), ({"lora_alpha": -1}, "lora_alpha must"),
    ({"lora_alpha": float("nan")}, "lora_alpha must"), ({"use_dora": True}, "lacks lora_magnitude_vector"),
    ({"use_rslora": 3}, "use_rslora must be true or false"), ({"bias": "some"}, "bias must be"),
    ({"lora_bias": True}, "lacks lora_B.bias"), ({"use_qalora": True}, "use_qalora = True is not supported"),
    ({"init_lora_weights": "mica"}, "init_lora_weights = 'mica' is not supported"),
    ({"init_lora_weights": "corda"}, "the start, init_lora_weights = 'corda', took a part out"),
    ({"rank_pattern": [1]}, "rank_pattern must be an object"),
    ({"rank_pattern": {"(": 2}}, "no regular expression"), ({"alpha_pattern": {"to_q": "x"}}, "alpha_pattern"),
    ({"alpha_pattern": {"to_q": 0}}, "alpha_pattern"), ({"lora_dropout": 2}, "lora_dropout"),
    ({"lora_dropout": "x"}, "lora_dropout"), ({"rank_pattern": {"to_q": 2.5}}, "rank_pattern"),
]


@pytest.mark.parametrize("fields, message", CONFIG_DAMAGE, ids=lambda item: str(item)[:40])
@pytest.mark.parametrize("build", [Attention, adapted], ids=["plain", "adapted"])
def test_a_config_that_cannot_be_honoured_is_refused(fields, message, build):
    mp.save_adapter(adapted(), "adapter")
    edit_config("adapter", **fields)
    net = build()
    with unchanged(net), pytest.raises(ValueError, match=message):
        mp.load_adapter(net, "adapter")


@pytest.mark.parametrize("change, message", [
    (lambda tensors: tensors.clear(), "no tensor"),
    (lambda tensors: tensors.pop("base_model.model.to_q.lora_B.weight"), "to_q lacks lora_B.weight"),
    (lambda tensors: tensors.update({"model.to_q.weight": np.zeros(3, np.float32)}), "model.to_q.weight is no tensor"),
    (lambda tensors: tensors.update({"base_model.model.to_q.lora_A.weight": np.zeros((2, 5), np.float32)}), "missh"),
    (lambda tensors: tensors.update({"base_model.model.to_q.lora_A.weight": np.zeros((3, 6), np.float32)}), "rank 2"),
    (lambda tensors: tensors.update({"base_model.model.norm.lora_A.weight": np.zeros((2, 6), np.float32),
                                     "base_model.model.norm.lora_B.weight": np.zeros((6, 2), np.float32)}),
     "norm: LoRA adapts nn.Dense"),
])
@pytest.mark.parametrize("build", [Attention, adapted], ids=["plain", "adapted"])
def test_tensors_that_do_not_fit_are_refused(change, message, build):
    mp.save_adapter(adapted(), "adapter")
    edit_tensors("adapter", change)
    net = build()
    with unchanged(net), pytest.raises(ValueError, match=message):
        mp.load_adapter(net, "adapter")


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize("keep", [0, 1, 7, 0.5, -1])
def test_a_truncated_file_names_itself(name, keep):
    mp.save_adapter(adapted(), "adapter")
    path = Path("adapter", name)
    data = path.read_bytes()
    # The config ends with a line break that nothing needs.
    path.write_bytes(data[:int(len(data) * keep)] if isinstance(keep, float) else data[:keep - (name == CONFIG)]
                     if keep < 0 else data[:keep])
    net = Attention()
    with unchanged(net), pytest.raises(ValueError, match=name):
        mp.load_adapter(net, "adapter")


@pytest.mark.parametrize("text", ["[]", "3", "null", "\x00"])
def test_a_config_of_the_wrong_kind_names_itself(text):
    mp.save_adapter(adapted(), "adapter")
    Path("adapter", CONFIG).write_text(text)
    with pytest.raises(ValueError, match=CONFIG):
        mp.load_adapter(Attention(), "adapter")


def test_missing_files_are_named():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        mp.load_adapter(Attention(), "nowhere")
    mp.save_adapter(adapted(), "adapter")
    for name in (TENSORS, CONFIG):
        os.rename(f"adapter/{name}", "away")
        with pytest.raises(FileNotFoundError, match=name):
            mp.load_adapter(Attention(), "adapter")
        os.rename("away", f"adapter/{name}")
    Path("file").write_text("")
    with pytest.raises(ValueError, match="file is not a whole safetensors file"):
        mp.load_adapter(Attention(), "file")


def test_two_paths_of_the_file_for_one_layer_of_the_net_are_refused():
    class Shared(nn.Cell):
        def __init__(self):
            super().__init__()
            self.to_q = nn.Dense(6, 6)
            self.to_k = self.to_q

    mp.save_adapter(adapted(["to_q", "to_k"]), "adapter")
    net = Shared()
    with unchanged(net), pytest.raises(ValueError, match="one layer in the net"):
        mp.load_adapter(net, "adapter")


# Writing

def test_refusals_write_nothing():
    for net, error in ((Attention(), ValueError), ("net", TypeError), (LoRADense(6, 4, 2, 3), ValueError)):
        with pytest.raises(error):
            mp.save_adapter(net, "adapter")
    assert not Path("adapter").exists()


@pytest.mark.parametrize("place", ["/proc/adapter", "/dev/null/adapter", "file", "file/adapter", "taken"])
def test_a_folder_that_cannot_be_written_says_what_to_do(place):
    Path("file").write_text("mine")
    Path("taken", TENSORS).mkdir(parents=True)
    with pytest.raises(OSError, match="could not be written.*check that the disk has space"):
        mp.save_adapter(adapted(), place)
    assert Path("file").read_text() == "mine" and os.listdir("taken") == [TENSORS]


FULL_DISK = """
import resource, signal, sys
from mindspore import nn
import mindpet_lite as mp
net = mp.get_pet_model(nn.SequentialCell(nn.Dense(300, 300)), mp.LoraConfig(target_modules=["0"]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
try:
    mp.save_adapter(net, "adapter")
except OSError as error:
    sys.exit(f"said: {error}")
"""


def test_a_disk_that_takes_no_more_leaves_nothing_behind():
    result = subprocess.run([sys.executable, "-c", FULL_DISK], capture_output=True, text=True, timeout=120,
                            env={**os.environ, "PYTHONPATH": str(Path(mp.__file__).parents[1])})
    assert "said: adapter could not be written (File too large)" in result.stderr, result.stderr
    assert not os.path.exists("adapter") and not [name for name in os.listdir(".") if "adapter" in name]


# MindPet's checkpoints and our own

def by_hand(alpha: float = 3) -> nn.Cell:
    return nn.SequentialCell(nn.SequentialCell(LoRADense(6, 4, 2, alpha)), nn.Dense(4, 4))


@pytest.mark.parametrize("upper", [False, True])
def test_mindpets_checkpoint_in_both_spellings(upper):
    source, net = by_hand(), by_hand()
    randomise(source)
    deltas = [item for item in source.get_parameters() if "mindpet_delta" in item.name]
    names = [item.name[:-1] + (item.name[-1].upper() if upper else item.name[-1]) for item in deltas]
    ms.save_checkpoint([{"name": name, "data": item} for name, item in zip(names, deltas)], "mindpet.ckpt")
    mp.load_adapter(net, "mindpet.ckpt")
    for name in ("mindpet_delta_lora_a", "mindpet_delta_lora_b"):
        assert np.array_equal(getattr(net[0][0], name).asnumpy(), getattr(source[0][0], name).asnumpy())
    assert net[0][0].lora_alpha == 3


def test_mindpets_checkpoint_of_a_layer_that_stands_alone():
    values = {"mindpet_delta_lora_A": np.ones((2, 6)), "mindpet_delta_lora_B": np.ones((4, 2))}
    ms.save_checkpoint([{"name": name, "data": Tensor(value, ms.float32)} for name, value in values.items()], "a.ckpt")
    layer = mp.load_adapter(LoRADense(6, 4, 2, 3), "a.ckpt")
    assert np.all(layer.mindpet_delta_lora_a.asnumpy() == 1) and np.all(layer.mindpet_delta_lora_b.asnumpy() == 1)


@pytest.mark.parametrize("names, message", [
    (["0.0.mindpet_delta_lora_a"], "missing: 0.0.mindpet_delta_lora_b"),
    (["0.0.mindpet_delta_lora_a", "0.0.mindpet_delta_lora_A", "0.0.mindpet_delta_lora_b"], "both spellings"),
    (["0.0.mindpet_delta_lora_a", "0.0.mindpet_delta_lora_b", "1.weight"], "1.weight belongs to no adapted layer"),
    (["9.mindpet_delta_lora_a", "9.mindpet_delta_lora_b"], "unexpected: 9 is no layer of the net"),
    (["1.mindpet_delta_lora_a", "1.mindpet_delta_lora_b"], "does not say rank and alpha"),
])
def test_a_checkpoint_that_does_not_fit_is_refused(names, message):
    shapes = {"a": (2, 6), "b": (4, 2), "t": (4, 4)}
    ms.save_checkpoint([{"name": name, "data": Tensor(np.ones(shapes[name[-1].lower()], np.float32))}
                        for name in names], "a.ckpt")
    net = by_hand()
    with unchanged(net), pytest.raises(ValueError, match=message):
        mp.load_adapter(net, "a.ckpt")


def test_a_truncated_or_missing_checkpoint_names_itself():
    ms.save_checkpoint(by_hand(), "a.ckpt")
    data = Path("a.ckpt").read_bytes()
    Path("b.ckpt").write_bytes(data[:-20])
    Path("c.ckpt").write_bytes(b"")
    net = by_hand()
    for name in ("b.ckpt", "c.ckpt"):
        with unchanged(net), pytest.raises(ValueError, match=name):
            mp.load_adapter(net, name)
    with pytest.raises(FileNotFoundError, match="d.ckpt"):
        mp.load_adapter(net, "d.ckpt")


def test_modules_to_save_train_whole():
    net = mp.get_pet_model(Attention(), config(["to_k"], modules_to_save=["norm", "blocks.1"]))
    assert {path for path, item in net.parameters_and_names() if item.requires_grad} == {
        "norm.gamma", "norm.beta", "blocks.1.0.weight", "blocks.1.0.bias",
        "to_k.mindpet_delta_lora_a", "to_k.mindpet_delta_lora_b"}


@pytest.mark.parametrize("names, message", [
    (["nrm"], "modules_to_save entry 'nrm' hits no module with parameters. Did you mean 'norm'"),
    (["to_k"], "all of its hits are excluded, or in modules_to_save"),
])
def test_modules_to_save_that_do_not_fit_are_refused(names, message):
    net = Attention()
    with unchanged(net), pytest.raises(ValueError, match=message):
        mp.get_pet_model(net, config(["to_k"], modules_to_save=names))


def test_modules_to_save_go_through_files(mode):
    net = mp.get_pet_model(Attention(), config(["to_k"], modules_to_save=["norm", "blocks.1"]))
    randomise(net)
    for item in net.trainable_params():
        item.set_data(Tensor(np.random.default_rng(3).standard_normal(item.shape).astype(np.float32)))
    mp.save_adapter(net, "adapter")
    assert json.loads(Path("adapter", CONFIG).read_text())["modules_to_save"] == ["blocks.1.0", "norm"]
    assert {"base_model.model.norm.weight", "base_model.model.norm.bias"} <= set(load_file(Path("adapter", TENSORS)))
    fresh = Attention()
    load_values(fresh, net)
    fresh.norm.gamma.set_data(Tensor(np.zeros(6, np.float32)))
    mp.load_adapter(fresh, "adapter")
    x = inputs(5, 6)
    assert np.array_equal(fresh.set_train(False)(x).asnumpy(), net.set_train(False)(x).asnumpy())
    # Loaded into a net of which nothing is frozen, they are saved again.
    mp.save_adapter(fresh, "again")
    assert Path("again", TENSORS).read_bytes() == Path("adapter", TENSORS).read_bytes()


# The base it belongs to

@pytest.mark.parametrize("format, place", [("peft", "adapter"), ("diffusers", "a.safetensors"),
                                           ("kohya", "a.safetensors"), ("mindpet", "a.ckpt")])
def test_an_adapter_of_another_base_is_told_by_name(recwarn, format, place):
    net = adapted()
    mp.save_adapter(net, place, format=format)
    mp.load_adapter(net, place)
    assert not recwarn.list
    other = Attention()
    load_values(other, net)
    other.to_q.weight.set_data(Tensor(np.ones((6, 6), np.float32)))
    with unchanged(other), pytest.raises(ValueError, match="another base than this net: the weights of to_q are not"):
        mp.load_adapter(other, place, strict_base=True)
    with pytest.warns(UserWarning, match="another base than this net: the weights of to_q are not"):
        mp.load_adapter(other, place)


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_a_base_in_half_precision_is_the_same_base(recwarn, dtype):
    net = nn.SequentialCell(nn.Dense(6, 6))
    half = nn.SequentialCell(nn.Dense(6, 6, dtype=dtype))
    half[0].weight.set_data(net[0].weight.astype(dtype))
    net[0].weight.set_data(half[0].weight.astype(ms.float32))
    mp.save_adapter(mp.get_pet_model(net, config(["0"])), "adapter")
    mp.load_adapter(half, "adapter", strict_base=True)
    assert not recwarn.list


# Other names, other formats

class Renamed(nn.Cell):
    """The layers of `Attention` below another name."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Attention()

    def construct(self, x):
        return self.network(x)


@pytest.mark.parametrize("name_map", [None, {path: f"network.{path}" for path in TARGETS},
                                      [(r"^(.*)$", r"network.\1")]])
def test_names_are_mapped_without_wrappers_or_by_a_table(name_map):
    net = adapted()
    randomise(net)
    mp.save_adapter(net, "adapter")
    other = Renamed()
    load_values(other.network, net)
    for path, item in other.network.parameters_and_names():
        item.set_data(dict(net.parameters_and_names())[path])
    mp.load_adapter(other, "adapter", name_map=name_map, strict_base=True)
    x = inputs(5, 6)
    assert np.array_equal(other.set_train(False)(x).asnumpy(), net.set_train(False)(x).asnumpy())


@pytest.mark.parametrize("format, place", [("peft", "adapter"), ("mindpet", "a.ckpt"), ("mindpet", "a.safetensors"),
                                           ("mindformers", "adapter")])
def test_every_format_goes_through_a_net(format, place, mode):
    net = adapted(["to_q", "to_k"], lora_rank=3, lora_alpha=7)
    randomise(net)
    mp.save_adapter(net, place, format=format)
    fresh = Attention()
    load_values(fresh, net)
    mp.load_adapter(fresh, place)
    assert (fresh.to_q.lora_rank, fresh.to_q.lora_alpha) == (3, 7)
    x = inputs(5, 6)
    assert np.array_equal(fresh.set_train(False)(x).asnumpy(), net.set_train(False)(x).asnumpy())


def test_an_unknown_format_lists_those_there_are():
    with pytest.raises(ValueError, match="format must be one of peft.*Did you mean 'kohya'"):
        mp.save_adapter(adapted(), "adapter", format="kohia")
    with pytest.raises(ValueError, match="format"):
        mp.load_adapter(adapted(), "adapter", format="kohia")


class OwnLora(nn.Cell):
    """A user's own low-rank cells, under PEFT's names."""

    def __init__(self):
        super().__init__()
        self.q, self.lora_A, self.lora_B = nn.Dense(6, 6), nn.Dense(6, 2), nn.Dense(2, 6)

    def construct(self, x):
        return self.q(x) + self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lora_A", "lora_B"]}, {"freeze_exclude": ["*lora_A*"]}],
                         ids=str)
def test_cells_that_a_user_calls_lora_are_saved_and_read(settings, pynative_mode):
    net = mp.get_pet_model(nn.SequentialCell(OwnLora()), config(["q"], **settings))
    randomise(net)
    for item in net.trainable_params():
        if "mindpet" not in item.name:
            item.set_data(item + 1)
    mp.save_adapter(net, "adapter")
    assert json.loads(Path("adapter", CONFIG).read_text())["pet_type"] == "lora"
    fresh = nn.SequentialCell(OwnLora())
    load_values(fresh, net)
    fresh[0].lora_A.weight.set_data(fresh[0].lora_A.weight - 1)
    mp.load_adapter(fresh, "adapter")
    assert np.array_equal(fresh(inputs(5, 6)).asnumpy(), net(inputs(5, 6)).asnumpy())
    assert {item.name for item in fresh.trainable_params()} == {item.name for item in net.trainable_params()}


def test_messages_list_ten_lines_at_most():
    class Many(nn.Cell):
        def __init__(self):
            super().__init__()
            self.layers = nn.CellList([nn.Dense(6, 6) for _ in range(40)])

    net = mp.get_pet_model(Many(), config("all-linear"))
    mp.save_adapter(net, "adapter")
    with pytest.raises(ValueError) as caught:
        mp.load_adapter(Attention(), "adapter")
    lines = str(caught.value).splitlines()
    assert len(lines) == 12 and lines[-1] == "  and 30 more." and max(map(len, lines)) < 600
    with pytest.raises(ValueError) as caught:
        mp.get_pet_model(net, config([f"layer_{number}" for number in range(40)]))
    assert str(caught.value).splitlines()[-1] == "  and 30 more."
    with pytest.raises(ValueError) as caught:
        mp.save_adapter(mp.get_pet_model(Many(), config("all-linear", lora_bias=True)), "a.safetensors", "kohya")
    assert str(caught.value).splitlines()[-1] == "  and 70 more."


def test_an_empty_path_is_refused():
    net = adapted()
    before = sorted(Path().iterdir())
    with pytest.raises(ValueError, match="path must name a directory or a file"):
        mp.save_adapter(net, "")
    assert sorted(Path().iterdir()) == before
