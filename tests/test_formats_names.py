"""Whose layer is whose: by path, by end, by other libraries' names, by the user's table; kohya's underscores."""
from __future__ import annotations

import pytest
from adapters import assert_same, dense, lora, read, tensor

from mindpet_lite.arguments import did_you_mean
from mindpet_lite.formats.placed import placed
from mindpet_lite.names.placing import map_names
from mindpet_lite.names.table import near
from mindpet_lite.names.underscores import cut
from mindpet_lite.names.wrappers import WRAPPERS

ATTENTION = "transformer_blocks.0.attn1.to_q"
# Stable Diffusion 1: two residual blocks a level; diffusers' names and the original's.
SD1 = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.resnets.1.time_emb_proj": "input_blocks.2.0.emb_layers.1",
    f"down_blocks.0.attentions.0.{ATTENTION}": f"input_blocks.1.1.{ATTENTION}",
    f"down_blocks.0.attentions.1.{ATTENTION}": f"input_blocks.2.1.{ATTENTION}",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    f"down_blocks.1.attentions.0.{ATTENTION}": f"input_blocks.4.1.{ATTENTION}",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    f"down_blocks.2.attentions.1.{ATTENTION}": f"input_blocks.8.1.{ATTENTION}",
    "down_blocks.3.resnets.1.conv2": "input_blocks.11.0.out_layers.3",
    "mid_block.resnets.0.conv1": "middle_block.0.in_layers.2",
    "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.0.resnets.2.conv_shortcut": "output_blocks.2.0.skip_connection",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
    f"up_blocks.1.attentions.0.{ATTENTION}": f"output_blocks.3.1.{ATTENTION}",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    f"up_blocks.3.attentions.2.{ATTENTION}": f"output_blocks.11.1.{ATTENTION}",
    "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj":
        "output_blocks.11.1.transformer_blocks.0.ff.net.0.proj",
}
WUKONG = {"input_blocks.0.0": "input_blocks.0.0.conv", "out.2": "out.2.conv", "op": "op.conv",
          "in_layers.2": "in_layers_conv.conv", "out_layers.3": "out_layers_conv.conv",
          "skip_connection": "skip_connection.conv", "2.1.conv": "2.1.conv.conv", "5.2.conv": "5.2.conv.conv"}


def wukong(path: str) -> str:
    return next((path[:-len(end)] + own for end, own in WUKONG.items() if path.endswith(end)), path)


@pytest.mark.parametrize("prefixes", [("", ""), ("unet.", ""), ("unet.", "model.diffusion_model."), ("", "net.unet.")])
@pytest.mark.parametrize("other", [lambda path: path, wukong], ids=["sgm", "wukong"])
def test_the_unet_in_three_spellings(prefixes, other):
    ours = [prefixes[0] + path for path in SD1]
    theirs = [prefixes[1] + other(path) for path in SD1.values()]
    assert map_names(ours, theirs) == dict(zip(ours, theirs))
    assert map_names(theirs, ours) == dict(zip(theirs, ours))
    assert map_names([prefixes[0] + path for path in SD1.values()], theirs) == dict(
        zip([prefixes[0] + path for path in SD1.values()], theirs))


