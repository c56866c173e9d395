"""PEFT's adapters that combine fields: saved modules, biases, tied weights, tokens; and what a switched-off net is."""
from __future__ import annotations

import json
import warnings
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from safetensors.numpy import load_file, save_file

import mindpet_lite as mp
from mindpet_lite.formats import peft
from mindpet_lite.formats.files import to_bytes
from mindpet_lite.formats.lora import PEFT_FIELDS
from mindpet_lite.graph.tree import cells_by_path, set_parameter
from mindpet_lite.offline.convert import convert
from mindpet_lite.offline.inspect import inspect, table
from mindpet_lite.offline.merge import merge as merge_files

IDS = Tensor(np.array([[1, 4, 2], [0, 3, 8]], np.int32))
PREFIX = "base_model.model."


class Block(nn.Cell):
    def __init__(self):
        super().__init__()
        self.fc = nn.Dense(4, 4)
        self.norm = nn.LayerNorm((4,))

    def construct(self, x):
        return self.norm(x + self.fc(x))


class Net(nn.Cell):
    def __init__(self, tied=False):
        super().__init__()
        self.wte = nn.Embedding(9, 4)
        self.h = nn.CellList([Block(), Block()])
        self.lm_head = nn.Dense(4, 9, has_bias=False)
        for number, item in enumerate(self.get_parameters()):
            item.set_data(Tensor(np.random.default_rng(number).standard_normal(item.shape).astype(np.float32)))
        if tied:
            set_parameter(self.lm_head, "weight", self.wte.embedding_table)

    def construct(self, ids):
        x = self.wte(ids)
        for block in self.h:
            x = block(x)
        return self.lm_head(x)


def shaken(net):
    """Move everything that trains."""
    for number, item in enumerate(net.trainable_params()):
        item.set_data(item + Tensor(np.random.default_rng(99 + number).standard_normal(item.shape), item.dtype))
    return net


