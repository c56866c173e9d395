"""Adapters from format to format: every value and setting, or a refusal that says which."""
from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from offline_bases import A, lora, weights, write_adapter, write_shards

from mindpet_lite.cli import main
from mindpet_lite.formats.adapters import read_adapter, to_files, write_files
from mindpet_lite.formats.files import BF16, read_tensors, to_bytes
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.offline import convert as conversion
from mindpet_lite.offline.convert import convert, differences

pytest.importorskip("click")
PLACES = {"peft": "p{}", "diffusers": "d{}.safetensors", "kohya": "k{}.safetensors", "mindpet": "m{}.ckpt",
          "mindformers": "f{}"}
SHAPES = {"mid_block.attentions.0.to_q": (12, 8), "mid_block.attentions.0.to_k": (6, 8)}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("one, other", list(itertools.permutations(PLACES, 2)))
def test_there_and_back(one, other, dtype):
    state = lora(SHAPES, alpha=5.5, dtype=BF16 if dtype == "bfloat16" else np.dtype(dtype))
    first, second, third = (Path(PLACES[kind].format(number)) for number, kind in enumerate((one, other, one)))
    write_files(to_files(state, one, first))
    done = convert(first, second, other)
    assert (done.kind, done.layers) == (one, 2)
    assert differences(state, read_adapter(second).state) == [] and read_adapter(second).kind == other
    convert(second, third, one)
    assert differences(state, read_adapter(third).state) == []
    assert one != "peft" or read_adapter(third).state.config == read_adapter(first).state.config


@pytest.mark.parametrize("name", ["plain", "rslora", "rank_alpha_pattern", "dora", "embedding", "lora_bias",
                                  "modules_to_save", "trainable_token_indices", "init_pissa"])
@pytest.mark.parametrize("kind", ["diffusers", "kohya", "mindpet", "mindformers"])
def test_pefts_adapters_come_back_as_they_were_or_are_refused(kind, name, shared):
    source = shared / "fixtures/peft/llama_tiny" / f"lora_{name}"
    try:
        convert(source, Path(PLACES[kind].format(0)), kind)
    except ValueError as error:
        assert name not in ("plain", "rslora") and "cannot be written as" in str(error)
        assert list(Path(".").iterdir()) == []
        return
    convert(Path(PLACES[kind].format(0)), Path("back"), "peft")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        one, other = (Path(folder, file) for folder in ("back", source))
        if file.endswith("json"):
            assert json.loads(one.read_text()) == json.loads(other.read_text())
        else:
            ours, theirs = read_tensors(one), read_tensors(other)
            assert ours.keys() == theirs.keys()
            assert all(ours[key].tobytes() == theirs[key].tobytes() for key in theirs)


def test_alpha_is_the_adapters_in_every_format(shared):
    """diffusers' own tool writes alpha = rank."""
    source = shared / "fixtures/peft/unet_tiny/peft"
    convert(source, Path("k.safetensors"), "kohya")
    ours, theirs = (read_tensors(path) for path in (Path("k.safetensors"), source.parent / "kohya/lora.safetensors"))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert np.array_equal(ours[key], value), key


def test_what_a_format_cannot_hold_is_said(capfd):
    state = lora(SHAPES)
    state.layers["mid_block.attentions.0.to_q"].settings["lora_alpha"] = 7
    write_adapter(Path("adapter"), state)
    assert main(["convert", "adapter", "out", "--to", "mindformers"]) == 2
    errors = capfd.readouterr().err
    assert "one alpha for all layers" in errors and errors.count("\n") == 1 and not Path("out").exists()


def test_adapters_that_do_not_say_rank_and_alpha_have_no_place_in_pefts_config(capfd):
    Path("bare.safetensors").write_bytes(to_bytes({"x.mindpet_delta_lora_a": np.ones((2, 4), np.float32),
                                                   "x.mindpet_delta_lora_b": np.ones((4, 2), np.float32)}))
    assert main(["convert", "bare.safetensors", "out", "--to", "peft"]) == 2
    assert "x: rank and alpha are not known" in capfd.readouterr().err and not Path("out").exists()


@pytest.mark.parametrize("dtype, value, message", [(np.float32, np.nan, "to_q.mindpet_delta_lora_a holds NaN"),
                                                   (np.int32, 1, "to_q.mindpet_delta_lora_b is of type I32")])
