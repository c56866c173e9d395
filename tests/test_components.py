"""Components of a diffusion pipeline: the part of a file, what is placed where, what a file says of itself."""
from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from adapters import A, B, assert_same, dense, lora, read
from mindspore import nn

import mindpet_lite as mp
from mindpet_lite.cli import main
from mindpet_lite.formats import diffusers, kohya
from mindpet_lite.formats.adapters import read_adapter, to_files, write_files
from mindpet_lite.formats.base_hash import FIELD
from mindpet_lite.formats.component import part
from mindpet_lite.formats.files import to_bytes
from mindpet_lite.names.components import COMPONENTS, component_of
from mindpet_lite.names.placing import map_names
from mindpet_lite.offline.convert import convert
from mindpet_lite.offline.merge import merge

UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FLUX = "transformer_blocks.0.attn.to_q"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"


class Net(nn.Cell):
    """Layers under any paths."""

    def __init__(self, *paths: str) -> None:
        super().__init__()
        for path in paths:
            cell = self
            *parts, last = path.split(".")
            for name in parts:
                if name not in cell._cells:
                    setattr(cell, name, nn.Cell())
                cell = cell._cells[name]
            setattr(cell, last, nn.Dense(3, 5, has_bias=False))


def adapted(net):
    return {path: cell for path, cell in net.cells_and_names() if isinstance(cell, mp.LoRADense)}


def write(name, layers, kind="diffusers", **fields):
    write_files(to_files(lora(layers, **fields), kind, Path(name)))
    return Path(name)


@pytest.fixture
def both():
    """A file of a U-Net and a text encoder."""
    return write("both.safetensors", {f"unet.{UNET}": dense(), f"text_encoder.{CLIP}": dense(seed=3)})


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_load_adapter_takes_a_part_of_a_file(kind):
    layers = {f"unet.{UNET}": dense(), f"text_encoder.{CLIP}": dense(seed=3), f"text_encoder_2.{CLIP}": dense(seed=5)}
    file = write("all.safetensors", layers, kind)
    for component, path in (("unet", UNET), ("text_encoder", CLIP), ("text_encoder_2", CLIP)):
        net = Net(path)
        with pytest.raises(ValueError, match="adapters of unet, text_encoder, text_encoder_2: .*component='unet'"):
            mp.load_adapter(net, file)
        assert not adapted(net)
        mp.load_adapter(net, file, component=component)
        (layer,) = adapted(net).values()
        assert np.array_equal(layer.mindpet_delta_lora_a.asnumpy(), layers[f"{component}.{path}"].tensors[A])
        # It is known which component it was.
        mp.save_adapter(net, "again.safetensors", kind)
        assert read_adapter(Path("again.safetensors")).state.component == component
    pipeline = Net(f"unet.{UNET}", f"text_encoder.{CLIP}", f"text_encoder_2.{CLIP}")
    mp.load_adapter(pipeline, file, component="text_encoder_2")
    assert list(adapted(pipeline)) == [f"text_encoder_2.{CLIP}"]
    mp.load_adapter(whole := Net(*layers), file)
    assert set(adapted(whole)) == set(layers)
    with pytest.raises(ValueError, match="component is 'transformer', but the adapter is of text_encoder and"):
        mp.load_adapter(Net(FLUX), file, component="transformer")
    with pytest.raises(ValueError, match="component must be one of 'unet', 'text_encoder'.*but got 'te'"):
        mp.load_adapter(Net(FLUX), file, component="te")


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_a_component_is_never_placed_in_another(kind):
    second = write("te2.safetensors", {CLIP: dense()}, kind, component="text_encoder_2")
    for net in (Net(CLIP), Net(f"text_encoder.{CLIP}", f"unet.{UNET}"), Net(f"cond_stage_model.transformer.{CLIP}")):
        with pytest.raises(ValueError, match="the file is of the text_encoder_2, and the net is the text_encoder"):
            mp.load_adapter(net, second)
        assert not adapted(net)
    mp.load_adapter(net := Net(CLIP), second, component="text_encoder_2")
    assert list(adapted(net)) == [CLIP]
    first = write("te.safetensors", {CLIP: dense()}, kind, component="text_encoder")
    for path in (CLIP, CLIP.removeprefix("text_model."), f"cond_stage_model.transformer.{CLIP}"):
        mp.load_adapter(net := Net(path), first)
        assert list(adapted(net)) == [path]
    # PEFT's directories do not say which text encoder they are of.
    clip = write("clip", {CLIP: dense()}, "peft")
    pipeline = [f"text_encoder.{CLIP}", f"text_encoder_2.{CLIP}"]
    with pytest.raises(ValueError, match="the file does not say of which component"):
        mp.load_adapter(Net(*pipeline), clip)
    mp.load_adapter(net := Net(*pipeline), clip, component="text_encoder_2")
    assert list(adapted(net)) == pipeline[1:]


