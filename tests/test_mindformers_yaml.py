"""MindFormers' YAML as its users write it: nesting, null, exclude_layers, and names matched from their start."""
from __future__ import annotations

import warnings
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import yaml
from mindspore import nn

import mindpet_lite as mp
from mindpet_lite.config import as_config
from mindpet_lite.pet_block import pet_block

BLOCK = {"pet_type": "lora", "lora_rank": 2, "lora_alpha": 4, "target_modules": ".*wq"}


class Part(nn.Cell):
    def __init__(self, *names: str):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Dense(4, 4))
        self.wq_norm = nn.LayerNorm((4,))

    def construct(self, x):
        return self.wq(x)


class Net(nn.Cell):
    """Paths: layers.0.attention.wq ..., layers.1.feed_forward.wq2 ..., head."""

    def __init__(self, *names: str):
        super().__init__()
        self.layers = nn.CellList([nn.Cell(), nn.Cell()])
        for layer in self.layers:
            layer.attention, layer.feed_forward = Part(*(names or ("wq", "wk", "wo"))), Part("wq", "w1")
        self.head = nn.Dense(4, 2)

    def construct(self, x):
        return self.head(self.layers[0].attention(x))


def adapted(net: nn.Cell, **fields) -> tuple[list[str], list[str]]:
    """Return the adapted layers, and what was warned of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        mp.get_pet_model(net, {**BLOCK, **fields})
    return ([path for path, cell in net.cells_and_names() if isinstance(cell, mp.LoRADense)],
            [str(item.message) for item in found])


def both(*names: str) -> list[str]:
    return [f"layers.{block}.{name}" for block in (0, 1) for name in names]


ALL_Q = ("attention.wq", "feed_forward.wq")


@pytest.mark.parametrize("expression, layers", [
    (".*wq|.*wk", (*ALL_Q, "attention.wk")),       # the same for MindFormers and whole paths
    ("wq|wk", (*ALL_Q, "attention.wk")), ("w[qk]$", (*ALL_Q, "attention.wk")), ("^wo", ("attention.wo",)),
    (r".*attention\.wq", ("attention.wq",)),
])
def test_a_name_is_matched_where_no_whole_path_is(expression, layers):
    found, said = adapted(Net(), target_modules=expression)
    assert sorted(found) == sorted(both(*layers)) and not said


def test_what_an_expression_of_whole_paths_leaves_out_is_said():
    found, said = adapted(Net(), target_modules="wk|head")
    assert found == ["head"] and len(said) == 1
    assert "leaves out layers.0.attention.wk, layers.1.attention.wk, of which" in said[0]


def test_a_name_that_begins_so_is_hit_as_in_mindformers_and_said():
    found, said = adapted(Net("wq", "wq2", "wk"), target_modules="wq")
    assert sorted(found) == sorted(both("attention.wq", "attention.wq2", "feed_forward.wq"))
    assert len(said) == 1 and "also hits wq2." in said[0] and "as MindFormers takes it" in said[0]
    assert adapted(Net("wq", "wq2", "wk"), target_modules="wq$") == (both(*ALL_Q), [])
    assert adapted(Net("wq", "wq2", "wk"), target_modules=".*wq") == (both(*ALL_Q), [])


@pytest.mark.parametrize("expression", ["w", "qw|kw", "attention", "wq|", "("])
def test_an_expression_that_is_no_layers_name_is_refused(expression):
    net = Net()
    with pytest.raises(ValueError, match="hits nothing|no regular expression|leaves no layer"):
        mp.get_pet_model(net, {**BLOCK, "target_modules": expression})
    assert not [cell for _, cell in net.cells_and_names() if isinstance(cell, mp.LoRADense)]


@pytest.mark.parametrize("excluded, left", [
    ("wo", both("attention.wq", "attention.wk", *ALL_Q[1:], "feed_forward.w1")),
    (["wo", "w1"], both("attention.wq", "attention.wk", "feed_forward.wq")),
    (["feed_forward"], both("attention.wq", "attention.wk", "attention.wo")),
    ("feed_forward", both("attention.wq", "attention.wk", "attention.wo")),
    (["1$"], ["layers.0.attention.wq", "layers.0.attention.wk", "layers.0.attention.wo", "layers.0.feed_forward.wq",
              "layers.0.feed_forward.w1"]),
    (["layers.1", "w[k1]"], ["layers.0.attention.wq", "layers.0.attention.wo", "layers.0.feed_forward.wq"]),
    ([], None), (None, None), (r".*feed_forward\..*", both("attention.wq", "attention.wk", "attention.wo")),
])
def test_exclude_layers(excluded, left):
    found, said = adapted(Net(), target_modules=".*w.", exclude_layers=excluded)
    everything = both("attention.wq", "attention.wk", "attention.wo", "feed_forward.wq", "feed_forward.w1")
    assert sorted(found) == sorted(everything if left is None else left) and not said


def test_an_exclusion_that_hits_nothing_is_refused():
    for wrong in ("wz", ["wz"], ["wo", "2$"]):
        with pytest.raises(ValueError, match="exclude_modules .*hits nothing"):
            mp.get_pet_model(Net(), {**BLOCK, "exclude_layers": wrong})


def test_keys_of_mindformers():
    config = as_config({"pet_type": "LORA", "lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.01,
                        "lora_a_init": "normal", "lora_b_init": "zero", "param_init_type": None, "compute_dtype": None,
                        "reg_rules": ".*wq", "exclude_layers": None, "freeze_include": None, "freeze_exclude": None})
    assert config == mp.LoraConfig(2, 4, 0.01, "normal", "zero", target_modules=".*wq")
    assert config.param_init_type == ms.float32
    block = {**BLOCK, "lora_a_init": "normal", "lora_b_init": "zero", "target_modules": "0"}
    layer = mp.get_pet_model(nn.SequentialCell(nn.Dense(64, 8)), block)[0]
    assert not np.any(layer.mindpet_delta_lora_b.asnumpy())
    assert 0.005 < layer.mindpet_delta_lora_a.asnumpy().std() < 0.02


@pytest.mark.parametrize("around", [
    lambda block: {"pet_config": block}, lambda block: {"seed": 0, "pet_config": block, "callbacks": [{"type": "x"}]},
    lambda block: {"model": {"pet_config": block, "arch": {"type": "LlamaForCausalLM"}}},
    lambda block: {"use_parallel": True, "model": {"model_config": {"type": "LlamaConfig", "pet_config": block}}},
    lambda block: {"model_config": {"pet_config": block}},
])
def test_a_mapping_and_a_file_of_the_same_text_mean_the_same(around):
    document = around(BLOCK)
    Path("a.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    assert as_config(document) == as_config("a.yaml") == as_config(BLOCK)
    assert adapted(Net(), **{})[0] == [path for path, cell in mp.get_pet_model(Net(), document).cells_and_names()
                                       if isinstance(cell, mp.LoRADense)]


def test_several_blocks_and_blocks_elsewhere_are_refused_with_their_places():
    several = {"a": {"pet_config": BLOCK}, "b": [{"pet_config": dict(BLOCK)}]}
    inner = {"model": {"pet_config": BLOCK, "model_config": {"pet_config": BLOCK}}}
    part = {"model": {"model_config": {"llm_model": {"model_config": {"pet_config": BLOCK}}}}}
    for document, message in ((several, r"at a\.pet_config and at b\.0\.pet_config, but one net takes one"),
                              (inner, r"at model\.model_config\.pet_config and at model\.pet_config"),
                              (part, r"stands at model\.model_config\.llm_model.* with that part")):
        Path("a.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
        for given in (document, "a.yaml"):
            with pytest.raises(ValueError, match=message):
                as_config(given)


def test_a_document_that_holds_itself_ends():
    document: dict = {"a": {}}
    document["a"]["b"] = document
    assert pet_block(document) is None
    assert pet_block({**document, "pet_config": BLOCK}) == BLOCK