def test_cells_that_hold_others():
    net = ["input_blocks.3", "input_blocks.3.0", "input_blocks.3.0.op", "input_blocks.3.0.op.conv"]
    assert map_names(["down_blocks.0.downsamplers.0.conv"], net) == {
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op.conv"}
    for path in ("input_blocks.3.0.op", "unet.input_blocks.3.0.op"):
        assert map_names([path], net) == {path: "input_blocks.3.0.op.conv"}
        assert map_names([path], [f"net.{place}" for place in net]) == {path: "net.input_blocks.3.0.op.conv"}
        assert map_names([path], net[:-1]) == {path: net[-2]}
    assert map_names(["to_q"], ["model.to_q", "model.to_q.inner"]) == {"to_q": "model.to_q"}
    net = ["model.layers.0.attention", "model.layers.0.attention.wq", "model.layers.0.attention.wq.lora_dropout"]
    assert map_names(["model.layers.0.self_attn.q_proj"], net)["model.layers.0.self_attn.q_proj"] == net[1]


@pytest.mark.parametrize("ours, theirs", [
    ("model.layers.7.self_attn.q_proj", "model.layers.7.attention.wq"),
    ("model.layers.7.self_attn.o_proj", "model.layers.7.attention.wo"),
    ("model.layers.7.mlp.gate_proj", "model.layers.7.feed_forward.w1"),
    ("model.layers.7.mlp.down_proj", "layers.7.feed_forward.w2"),
    ("model.layers.7.mlp.up_proj", "network.model.layers.7.feed_forward.w3"),
    ("model.embed_tokens", "model.tok_embeddings"),
    ("bert.encoder.layer.3.attention.self.query", "bert.bert_encoder.layers.3.attention.attention.query_layer"),
    ("bert.encoder.layer.3.attention.self.value", "bert.bert.bert_encoder.encoder.blocks.3.attention.dense3"),
    ("encoder.layer.3.attention.output.dense", "bert.bert_encoder.encoder.blocks.3.attention.projection"),
    ("bert.encoder.layer.3.intermediate.dense", "bert.bert_encoder.layers.3.intermediate")])
def test_llama_and_bert(ours, theirs):
    decoys = ["model.layers.70.attention.wq", "bert.bert_encoder.layers.4.intermediate", "model", "model.layers.7"]
    assert map_names([ours], [*decoys, theirs]) == {ours: theirs}
    assert map_names([theirs], [*decoys, ours]) == {theirs: ours}


def test_all_of_a_llama():
    parts = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
             "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
             "mlp.down_proj": "feed_forward.w2"}
    table = {f"model.layers.{number}.{ours}": f"model.layers.{number}.{theirs}" for number in range(12)
             for ours, theirs in parts.items()}
    assert map_names(table, table.values()) == table
    assert map_names(table.values(), table) == {theirs: ours for ours, theirs in table.items()}


def test_exact_before_all_else():
    assert map_names(["a.b"], ["x.a.b", "a.b"]) == {"a.b": "a.b"}


@pytest.mark.parametrize("wrapper", [*WRAPPERS, "base_model.model", "module.base_model.model",
                                     "network._backbone.model"])
def test_wrappers_are_dropped_and_added(wrapper):
    short, long = ["layers.0.q_proj", "head"], [f"{wrapper}.layers.0.q_proj", f"{wrapper}.head"]
    assert map_names(short, [*long, "other.layers.0.q_proj"]) == dict(zip(short, long))
    assert map_names(long, [*short, "other.layers.0.q_proj"]) == dict(zip(long, short))
    assert map_names([f"net.{path}" for path in long], short) == {f"net.{path}": own for path, own in zip(long, short)}


def test_wrappers_in_the_middle():
    net = ["model.layers.0.q_proj", "model.layers.1.q_proj"]
    for path in ("model.layers._orig_mod.0.q_proj", "model.layers.0.module.q_proj", "module.layers.0.q_proj._orig_mod"):
        assert map_names([path], net) == {path: net[0]} and map_names(net[:1], [path]) == {net[0]: path}
    with pytest.raises(ValueError, match="is no layer of the net"):
        map_names(["layers.model.0.q_proj"], net)


def test_the_place_that_ends_as_the_path_comes_first():
    assert map_names(["model.norm"], ["network.norm", "network.model.norm"]) == {"model.norm": "network.model.norm"}
    with pytest.raises(ValueError, match="norm may be network.norm or network.model.norm: say which with a name map"):
        map_names(["norm"], ["network.norm", "network.model.norm"])
    # A part that is a layer itself is no wrapper.
    with pytest.raises(ValueError, match="net is no layer of the net"):
        map_names(["net"], ["model"])


SAY = "if that is meant, say so with name_map="