def test_merge_and_convert_take_a_part(both):
    weight = np.ones((5, 3), np.float32)
    base = Path("unet.safetensors")
    base.write_bytes(to_bytes({f"{UNET}.weight": weight}))
    with pytest.raises(ValueError, match="component='unet' .--component unet. takes its part"):
        merge(base, both, Path("merged"), quiet=True)
    assert main(["merge", "--base", "unet.safetensors", "--adapter", str(both), "--out", "merged", "-q",
                 "--component", "unet"]) == 0
    layer = dense()
    np.testing.assert_allclose(read(Path("merged/unet.safetensors"))[0][f"{UNET}.weight"],
                               weight + 2 * layer.tensors[B] @ layer.tensors[A], rtol=1e-6)
    assert main(["convert", str(both), "te", "--to", "peft", "--component", "text_encoder"]) == 0
    assert_same(read_adapter(Path("te")).state, lora({CLIP: dense(seed=3)}), config=False)
    convert(both, Path("u.safetensors"), "kohya", base=base, component="unet")
    assert list(read_adapter(Path("u.safetensors")).state.layers) == [UNET]


@pytest.mark.parametrize("path, named", [(UNET, "unet"), (FLUX, "transformer"), (CLIP, "text_encoder")])
def test_a_directory_of_pefts_is_named(path, named):
    source = write("peft", {path: dense()}, "peft")
    for kind in ("diffusers", "kohya"):
        if named == "unet":
            convert(source, Path("a.safetensors"), kind)
            assert read_adapter(Path("a.safetensors")).state.component == "unet"
            continue
        with pytest.raises(ValueError, match=f"those of a {named}, .* component='{named}' .--component {named}., or"):
            convert(source, Path("a.safetensors"), kind)
        with pytest.raises(ValueError, match=f"those of a {named}, "):
            mp.save_adapter(mp.load_adapter(Net(path), source), "a.safetensors", kind)
        for component in [name for name in COMPONENTS if name.startswith(named)]:
            if (kind, component) == ("kohya", "transformer_2"):
                continue
            convert(source, Path("a.safetensors"), kind, component=component)
            found = read_adapter(Path("a.safetensors")).state
            assert (found.component, list(found.layers)) == (component, [path])
            mp.save_adapter(mp.load_adapter(Net(path), source), "b.safetensors", kind, component=component)
            assert read(Path("b.safetensors"))[0].keys() == read(Path("a.safetensors"))[0].keys()
            # No component in the paths of what PEFT reads.
            convert(Path("a.safetensors"), Path("back"), "peft")
            assert read(Path("back/adapter_model.safetensors"))[0].keys() == read(
                Path("peft/adapter_model.safetensors"))[0].keys()
            with pytest.raises(ValueError, match=f"component is 'unet', but the adapter is of {component}"):
                convert(Path("a.safetensors"), Path("c.safetensors"), kind, component="unet")
    with pytest.raises(ValueError, match="the files of mindformers do not say a component: leave it out"):
        convert(source, Path("m"), "mindformers", component=named)
    with pytest.raises(ValueError, match="the files of peft do not say a component: leave it out"):
        mp.save_adapter(mp.load_adapter(Net(path), source), "m", component=named)


def test_save_adapter_takes_a_part_of_a_pipeline(both):
    net = mp.load_adapter(Net(f"unet.{UNET}", f"text_encoder.{CLIP}"), both)
    mp.save_adapter(net, "te", component="text_encoder")
    assert_same(read_adapter(Path("te")).state, lora({CLIP: dense(seed=3)}), config=False)
    mp.load_adapter(fresh := Net(CLIP), "te")
    assert list(adapted(fresh)) == [CLIP]


def test_a_part_has_its_own_parameters_and_hashes():
    state = lora({"unet.a": dense(), "vae.b": dense()}, config={FIELD: {"unet.a": "1", "vae.b": "2"}},
                 trained={"unet.c.weight": np.ones(2), "vae.d.weight": np.ones(1)})
    found = part(state, "unet")
    assert found.config == {FIELD: {"a": "1"}}
    assert list(found.layers) == ["a"] and list(found.trained) == ["c.weight"] and found.component == "unet"
    assert part(state, None) is state


def test_component_of():
    for paths, component in (([UNET], "unet"), ([f"x.{UNET}"], ""), (["input_blocks.1.1.proj_in"], "unet"),
                             ([FLUX], "transformer"), (["transformer_blocks.0.any"], "transformer"),
                             (["blocks.0.self_attn.q"], "transformer"), (["to_q", "proj_out"], ""),
                             ([CLIP], "text_encoder"), (["encoder.block.0.layer.0.SelfAttention.q"], "text_encoder"),
                             (["model.layers.0.self_attn.q_proj"], ""), ([FLUX, UNET], "unet"), ([], "")):
        assert component_of(paths) == component, paths


