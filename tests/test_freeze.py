"""Freezing: modes, patterns, both lists, YAML, repeated calls, refusals, the report."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from nets import Attention, config, unchanged

import mindpet_lite as mp
from mindpet_lite.delta import LoRADense
from mindpet_lite.graph import freeze_delta, freeze_from_config, freeze_modules


class Classifier(nn.Cell):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.attention = Attention()
        self.classifier = nn.Dense(6, 2)

    def construct(self, x):
        return self.classifier(self.attention(self.embedding(x)))


def adapted() -> Classifier:
    net = Classifier()
    return mp.get_pet_model(net, config(["to_q", "to_out.0"]))


def thaw(net: nn.Cell) -> nn.Cell:
    for parameter in net.get_parameters():
        parameter.requires_grad = True
    return net


def training(net: nn.Cell) -> set[str]:
    return {path for path, item in net.parameters_and_names() if item.requires_grad and "scaling" not in path}


LORA = {"attention.to_q.mindpet_delta_lora_a", "attention.to_q.mindpet_delta_lora_b",
        "attention.to_out.0.mindpet_delta_lora_a", "attention.to_out.0.mindpet_delta_lora_b"}
BIASES = {"attention.to_k.bias", "attention.to_out.0.bias", "attention.blocks.0.bias", "attention.blocks.1.0.bias",
          "classifier.bias"}


@pytest.mark.parametrize("mode", ["lora", "LoRA", "LORA", "Lora"])
def test_lora_leaves_the_deltas_trainable(mode):
    net = adapted()
    freeze_modules(net, exclude=["*"])
    freeze_delta(net, mode)
    assert training(net) == LORA


@pytest.mark.parametrize("mode", ["bitfit", "BitFit"])
def test_bitfit_leaves_the_biases_trainable(mode):
    net = Classifier()
    freeze_delta(net, mode)
    assert training(net) == BIASES


@pytest.mark.parametrize("mode", ["prefixtuning", "adapter", "low_rank_adapter", "ptuning2"])
def test_the_modes_mindpet_names_go_by_its_parameter_names(mode):
    class Foreign(nn.Cell):
        def __init__(self):
            super().__init__()
            self.base = nn.Dense(2, 2)
            self.part = Parameter(Tensor(np.zeros(3, np.float32)), name=f"mindpet_delta_{mode}_part")

    net = Foreign()
    freeze_delta(net, mode.upper())
    assert training(net) == {"part"}


def test_by_hand_too():
    net = nn.SequentialCell(LoRADense(4, 4, 2, 2), nn.Dense(4, 4))
    freeze_delta(net, "lora")
    assert training(net) == {"0.mindpet_delta_lora_a", "0.mindpet_delta_lora_b"}


HISTORIES = {
    "nothing": lambda net: None, "itself": lambda net: freeze_delta(net, "lora"),
    "bitfit": lambda net: freeze_delta(net, "bitfit"), "all frozen": lambda net: freeze_modules(net, include=["*"]),
    "all unfrozen": lambda net: freeze_modules(net, exclude=["*"]),
    "lora with lists": lambda net: freeze_delta(net, "lora", include=["*to_q*"], exclude=["classifier*"]),
}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_the_result_does_not_depend_on_what_was_done_before(history):
    for mode, expected in (("lora", LORA), ("bitfit", BIASES)):
        net = adapted()
        history(net)
        freeze_delta(net, mode)
        assert training(net) == expected


def test_lists_beside_a_mode():
    net = adapted()
    freeze_delta(net, "lora", include=["*to_out*"], exclude=["classifier.*"])
    assert training(net) == {item for item in LORA if "to_q" in item} | {"classifier.weight", "classifier.bias"}
    freeze_delta(net, "lora", exclude=["*lora*", "classifier.weight"])
    assert training(net) == LORA | {"classifier.weight"}


def test_a_name_on_both_lists_is_left_alone_by_them():
    net = adapted()
    freeze_delta(net, "lora", include=["*"], exclude=["*lora*", "classifier*"])
    # Frozen by the mode, named by both lists: stays frozen.
    assert training(net) == LORA
    thaw(net)
    freeze_modules(net, include=["classifier*"], exclude=["classifier.bias"])
    assert "classifier.bias" in training(net) and "classifier.weight" not in training(net)
    freeze_modules(net, include=["*bias"])
    freeze_modules(net, include=["classifier*"], exclude=["classifier.bias"])
    assert "classifier.bias" not in training(net)


def test_freeze_modules_touches_only_what_it_names():
    net = Classifier()
    before = training(net)
    freeze_modules(net, include=["embedding.*", "*norm*"])
    frozen = {"embedding.embedding_table", "attention.norm.gamma", "attention.norm.beta"}
    assert training(net) == before - frozen
    freeze_modules(net, exclude=["*norm.gamma"])
    assert training(net) == before - frozen | {"attention.norm.gamma"}
    freeze_modules(net, exclude=["*norm.gamma"])
    assert training(net) == before - frozen | {"attention.norm.gamma"}


def test_tuples_are_lists_too():
    net = Classifier()
    freeze_modules(net, include=("*embedding*",))
    assert not net.embedding.embedding_table.requires_grad


@pytest.mark.parametrize("pattern", ["classifier", "weight", "classifier.weigh?", "[c]lassifier.weight",
                                     "CLASSIFIER.weight", "classifier.weight.", ".*weight"])
def test_only_the_star_is_special_and_the_whole_path_must_match(pattern):
    net = Classifier()
    with unchanged(net), pytest.raises(ValueError, match="matches no parameter"):
        freeze_modules(net, include=[pattern])


def test_path_and_parameter_name_both_count():
    class Renamed(nn.Cell):
        def __init__(self):
            super().__init__()
            self.path_name = Parameter(Tensor(np.zeros(3, np.float32)), name="own_name")
            self.other = Parameter(Tensor(np.zeros(3, np.float32)), name="other")

    for pattern in ("path_name", "own_name", "*own*"):
        net = Renamed()
        freeze_modules(net, include=[pattern])
        assert training(net) == {"other"}


def test_a_cell_list_built_by_append_goes_by_both_names():
    blocks = nn.CellList()
    for _ in range(3):
        blocks.append(nn.SequentialCell(nn.Dense(2, 2)))
    net = nn.SequentialCell(*blocks)
    differing = [(path, item) for path, item in net.parameters_and_names() if path != item.name]
    for path, item in differing:
        for spelling in (path, item.name):
            thaw(net)
            freeze_modules(net, include=[spelling])
            assert not item.requires_grad


def test_the_steering_parameter_is_never_thawed():
    net = adapted()
    freeze_modules(net, exclude=["*"])
    freeze_delta(net, "lora", exclude=["*lora*"])
    assert not net.attention.to_q.scaling.requires_grad
    with pytest.raises(ValueError, match="matches no parameter"):
        freeze_modules(net, exclude=["*scaling"])


def write(text: str) -> Path:
    Path("freeze.yaml").write_text(text, encoding="utf-8")
    return Path("freeze.yaml")


def test_yaml_with_one_list_or_both():
    net = thaw(adapted())
    everything = training(net)
    freeze_from_config(net, write("freeze:\n  include: ['*embedding*']\n"))
    assert training(net) == everything - {"embedding.embedding_table"}
    freeze_from_config(net, str(write("freeze:\n  exclude:\n    - '*embedding*'\n")))
    assert training(net) == everything
    freeze_from_config(net, write("freeze:\n  include: ['*']\n  exclude: ['*lora*']\nother: 1\n"))
    assert training(net) == LORA
    freeze_from_config(net, write("freeze:\n  include: ['*lora_a']\n  exclude: null\n"))
    assert training(net) == {item for item in LORA if item.endswith("_b")}


BAD_YAML = [
    ("freez:\n  include: ['*']\n", ValueError, "expected a 'freeze' block.*Did you mean 'freez'"),
    ("freeze:\n  includ: ['*']\n", ValueError, "unknown key 'includ'.*Did you mean 'include'"),
    ("freeze:\n", ValueError, "expected a 'freeze' block"), ("freeze: {}\n", ValueError, "expected a 'freeze' block"),
    ("freeze: ['*']\n", ValueError, "expected a 'freeze' block"), ("- 1\n", ValueError, "list"), ("", ValueError, "no"),
    ("freeze:\n  include: '*'\n", TypeError, "include must be a list"),
    ("freeze:\n  include: [1]\n", TypeError, "include must be a list of strings"),
    ("freeze:\n  include: []\n", ValueError, "include is an empty list"),
    ("freeze:\n  include: ['*nothing*']\n", ValueError, "matches no parameter"),
    ("freeze: {include: ['*'\n", ValueError, "not valid YAML"),
    ("freeze: !!python/object/apply:os.system ['touch hacked']\n", ValueError, "not valid YAML"),
]


@pytest.mark.parametrize("text, error, message", BAD_YAML)
def test_a_wrong_yaml_is_refused(text, error, message):
    net = Classifier()
    with unchanged(net), pytest.raises(error, match=message):
        freeze_from_config(net, write(text))
    assert not Path("hacked").exists()


def test_a_missing_yaml_stays_missing():
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        freeze_from_config(Classifier(), "nowhere.yaml")
    assert not Path("nowhere.yaml").exists()


def test_a_read_only_yaml_is_read():
    path = write("freeze:\n  include: ['*']\n")
    path.chmod(0o400)
    assert freeze_from_config(Classifier(), path).trainable == 0


REFUSED = [
    (lambda net: freeze_delta(net, "lroa"), ValueError, "'lroa'.*Did you mean 'lora'"),
    (lambda net: freeze_delta(net, ""), ValueError, "mode must be one of lora, prefixtuning"),
    (lambda net: freeze_delta(net, None), TypeError, "mode must be one of"),
    (lambda net: freeze_delta(net, ["lora"]), TypeError, "mode must be one of"),
    (lambda net: freeze_delta(net, "adapter"), ValueError, "leaves nothing trainable.*Modes that fit this net: lora"),
    (lambda net: freeze_delta(net, "lora", include=["*"]), ValueError, "leaves nothing trainable"),
    (lambda net: freeze_delta(net, "lora", include=["*clasifier*"]), ValueError, "'\\*clasifier\\*'.*'classifier"),
    (lambda net: freeze_delta(net, "lora", exclude=["*no*", "*nothing*"]), ValueError, "'\\*nothing\\*'"),
    (lambda net: freeze_delta(net, "lora", include=[]), ValueError, "include is an empty list"),
    (lambda net: freeze_delta(net, "lora", include="*"), TypeError, "include must be a list"),
    (lambda net: freeze_modules(net), ValueError, "include, exclude or both"),
    (lambda net: freeze_modules(net, include=[1]), TypeError, "include must be a list of strings"),
    (lambda net: freeze_modules(net, include=[""]), TypeError, "include must be a list of strings"),
    (lambda net: freeze_modules(net, include=["embedding.embedding_tabel"]), ValueError, "embedding_table"),
    (lambda net: freeze_modules(net, ["*bias"], ["*no such*"]), ValueError, "exclude pattern"),
]


@pytest.mark.parametrize("call, error, message", REFUSED)
def test_a_refused_call_changes_nothing(call, error, message):
    net = adapted()
    with unchanged(net), pytest.raises(error, match=message):
        call(net)


@pytest.mark.parametrize("call", [lambda net: freeze_delta(net, "lora"), lambda net: freeze_modules(net, ["*"]),
                                  lambda net: freeze_from_config(net, "a.yaml")])
@pytest.mark.parametrize("net", ["net", None, 3, [nn.Dense(2, 2)], nn.Dense])
def test_a_non_cell_is_refused(call, net):
    with pytest.raises(TypeError, match="mindspore.nn.Cell"):
        call(net)


def test_lora_on_a_plain_net_says_what_to_do():
    with pytest.raises(ValueError, match="get_pet_model"):
        freeze_delta(nn.SequentialCell(nn.Dense(2, 2, has_bias=False)), "lora")


def test_the_report():
    net = adapted()
    report = freeze_delta(net, "lora")
    base = sum(item.size for item in Classifier().get_parameters())
    assert (report.trainable, report.total) == (48, base + 48)
    assert report.share == pytest.approx(100 * 48 / (base + 48))
    assert str(report) == f"trainable params: 48 || all params: {base + 48} || trainable%: {report.share:.4f}"
    assert freeze_modules(net, include=["*lora*"]).trainable == 0


def test_the_reports_numbers_have_separators():
    report = mp.graph.TrainableReport(797_184, 860_318_148)
    assert str(report) == "trainable params: 797,184 || all params: 860,318,148 || trainable%: 0.0927"


def test_a_shared_parameter_counts_once():
    net = nn.SequentialCell(nn.Dense(4, 4, has_bias=False), nn.Dense(4, 4, has_bias=False))
    net[1].weight = net[0].weight
    assert freeze_modules(net, exclude=["*"]).total == 16


def test_what_cannot_train_is_refused():
    net = nn.SequentialCell(nn.Dense(4, 4), nn.Dense(4, 4))
    net[1].weight = Parameter(Tensor(np.ones((4, 4), np.int8)), name="1.weight", requires_grad=False)
    with pytest.raises(ValueError, match="modules_to_save holds 1.weight, whose type Int8 cannot train"):
        mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"], modules_to_save=["1"]))
    with pytest.raises(ValueError, match="freeze_exclude pattern '1.weight' names 1.weight, whose type Int8 cannot"):
        mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"], freeze_exclude=["1.weight"]))
    # Among others it stays as it is.
    mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"], freeze_exclude=["1.*"]))
    assert [item.requires_grad for item in (net[1].weight, net[1].bias)] == [False, True]