@pytest.mark.parametrize("files, net, message", [
    (["x.b"], ["b"], f"x.b is no layer of the net. b ends as it does: {SAY}{{'x.b': 'b'}} or --names"),
    (["b"], ["x.b"], f"b is no layer of the net. x.b ends as it does: {SAY}"),
    (["layers.0.q"], ["visual.layers.0.q", "language_model.layers.0.q"],
     "visual.layers.0.q and language_model.layers.0.q end as it does"),
    (["visual.layers.0.q"], ["layers.0.q"], "visual.layers.0.q is no layer of the net. layers.0.q ends as it does"),
    (["visual.layers.0.q"], ["model.layers.0.q"], "model.layers.0.q ends as it does"),
    (["model.layers.0.q"], ["language_model.model.layers.0.q"], "language_model.model.layers.0.q ends as it does"),
    (["blocks.7.head"], ["head"], "blocks.7.head is no layer of the net. head ends as it does"),
    (["head"], ["blocks.7.head"], "head is no layer of the net. blocks.7.head ends as it does"),
    (["model.decoder.layers.0.q"], ["layers.0.q"], "layers.0.q ends as it does"),
    (["block.0.q"], ["encoder.block.0.q", "decoder.block.0.q"], "encoder.block.0.q and decoder.block.0.q end as"),
    (["vision_tower.vision_model.layers.0.self_attn.q_proj"], ["model.layers.0.attention.wq"],
     "model.layers.0.attention.wq is what other libraries call it, but for what stands before: if that is meant"),
    (["vision.encoder.layer.0.attention.output.dense"], ["bert.bert_encoder.layers.0.attention.output.dense"],
     "bert.bert_encoder.layers.0.attention.output.dense"),
    (["one.down_blocks.0.resnets.0.conv1"], ["two.input_blocks.1.0.in_layers.2"], "but for what stands before"),
    (["bert.layers.0.q"], ["gpt_neox.layers.0.q"], "gpt_neox.layers.0.q ends as it does"),
    (["layers.1.q"], ["layers.0.q"], "layers.1.q is no layer of the net. Close to it: layers.0.q"),
    (["encoder.to_q"], ["encoder.to_k", "other"], "encoder.to_q is no layer of the net. Close to it: encoder.to_k"),
    (["blocks.1.0"], ["0"], "blocks.1.0 is no layer of the net"),
    (["a", "zz.q", "zz.r"], ["a"], "(?s)zz.q is no layer.*zz.r is no layer"),
    (["b"], [f"{letter}.b" for letter in ("model", "net", "module", "network")],
     "b may be model.b or net.b or module.b or others"),
    (["model.b", "net.b"], ["b"], "b is the place of model.b and net.b"),
    (["layers.0.self_attn.q_proj"], ["model.layers.0.attention.wq", "net.layers.0.attention.wq"],
     "may be model.layers.0.attention.wq or net.layers.0.attention.wq")])
def test_what_has_no_place_or_several(files, net, message):
    with pytest.raises(ValueError, match=message):
        map_names(files, net)


TE = "encoder.layers.0.self_attn.q_proj"
PIPELINE = ["unet.down_blocks.0.resnets.0.conv1", f"text_encoder.text_model.{TE}", f"text_encoder_2.text_model.{TE}"]
ORIGINAL = ["model.diffusion_model.input_blocks.1.0.in_layers.2", f"cond_stage_model.transformer.text_model.{TE}",
            "first_stage_model.encoder.conv_in"]