def write(tensors, folder="theirs", **config):
    """Write a file as PEFT does."""
    Path(folder).mkdir()
    save_file({PREFIX + key: np.ascontiguousarray(value) for key, value in tensors.items()},
              f"{folder}/adapter_model.safetensors")
    Path(folder, "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))
    return folder


def low_rank(*paths, out=4):
    rng = np.random.default_rng(5)
    return {f"{path}.{name}.weight": rng.standard_normal(shape).astype(np.float32) for path in paths
            for name, shape in (("lora_A", (2, 4)), ("lora_B", (out, 2)))}


def same_files(one, other):
    first, second = (load_file(f"{folder}/adapter_model.safetensors") for folder in (one, other))
    assert {key: (value.dtype, value.tobytes()) for key, value in first.items()} == {
        key: (value.dtype, value.tobytes()) for key, value in second.items()}
    assert json.loads(Path(one, "adapter_config.json").read_text()) == json.loads(
        Path(other, "adapter_config.json").read_text())


def test_switched_off_is_the_base_with_all_that_trained_beside(mode):
    plain = Net()(IDS).asnumpy()
    net = shaken(mp.get_pet_model(Net(), mp.LoraConfig(2, 4, target_modules=["fc"], modules_to_save=["lm_head"],
                                                       bias="all")))
    y = net(IDS).asnumpy()
    mp.save_adapter(net, "before")
    with mp.adapters_disabled(net), mp.adapters_disabled(net):
        assert np.array_equal(net(IDS).asnumpy(), plain)
        mp.save_adapter(net, "inside")
    assert np.array_equal(net(IDS).asnumpy(), y)
    same_files("before", "inside")
    loaded = mp.load_adapter(mp.load_adapter(Net(), "before"), "before")
    assert np.array_equal(loaded(IDS).asnumpy(), y)
    with mp.adapters_disabled(loaded):
        assert np.array_equal(loaded(IDS).asnumpy(), plain)
    mp.save_adapter(loaded, "after")
    same_files("before", "after")


def test_a_saved_module_of_tied_weights_gets_its_own(mode):
    head = np.random.default_rng(3).standard_normal((9, 4)).astype(np.float32)
    folder = write({**low_rank("h.0.fc"), "lm_head.weight": head}, target_modules=["h.0.fc"],
                   modules_to_save=["lm_head"])
    net = Net(tied=True)
    table, plain = net.wte.embedding_table.asnumpy().copy(), net(IDS).asnumpy()
    mp.load_adapter(net, folder)
    untied = Net()
    set_parameter(untied.wte, "embedding_table", ms.Parameter(Tensor(table), name="wte.embedding_table"))
    assert np.array_equal(net(IDS).asnumpy(), mp.load_adapter(untied, folder)(IDS).asnumpy())
    assert np.array_equal(net.wte.embedding_table.asnumpy(), table) and net.lm_head.weight.name == "lm_head.weight"
    with mp.adapters_disabled(net):
        assert np.array_equal(net(IDS).asnumpy(), plain)
    mp.save_adapter(net, "ours")
    same_files(folder, "ours")
    fresh = mp.get_pet_model(Net(tied=True), mp.LoraConfig(2, 4, target_modules=["fc"], modules_to_save=["wte"]))
    assert fresh.wte.embedding_table is not fresh.lm_head.weight
    assert fresh.wte.embedding_table.requires_grad and not fresh.lm_head.weight.requires_grad


def test_what_peft_writes_twice_comes_back(pynative_mode):
    base, bias = np.ones(4, np.float32), np.arange(4, dtype=np.float32)
    folder = write({**low_rank("h.0.fc"), "h.0.fc.base_layer.bias": bias, "h.1.fc.bias": bias, "h.0.norm.weight": base,
                    **{f"h.{block}.norm{inner}.bias": bias for block in (0, 1)
                       for inner in ("", ".modules_to_save", ".original_module")}, "h.1.norm.weight": base},
                   target_modules=["h.0.fc"], modules_to_save=["norm"], bias="all", task_type="CAUSAL_LM")
    net = mp.load_adapter(Net(), folder)
    mp.save_adapter(net, "ours")
    same_files(folder, "ours")
    net.h[0].norm.beta.set_data(ops.ones(4, ms.float32))
    mp.save_adapter(net, "ours")
    written = load_file("ours/adapter_model.safetensors")
    assert written[PREFIX + "h.0.norm.modules_to_save.bias"].tolist() == [1.0] * 4
    assert written[PREFIX + "h.0.norm.original_module.bias"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_weights_of_output_layers_and_halves(pynative_mode):
    net = Net()
    head = net.lm_head.weight.asnumpy().astype(np.float16)
    folder = write({**low_rank("lm_head", out=9), "lm_head.base_layer.weight": head}, target_modules=["lm_head"])
    mp.save_adapter(mp.load_adapter(net, folder), "ours")
    same_files(folder, "ours")


def test_a_saved_module_may_end_a_longer_name(pynative_mode):
    # PEFT takes every module whose name ends so, without a dot.
    tensors = {**low_rank("h.0.fc"), "lm_head.weight": np.ones((9, 4), np.float32)}
    net = mp.load_adapter(Net(), write(tensors, target_modules=["h.0.fc"], modules_to_save=["head"]))
    assert net.lm_head.weight.asnumpy().max() == 1


def test_statistics_belong_to_a_saved_module_but_do_not_train(pynative_mode):
    class Normed(nn.Cell):
        def __init__(self):
            super().__init__()
            self.fc, self.bn = nn.Dense(4, 4, weight_init="ones"), nn.BatchNorm1d(4)

        def construct(self, x):
            return self.bn(self.fc(x))

    net = mp.get_pet_model(Normed(), mp.LoraConfig(2, 4, target_modules=["fc"], modules_to_save=["bn"]))
    assert {item.name for item in net.trainable_params() if "delta" not in item.name} == {"bn.gamma", "bn.beta"}
    net.bn.moving_mean.set_data(ops.ones(4, ms.float32))
    mp.save_adapter(net, "ours")
    tensors = load_file("ours/adapter_model.safetensors")
    assert PREFIX + "bn.running_mean" in tensors and PREFIX + "bn.running_var" in tensors
    tensors[PREFIX + "bn.num_batches_tracked"] = np.array(3)
    save_file(tensors, "ours/adapter_model.safetensors")
    loaded = mp.load_adapter(Normed(), "ours")
    assert loaded.bn.moving_mean.asnumpy().tolist() == [1.0] * 4
    mp.save_adapter(loaded, "again")
    same_files("ours", "again")


def test_pissa_leaves_embeddings_alone(pynative_mode):
    rng = np.random.default_rng(1)
    table = {f"wte.{name}": rng.standard_normal(shape).astype(np.float32)
             for name, shape in (("lora_embedding_A", (2, 9)), ("lora_embedding_B", (4, 2)))}
    folder = write({**low_rank("h.0.fc"), **table}, target_modules=["fc", "wte"], init_lora_weights="pissa")
    net = mp.load_adapter(Net(), folder)
    assert np.array_equal(net.wte.embedding_table.asnumpy(), Net().wte.embedding_table.asnumpy())
    assert not np.array_equal(net.h[0].fc.weight.asnumpy(), Net().h[0].fc.weight.asnumpy())
    mp.save_adapter(net, "ours")
    same_files(folder, "ours")


def test_fields_that_are_not_pefts_are_named_and_kept(pynative_mode):
    folder = write(low_rank("h.0.fc"), target_modules=["h.0.fc"], gain_of_tomorrow=3, empty_of_tomorrow=None)
    with pytest.warns(UserWarning, match="gain_of_tomorrow, which no version of PEFT") as caught:
        net = mp.load_adapter(Net(), folder)
    assert len(caught) == 1 and "empty_of_tomorrow" not in str(caught[0].message)
    mp.save_adapter(net, "ours")
    same_files(folder, "ours")


def test_every_field_of_peft_is_honoured_or_refused():
    # Free of meaning without a method that is refused, or for what the file computes.
    free = {"auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
            "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type",
            "layers_pattern"}
    odd = object()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
    for field in PEFT_FIELDS - free - {"lora_dropout"}:
        with pytest.raises(ValueError, match=field):
            peft.decode({}, {**config, field: odd})


def test_a_layer_shared_under_two_names_is_said(pynative_mode):
    net = Net()
    net.h.insert_child_to_cell("2", net.h[0])
    assert cells_by_path(net)["h.2.fc"] is net.h[0].fc
    with pytest.warns(UserWarning, match=r"h\.2\.fc.* under the name in the file only"):
        mp.load_adapter(net, write(low_rank("h.0.fc"), target_modules=["h.0.fc"]))


def test_a_renamed_adapter_keeps_what_its_config_says_besides(pynative_mode):
    folder = write(low_rank("x.0.fc"), target_modules=["x.0.fc"], base_model_name_or_path="org/base",
                   exclude_modules=["h"], task_type="CAUSAL_LM")
    mp.save_adapter(mp.load_adapter(Net(), folder, name_map={"x.0.fc": "h.0.fc"}), "ours")
    config = json.loads(Path("ours/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("org/base", "CAUSAL_LM")
    assert (config["target_modules"], config["exclude_modules"]) == (["h.0.fc"], None)


@pytest.mark.parametrize("settings, expected", [
    ({"target_modules": ["fc"], "layers_to_transform": [0], "layers_pattern": ["h", "mid"]}, {"h.0.mid.1.fc"}),
    ({"target_modules": ["fc"], "layers_to_transform": [1], "layers_pattern": "mid"}, {"h.0.mid.1.fc", "h.1.mid.1.fc"}),
    ({"target_modules": "all-linear", "modules_to_save": ["h.1"]}, {"h.0.mid.0.fc", "h.0.mid.1.fc"})])
def test_which_blocks(settings, expected, pynative_mode):
    class Deep(nn.Cell):
        def __init__(self):
            super().__init__()
            self.h = nn.CellList([self.middle() for _ in range(2)])

        def middle(self):
            cell = nn.Cell()
            cell.mid = nn.CellList([Block(), Block()])
            return cell

    net = mp.get_pet_model(Deep(), mp.LoraConfig(2, 4, **settings))
    adapted = {path for path, cell in cells_by_path(net).items() if isinstance(cell, mp.LoRADense)}
    if "layers_pattern" in settings and settings["layers_pattern"] != "mid":
        expected = expected | {"h.0.mid.0.fc"}
    assert adapted == expected


def test_no_warning_for_pefts_own_config(pynative_mode):
    folder = write(low_rank("h.0.fc"), target_modules=["h.0.fc"], megatron_core="megatron.core", qalora_group_size=16,
                   peft_version="0.21.2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mp.load_adapter(Net(), folder)


def whole(name, seed):
    return {name: np.random.default_rng(seed).standard_normal((9, 4)).astype(np.float32)}


@pytest.mark.parametrize("saved, equal, expected", [
    (["wte", "lm_head"], False, ("wte", "lm_head")), (["wte", "lm_head"], True, ("wte", "wte")),
    # PEFT writes a grown embedding along, which no entry names: there it goes into the base, tied as it is.
    (None, None, ("wte", "wte")), (["wte"], None, ("wte", "base"))])
def test_both_sides_of_a_tie_have_the_values_that_peft_gives_them(saved, equal, expected, pynative_mode):
    values = whole("wte.weight", 1) if equal is None else {
        **whole("wte.weight", 1), **whole("lm_head.weight", 1 if equal else 2)}
    folder = write({**low_rank("h.0.fc"), **values}, target_modules=["h.0.fc"], modules_to_save=saved)
    net = mp.load_adapter(Net(tied=True), folder)
    held = {"wte": values["wte.weight"], "lm_head": values.get("lm_head.weight"),
            "base": Net().wte.embedding_table.asnumpy()}
    assert np.array_equal(net.wte.embedding_table.asnumpy(), held[expected[0]])
    assert np.array_equal(net.lm_head.weight.asnumpy(), held[expected[1]])
    mp.save_adapter(net, "ours")
    again = mp.load_adapter(Net(tied=True), "ours")
    for ours, theirs in zip(again.get_parameters(), net.get_parameters()):
        assert np.array_equal(ours.asnumpy(), theirs.asnumpy())
    if equal is False:
        with pytest.raises(ValueError, match="was one weight with"):
            mp.merge(net)


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_a_file_without_what_trained_with_the_nets_adapter_is_refused(settings, pynative_mode):
    folder = write(low_rank("h.0.fc"), target_modules=["h.0.fc"])
    net = mp.get_pet_model(Net(), mp.LoraConfig(2, 4, target_modules=["h.0.fc"], **settings))
    mp.load_adapter(net, folder)
    shaken(net)
    before = net(IDS).asnumpy()
    with pytest.raises(ValueError, match="missing: .*, which trained with the net's adapter, is not in the file"):
        mp.load_adapter(net, folder)
    assert np.array_equal(net(IDS).asnumpy(), before)


def test_layers_of_two_configs_that_differ_in_a_flag_are_saved_in_our_own_form(mode):
    net = mp.get_pet_model(Net(), mp.LoraConfig(2, 4, target_modules=["h.0.fc"], use_dora=True))
    mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["h.1.fc"], use_rslora=True))
    shaken(net)
    mp.save_adapter(net, "ours")
    assert "peft_type" not in json.loads(Path("ours/adapter_config.json").read_text())
    assert np.array_equal(mp.load_adapter(Net(), "ours")(IDS).asnumpy(), net(IDS).asnumpy())


def test_a_state_dict_of_a_saved_module(pynative_mode):
    head = whole("lm_head.weight", 3)["lm_head.weight"]
    folder = write({**low_rank("h.0.fc"), "lm_head.modules_to_save.default.weight": head,
                    "lm_head.original_module.weight": head + 1}, target_modules=["h.0.fc"], modules_to_save=["lm_head"])
    assert np.array_equal(mp.load_adapter(Net(), folder).lm_head.weight.asnumpy(), head)


def test_blocks_in_a_file_that_it_has_not_are_said(pynative_mode):
    folder = write(low_rank("h.0.fc"), target_modules=["fc"], layers_to_transform=[0, 7])
    with pytest.warns(UserWarning, match="layers_to_transform '7' fits none of its layers"):
        mp.load_adapter(Net(), folder)


def test_dora_with_a_bias_of_b_is_refused_as_in_peft(pynative_mode):
    folder = write(low_rank("h.0.fc"), target_modules=["fc"], use_dora=True, lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias and use_dora do not go together"):
        mp.load_adapter(Net(), folder)


def test_what_a_config_leaves_out_is_said_whatever_is_done_with_the_file(pynative_mode, recwarn):
    folder = write({**low_rank("h.0.fc"), **low_rank("h.1.fc")}, target_modules=["h.0.fc"], rank_pattern={"x": 3})
    Path("base.safetensors").write_bytes(to_bytes({f"h.{n}.fc.weight": np.zeros((4, 4), np.float32) for n in (0, 1)}))
    said = [mp.load_adapter, lambda net, path: merge_files(Path("base.safetensors"), path, Path("out"), quiet=True),
            lambda net, path: convert(path, Path("b.safetensors"), "mindpet")]
    for call in said:
        recwarn.clear()
        call(Net(), Path(folder))
        texts = [str(item.message) for item in recwarn.list]
        assert any("rank_pattern 'x' fits none of its layers" in text for text in texts)
        assert any("leave out h.1.fc, of which it holds weights" in text for text in texts)
    assert "note: its rank_pattern 'x'" in table(inspect(Path(folder)))


def test_many_patterns_that_hit_nothing_are_one_warning(pynative_mode, recwarn):
    folder = write(low_rank("h.0.fc"), target_modules=["h.0.fc"], layers_to_transform=list(range(5000)))
    mp.load_adapter(Net(), folder)
    assert len(recwarn.list) == 1 and len(str(recwarn.list[0].message)) < 1000
