"""Regular expressions that could take for ever, wherever a user gives one: refused, at once, with nothing changed."""
from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
from mindspore import nn
from nets import unchanged

import mindpet_lite as mp
from mindpet_lite.cli import main
from mindpet_lite.estimate.report import below, chosen
from mindpet_lite.graph.match import wildcard

NAME = "a" * 60
ENDLESS = ["(a+)+b", "(a|a)*b", "(.*a){20}", ".*.*.*.*.*.*b", "(?:a?){50}b", "((a*)*)*b", r"(\w+\.?)+!"]


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.CellList([nn.SequentialCell(OrderedDict([(NAME, nn.Dense(4, 4))]))])

    def construct(self, x):
        return self.blocks[0](x)


def lora(**fields: object) -> Callable[[nn.Cell, str], object]:
    """Return a call that gives a net a config with an expression where the fields hold None."""
    def call(net: nn.Cell, expression: str) -> object:
        own = {name: [expression] if value is list else {expression: 2} if value is dict else
               expression if value is None else value for name, value in fields.items()}
        return mp.get_pet_model(net, mp.LoraConfig(**{"target_modules": [NAME], **own}))
    return call


def load(net: nn.Cell, expression: str) -> object:
    mp.save_adapter(mp.get_pet_model(Net(), mp.LoraConfig(target_modules=[NAME])), "adapter")
    return mp.load_adapter(net, "adapter", name_map=[(expression, "x")])


PLACES = {
    "target_modules": lora(target_modules=None), "exclude_modules": lora(exclude_modules=None),
    "rank_pattern": lora(rank_pattern=dict), "alpha_pattern": lora(alpha_pattern=dict),
    "layers_pattern": lora(layers_pattern=list, layers_to_transform=[0]), "name_map": load,
    "net_recompute": mp.net_recompute, "estimate": lambda _, expression: chosen(expression, [NAME]),
    "exclude_layers": lambda _, expression: below(expression, [NAME])}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("expression", ENDLESS)
def test_what_could_take_for_ever_is_refused(place, expression):
    net, started = Net(), time.perf_counter()
    with unchanged(net), pytest.raises(ValueError, match="could take too long.* Write "):
        PLACES[place](net, expression)
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("expression", ["(", "(?P<a>a)(?P<a>a)", "a**"])
def test_what_is_no_expression_is_refused(place, expression):
    net = Net()
    with unchanged(net), pytest.raises(ValueError, match="is no regular expression") as caught:
        PLACES[place](net, expression)
    assert len(str(caught.value)) < 1000


def test_names_on_the_command_line(capfd):
    mp.save_adapter(mp.get_pet_model(Net(), mp.LoraConfig(target_modules=[NAME])), "adapter")
    Path("names.yaml").write_text("patterns:\n- ['(a+)+b', 'x']\n")
    assert main(["convert", "adapter", "new", "--to", "mindformers", "--names", "names.yaml"]) == 2
    assert "names.yaml" in (said := capfd.readouterr().err) and "could take too long" in said
    assert not Path("new").exists()


@pytest.mark.parametrize("expression", [rf".*{NAME}", r"blocks\.\d+\.a+", rf"blocks\.(0|1)\.{NAME}", r"(.*\.)?a{60}",
                                        r"[^.]*\.[^.]*\.[^.]*"])
def test_usual_expressions_are_taken(expression):
    assert mp.get_pet_model(Net(), mp.LoraConfig(target_modules=expression)).blocks[0][0].lora_rank == 8


def test_any_number_of_stars_takes_no_time():
    assert wildcard("*a" * 30 + "*b").fullmatch("a" * 200) is None
    for pattern, name, is_hit in (("*to_q*", "a.to_q.weight", True), ("a.*", "a.b", True), ("a.*", "a", False),
                                  ("a?b[c]", "a?b[c]", True), ("a?b", "axb", False), ("[ab]", "a", False),
                                  ("a", "ab", False), ("*", "", True), ("a\n*", "a\nb\nc", True), ("[!a]", "b", False)):
        assert bool(wildcard(pattern).fullmatch(name)) is is_hit, pattern