def test_values_that_are_none_of_an_adapter_are_refused(dtype, value, message, capfd):
    write_adapter(Path("adapter"), AdapterState("lora", {"to_q": LayerState(
        {"mindpet_delta_lora_a": np.full((2, 4), value, dtype), "mindpet_delta_lora_b": np.ones((4, 2), dtype)},
        {"lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.0})}))
    assert main(["convert", "adapter", "out", "--to", "peft"]) == 2
    assert message in capfd.readouterr().err and not Path("out").exists()


def test_long_lists_of_problems_are_cut_on_the_command_line(capfd):
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    Path("adapter/adapter_model.safetensors").write_bytes(to_bytes(
        {f"base_model.model.l{number}.lora_A.weight": np.ones((2, 4), np.float32) for number in range(100)}))
    assert main(["inspect", "adapter"]) == 2
    errors = capfd.readouterr().err
    assert "l0 lacks lora_B.weight" in errors and "and 90 more." in errors and "l50" not in errors


def test_a_codec_that_lost_something_would_be_found(monkeypatch):
    source = write_adapter(Path("adapter"), lora(SHAPES))
    whole = conversion.to_files

    def losing(state, kind, path, methods):
        state.layers["mid_block.attentions.0.to_q"].settings["lora_alpha"] += 1
        found = whole(state, kind, path, methods)
        state.layers["mid_block.attentions.0.to_q"].settings["lora_alpha"] -= 1
        return found

    monkeypatch.setattr(conversion, "to_files", losing)
    with pytest.raises(ValueError, match="to_q: lora_alpha=5 became 6"):
        convert(source, Path("k.safetensors"), "kohya")
    assert not Path("k.safetensors").exists()


@pytest.mark.parametrize("target, to", [("adapter", "mindformers"), ("adapter/x.safetensors", "kohya"),
                                        ("adapter/adapter_model.safetensors", "kohya"), ("link", "mindformers")])
def test_the_source_is_never_written_to(target, to, capfd):
    source = write_adapter(Path("adapter"), lora(SHAPES))
    Path("link").symlink_to("adapter")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert main(["convert", "adapter", target, "--to", to]) == 2
    assert "written into the adapter that is converted" in capfd.readouterr().err
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_a_file_is_not_replaced_by_its_own_conversion(capfd):
    write_files(to_files(lora(SHAPES), "kohya", Path("a.safetensors")))
    before = Path("a.safetensors").read_bytes()
    assert main(["convert", "a.safetensors", "a.safetensors", "--to", "diffusers"]) == 2
    assert Path("a.safetensors").read_bytes() == before
    assert main(["convert", "a.safetensors", "b.safetensors", "--to", "diffusers"]) == 0
    assert main(["convert", "a.safetensors", "b.safetensors", "--to", "kohya"]) == 0
    assert read_adapter(Path("b.safetensors")).kind == "kohya"


def test_new_names_by_table_patterns_and_base():
    source = write_adapter(Path("adapter"), lora({"model.layers.0.self_attn.q_proj": (24, 24)}))

    def paths(where):
        return list(read_adapter(Path(where)).state.layers)

    convert(source, Path("one"), "peft", table={"model.layers.0.self_attn.q_proj": "blocks.0.q"})
    convert(source, Path("two"), "peft", table=[(r"^model\.layers\.", "h."), ("self_attn.", "")])
    assert (paths("one"), paths("two")) == (["blocks.0.q"], ["h.0.q_proj"])
    Path("wq.safetensors").write_bytes(to_bytes({"layers.0.attention.wq.weight": np.ones((24, 24), np.float32)}))
    convert(source, Path("three"), "mindformers", base=Path("wq.safetensors"))
    assert paths("three") == ["layers.0.attention.wq"]
    with pytest.raises(ValueError, match="renames model.layers.1, but the adapter has no such layer"):
        convert(source, Path("four"), "peft", table={"model.layers.1": "x"})
    write_shards(Path("base"), weights(layers=1), 1)
    with pytest.raises(ValueError, match="does not fit"):
        convert(source, Path("four"), "peft", table={"model.layers.0.self_attn.q_proj": "nowhere"}, base=Path("base"))


def test_kohyas_names_that_hide_their_paths_by_table():
    Path("k.safetensors").write_bytes(to_bytes({
        "lora_unet_my_layer.lora_down.weight": np.ones((2, 4), np.float32),
        "lora_unet_my_layer.lora_up.weight": np.ones((4, 2), np.float32)}))
    with pytest.raises(ValueError, match="underscores do not say"):
        convert(Path("k.safetensors"), Path("out"), "peft")
    convert(Path("k.safetensors"), Path("out"), "peft", table={"my_layer": "my.layer"})
    assert list(read_adapter(Path("out")).state.layers) == ["my.layer"]


def test_names_on_the_command_line(capfd):
    write_adapter(Path("adapter"), lora({"a.b": (4, 4)}))
    Path("names.json").write_text(json.dumps({"a.b": "c"}))
    assert main(["convert", "adapter", "one", "--to", "peft", "--names", "names.json"]) == 0
    assert "converted 1 layers from peft to peft" in capfd.readouterr().out
    Path("names.yaml").write_text("patterns:\n- ['a\\.(.)', 'x.\\1']\n")
    assert main(["convert", "adapter", "two", "--to", "peft", "--names", "names.yaml"]) == 0
    assert [list(read_adapter(Path(name)).state.layers) for name in ("one", "two")] == [["c"], ["x.b"]]
    for text in ("patterns: [['(', 'x']]", "patterns: [['a', '\\2']]", "a: 1", "patterns: {a: b}", "[1]"):
        Path("names.yaml").write_text(text)
        capfd.readouterr()
        assert main(["convert", "adapter", "three", "--to", "peft", "--names", "names.yaml"]) == 2
        errors = capfd.readouterr().err
        assert errors.startswith("mindpet-lite: names.yaml: ") and errors.count("\n") == 1, text


def test_every_value_counts():
    state = lora(SHAPES)
    other = lora(SHAPES)
    other.layers["mid_block.attentions.0.to_q"].tensors[A][0, 0] += 1e-6
    assert differences(state, other) == [f"mid_block.attentions.0.to_q.{A} changed."]
    assert differences(state, lora({**SHAPES, "more": (2, 2)})) == ["more is in one of them only."]