def test_keys_that_say_no_component():
    pair = {f"{FLUX}.lora_A.weight": dense().tensors[A], f"{FLUX}.lora_B.weight": dense().tensors[B]}
    assert diffusers.decode(pair, {}).component == ""
    with pytest.raises(ValueError, match="those of a transformer"):
        diffusers.encode(diffusers.decode(pair, {}))
    unknown = {key.replace(FLUX, "diffusion_model.to_q"): value for key, value in pair.items()}
    state = diffusers.decode(unknown, {})
    assert (state.component, list(state.layers)) == ("diffusion_model", ["to_q"])
    assert part(state, "transformer").component == "transformer"
    tensors, _ = kohya.encode(state)
    assert set(tensors) == {f"lora_unet_to_q.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert kohya.decode(tensors, {}, ["to_q"]).component == "diffusion_model"


def test_base_parameters_follow_the_same_rule():
    net = Net("model.layer", "blocks.head")
    write("peft", {"layer": dense()}, "peft", trained={"head.weight": np.ones((5, 3), np.float32)})
    with pytest.raises(ValueError, match="head is no layer of the net. blocks.head ends as it does"):
        mp.load_adapter(net, "peft")
    assert not adapted(net)
    net = Net("model.layer", "network.head")
    mp.load_adapter(net, "peft")
    assert np.array_equal(net.network.head.weight.asnumpy(), np.ones((5, 3))) and list(adapted(net)) == ["model.layer"]
    # Also where every layer has its own path.
    mp.load_adapter(net := Net("layer", "model.head"), "peft")
    assert np.array_equal(net.model.head.weight.asnumpy(), np.ones((5, 3)))
    base = {"layer.weight": np.ones((5, 3), np.float32), "blocks.head.weight": np.zeros((5, 3), np.float32)}
    Path("base.safetensors").write_bytes(to_bytes(base))
    with pytest.raises(ValueError, match="head is no layer of the net. blocks.head ends as it does"):
        merge(Path("base.safetensors"), Path("peft"), Path("merged"), quiet=True)


@pytest.mark.parametrize("table", [{"toq": "self_q"}, [("toq", "self_q")]])
def test_a_name_map_that_renames_nothing(table):
    source = write("peft", {"to_q": dense()}, "peft")
    Path("base.safetensors").write_bytes(to_bytes({f"{name}.weight": np.ones((5, 3), np.float32)
                                                   for name in ("to_q", "self_q")}))
    message = "toq.* (no such layer. Close to it: to_q|in no layer of the adapter, such as to_q)"
    net = Net("to_q", "self_q")
    for call in (lambda: mp.load_adapter(net, source, name_map=table),
                 lambda: merge(Path("base.safetensors"), source, Path("out"), table=table, quiet=True),
                 lambda: convert(source, Path("out"), "peft", table=table),
                 lambda: convert(source, Path("out"), "peft", table=table, base=Path("base.safetensors"))):
        with pytest.raises(ValueError, match=message):
            call()
    assert not adapted(net) and not Path("out").exists()
    with pytest.raises(ValueError, match="gives 'to_q' the name '', which is none"):
        convert(source, Path("out"), "peft", table={"to_q": ""})


def test_a_parameters_name_is_mindpets_and_a_path_is_ours():
    """MindPet names a layer by its Parameters, whatever else has that path."""
    net = Net("first", "second")
    mp.get_pet_model(net, mp.LoraConfig(lora_rank=2, lora_alpha=4, target_modules=["first"]))
    for parameter in net.first.delta_parameters().values():
        parameter.name = parameter.name.replace("first", "second")
    tensors = {f"second.{name}": value for name, value in dense().tensors.items()}
    ms.save_checkpoint([{"name": name, "data": ms.Tensor(value)} for name, value in tensors.items()], "mindpet.ckpt")
    mp.load_adapter(net, "mindpet.ckpt")
    assert list(adapted(net)) == ["first"]
    assert np.array_equal(net.first.mindpet_delta_lora_a.asnumpy(), dense().tensors[A])


@pytest.mark.parametrize("component", ["transformer_2", "vae", "unet", "text_encoder_2"])
def test_layers_below_a_transformer_are_no_other_components(component):
    with pytest.raises(ValueError, match="transformer.blocks.0.to_q"):
        map_names(["transformer.blocks.0.to_q"], [f"{component}.blocks.0.to_q", f"{component}.blocks.1.to_q"])


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
@pytest.mark.parametrize("name, message", [
    ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", "place in its pipeline is not known"),
    ("text_encoders.qwen3_4b.transformer.model.layers.0.self_attn.q_proj", "place in its pipeline is not known"),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "is one of kohya's keys, in a file of another layout")])
def test_what_is_of_no_known_component_is_not_written_as_the_unets(name, message, to):
    tensors = {f"{path}.lora_{way}.weight": np.ones(shape, np.float32) for path in (name, f"diffusion_model.{UNET}")
               for way, shape in (("down", (2, 4)), ("up", (4, 2)))}
    Path("a.safetensors").write_bytes(to_bytes(tensors))
    with pytest.raises(ValueError, match=message):
        convert(Path("a.safetensors"), Path("b.safetensors"), to)
    assert not Path("b.safetensors").exists()
