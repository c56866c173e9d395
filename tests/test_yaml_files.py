"""YAML files as from strangers: what aliases stand for, keys that stand twice, sizes."""
from __future__ import annotations

from pathlib import Path

import pytest
from nets import Attention, unchanged

import mindpet_lite as mp
from mindpet_lite.yaml_files import read_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{number}: &a{number} [{', '.join(9 * [f'*a{number - 1}'])}]\n" for number in range(1, 9))


def read(text: str) -> dict:
    Path("file.yaml").write_text(text, encoding="utf-8")
    return read_yaml("file.yaml")


@pytest.mark.parametrize("text", [
    LAUGHS, LAUGHS + "pet_config: {pet_type: lora, target_modules: *a8}\n",
    LAUGHS.replace("[", "{k: [").replace("]", "]}"), "freeze: &f {include: *f}\n", "a: &a [*a]\n"],
    ids=["lists", "used", "mappings", "holds itself", "list holds itself"])
def test_what_aliases_stand_for_is_bounded(text):
    with pytest.raises(ValueError, match="file.yaml is not valid YAML.*(stands for more than|holds itself)") as caught:
        read(text)
    assert len(str(caught.value)) < 300
    net = Attention()
    for call in (lambda: mp.get_pet_model(net, "file.yaml"), lambda: mp.freeze_from_config(net, "file.yaml")):
        with unchanged(net), pytest.raises(ValueError, match="stands for more than|holds itself"):
            call()


def test_aliases_and_merge_keys_work():
    text = ("defaults: &d {lora_rank: 4, lora_alpha: 8}\nnames: &n [to_q]\n"
            "pet_config:\n  <<: *d\n  pet_type: lora\n  lora_alpha: 16\n  target_modules: *n\n")
    found = read(text)["pet_config"]
    assert found == {"lora_rank": 4, "lora_alpha": 16, "pet_type": "lora", "target_modules": ["to_q"]}
    net = mp.get_pet_model(Attention(), "file.yaml")
    assert (net.to_q.lora_rank, net.to_q.lora_alpha) == (4, 16)


@pytest.mark.parametrize("text, lines", [
    ("pet_config:\n  lora_rank: 64\n  pet_type: lora\n  lora_rank: 2\n", "2 and 4"),
    ("freeze: {include: ['*'], exclude: ['a'], include: ['b']}\n", "1 and 1"),
    ("a: 1\nb:\n- {c: 1}\na: 1\n", "1 and 4"), ("a: {k: 1, 'k': 2}\n", "1 and 1"),
    ("yes: 1\ntrue: 2\n", "1 and 2"), ("a: {1: 1, 0x1: 2}\n", "1 and 1"),
    ("b: &b {x: 1}\na:\n  <<: *b\n  <<: *b\n", "3 and 4: list what is merged after one"),
    ("b: &b {x: 1, x: 2}\na: {<<: *b}\n", "1 and 1")])
def test_a_key_that_stands_twice_is_an_error(text, lines):
    with pytest.raises(ValueError, match=f"file.yaml is not valid YAML: the key '.*' stands twice, in lines {lines}"):
        read(text)


@pytest.mark.parametrize("text", [
    "a: !!bool x\n", "a: !!int ''\n", "a: !!float x\n", "a: !!timestamp x\n", "a: 9999-99-99\n", "a: {[1]: 2}\n",
    "a: !!python/object/apply:os.system [id]\n", "a: 0x" + 101 * "f", "a: " + ":".join(["1"] * 60),
    "a: !!set [x]\n", "{a: 1}: 2\n", "&a a: !!omap *a\n"])
def test_what_no_tag_suits_is_refused(text):
    with pytest.raises(ValueError, match="file.yaml is not valid YAML: ") as caught:
        read(text)
    assert len(str(caught.value)) < 500


def test_many_values_and_long_texts_under_many_aliases_are_refused_at_once():
    for text in ("a: [" + "[]," * 150_000 + "]\n", f"a: &a {'x' * 9000}\nb: [" + "*a, " * 2000 + "]\n"):
        with pytest.raises(ValueError, match="it stands for more than 100000 values"):
            read(text)


def test_sizes_and_depth_are_bounded():
    for text, message in (("[" * 5000 + "]" * 5000, "nested too deeply"), ("a: " + "x" * 10_000_000, "larger than")):
        with pytest.raises(ValueError, match=message) as caught:
            read(text)
        assert len(str(caught.value)) < 300
    with pytest.raises(ValueError, match="is not valid YAML"):
        read("a: " + "9" * 10_000)
    assert read("a: " + "x" * 100_000) == {"a": "x" * 100_000}