@pytest.mark.parametrize("path, component, net, place", [
    ("down_blocks.0.resnets.0.conv1", "", PIPELINE, PIPELINE[0]),
    ("down_blocks.0.resnets.0.conv1", "unet", PIPELINE, PIPELINE[0]),
    ("down_blocks.0.resnets.0.conv1", "unet", ORIGINAL, ORIGINAL[0]),
    ("down_blocks.0.resnets.0.conv1", "diffusion_model", ORIGINAL, ORIGINAL[0]),
    (f"text_model.{TE}", "text_encoder", PIPELINE, PIPELINE[1]), (TE, "text_encoder_2", PIPELINE, PIPELINE[2]),
    (f"text_model.{TE}", "text_encoder", ORIGINAL, ORIGINAL[1]), (TE, "text_encoder", ORIGINAL, ORIGINAL[1]),
    ("encoder.conv_in", "vae", ORIGINAL, ORIGINAL[2]), ("vae.encoder.conv_in", "", ORIGINAL, ORIGINAL[2]),
    (TE, "text_encoder", [f"text_model.{TE}"], f"text_model.{TE}"),
    (f"text_model.{TE}", "text_encoder", [TE], TE), ("to_q", "unet", ["to_q"], "to_q"),
    ("to_q", "", ["unet", "unet.to_q"], "unet.to_q"), ("unet.to_q", "", ["to_q"], "to_q"),
    ("double_blocks.0.img_attn.qkv", "transformer", ["transformer.double_blocks.0.img_attn.qkv", "vae.x"],
     "transformer.double_blocks.0.img_attn.qkv"),
    ("to_q", "transformer_2", ["transformer.to_q", "transformer_2.to_q"], "transformer_2.to_q"),
    ("to_q", "transformer", ["transformer.to_q", "transformer_2.to_q"], "transformer.to_q"),
    ("transformer.h.0.attn", "", ["h.0.attn"], "h.0.attn")])
def test_components_have_several_names(path, component, net, place):
    assert map_names([path], net, component=component) == {path: place}


@pytest.mark.parametrize("path, component, net, message", [
    (TE, "text_encoder_2", [TE], "of the text_encoder_2, and the net is the text_encoder: if both are one, say"),
    ("to_q", "text_encoder_2", ["to_q"], "the net does not say of which component: if both are one, say"),
    ("to_q", "transformer_2", ["transformer.to_q"], "of the transformer_2, and the net is the transformer"),
    ("to_q", "transformer", ["unet.to_q"], "of the transformer, and the net is the unet"),
    ("to_q", "unet", ["transformer.to_q"], "of the unet, and the net is the transformer"),
    ("unet.to_q", "", ["transformer.to_q", "vae.x"], "of the unet, and the net is the transformer"),
    ("to_q", "", ["unet.to_q", "text_encoder.a"], "the file does not say of which component, and the net is the unet"),
    (TE, "", PIPELINE, "is no layer of the net"), (f"text_model.{TE}", "", [TE], "ends as it does"),
    ("proj_out", "text_encoder", ["proj_out", "down_blocks.0.resnets.0.conv1"], "and the net is the unet"),
    ("proj_out", "unet", ["proj_out", "transformer_blocks.0.attn.to_q"], "and the net is the transformer"),
    ("encoder.conv_in", "", ORIGINAL, "first_stage_model")])
def test_components_are_never_exchanged(path, component, net, message):
    with pytest.raises(ValueError, match=message):
        map_names([path], net, component=component)


def test_the_user_says_which_component_the_net_is():
    for component in ("text_encoder_2", "transformer_2"):
        assert map_names(["to_q"], ["to_q"], component=component, net_component=component) == {"to_q": "to_q"}
    with pytest.raises(ValueError, match="adapters of unet, text_encoder: where the net is one of them, component="):
        map_names(["unet.to_q", "text_encoder.a"], ["to_q"])


def test_the_users_table():
    net = ["x.b", "y.b", "c"]
    assert map_names(["b", "c"], net, {"b": "y.b"}) == {"b": "y.b", "c": "c"}
    assert map_names(["net.B1", "c"], net, [(r"^net\.", "x."), (r"B\d$", "b")]) == {"net.B1": "x.b", "c": "c"}
    with pytest.raises(ValueError, match="b is z.b by your table, which the net does not have. Close to it: "):
        map_names(["b"], net, {"b": "z.b"})
    with pytest.raises(ValueError, match="c is the place of b and c"):
        map_names(["b", "c"], net, {"b": "c"})


def test_what_the_table_does_not_rename_is_an_error():
    with pytest.raises(ValueError, match="renames toq, but the adapter has no such layer. Close to it: to_q."):
        map_names(["to_q"], ["to_q", "self_q"], {"toq": "self_q"})
    with pytest.raises(ValueError, match="'x' of the name map is found in no layer of the adapter, such as to_q"):
        map_names(["to_q"], ["to_q", "self_q"], [("to", "self"), ("x", "y")])
    with pytest.raises(ValueError, match="leaves nothing of to_q"):
        map_names(["to_q"], ["to_q"], [(".*", "")])
    # A name of kohya's, which told the path when the file was read.
    assert map_names(["a.b_c"], ["a.b_c"], {"lora_unet_a_b_c": "a.b_c"}) == {"a.b_c": "a.b_c"}
    for name in ("..", "a.", ".a", "a..b"):
        with pytest.raises(ValueError, match="which is no path: a part between its dots is empty"):
            map_names(["to_q"], ["to_q"], {"to_q": name})


def test_a_hint_is_never_the_name_asked_for():
    assert near("to_q", ["to_q", "to_k"]) == " Close to it: to_k."
    assert near("to_q", ["to_q"]) == "" and did_you_mean("to_q", ["to_q"]) == ""


@pytest.mark.parametrize("table, message", [
    ([("(", "x")], "'\\(' of the name map is no regular expression: missing"),
    ([("b", r"\9")], "invalid group reference"),
    (["ab"], "pairs of a regular expression"), ("ab", "names by names"), (5, "names by names"),
    ({"b": 5}, "but got {'b': 5}"), ({"b": None}, "gives 'b' the name None, which is none: .* component"),
    ({"b": ""}, "gives 'b' the name '', which is none")])
def test_what_is_no_table(table, message):
    with pytest.raises(ValueError, match=message):
        map_names(["b"], ["b"], table)


def test_an_adapter_with_the_nets_paths():
    layers = {"model.layers.0.self_attn.q_proj": dense(), "model.layers.0.mlp.up_proj": dense(seed=3)}
    state = lora(layers, trained={"model.embed_tokens.weight": tensor((3, 2)), "scale": tensor((1,))},
                 config={"task_type": "CAUSAL_LM"})
    net = ["model.layers.0.attention.wq", "model.layers.0.feed_forward.w3", "model.tok_embeddings", "model"]
    found = placed(state, net)
    assert list(found.layers) == net[:2] and set(found.trained) == {"model.tok_embeddings.weight", "scale"}
    assert_same(placed(found, ["model.embed_tokens", *layers]), state)


def only(name):
    """Return the one path that known networks have under a name of kohya's, None if there is none."""
    found = set(cut(name).values())
    assert len(found) <= 1, found
    return next(iter(found), None)


def test_kohyas_names_without_a_net(shared):
    base, _ = read(shared / "fixtures" / "peft" / "unet_tiny" / "base" / "diffusion_pytorch_model.safetensors")
    paths = {name.rpartition(".")[0] for name in base}
    for path in [*paths, *SD1, *SD1.values(), "text_model.encoder.layers.11.self_attn.q_proj", "text_projection",
                 "text_model.encoder.layers.0.mlp.fc1", "text_model.embeddings.token_embedding",
                 "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj", "label_emb.0.0",
                 "add_embedding.linear_1", "add_embedding.linear_2",
                 "double_blocks.3.img_mod.lin", "single_blocks.3.linear1", "transformer_blocks.0.attn.add_q_proj"]:
        assert only(path.replace(".", "_")) == path
    assert only("down_blocks_0_other_thing") is None and only("") is None and only("to_q_") is None


def test_a_layer_that_is_called_as_its_network_is_is_of_that_network():
    assert map_names(["bert.pooler.dense"], ["bert.dense", "bert.other"]) == {"bert.pooler.dense": "bert.dense"}
    with pytest.raises(ValueError, match="roberta.pooler.dense is no layer of the net"):
        map_names(["roberta.pooler.dense"], ["bert.dense", "bert.other"])
