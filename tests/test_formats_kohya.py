"""Names and tensors of kohya's trainer and of its followers: which layer a name is, what stands beside LoRA."""
from __future__ import annotations

import json
import warnings
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from adapters import MAGNITUDE, A, B, assert_same, dense, lora, tensor
from mindspore import nn

import mindpet_lite as mp
from mindpet_lite.formats import diffusers, kohya
from mindpet_lite.formats.adapters import read_adapter, to_files, write_files
from mindpet_lite.formats.detect import detect
from mindpet_lite.formats.files import to_bytes
from mindpet_lite.names.layouts import NETWORKS, expanded
from mindpet_lite.offline.convert import convert
from mindpet_lite.offline.inspect import inspect

DOWN, UP = tensor((2, 3)), tensor((5, 2), seed=1)
# By name in kohya's file, the layer that it is, as each trainer names it.
TRAINERS = {
    # sd-scripts and ComfyUI, FLUX's own code
    "double_blocks_7_img_mlp_0": "double_blocks.7.img_mlp.0",
    "double_blocks_7_txt_mod_lin": "double_blocks.7.txt_mod.lin",
    "single_blocks_12_linear2": "single_blocks.12.linear2",
    "single_blocks_1_modulation_lin": "single_blocks.1.modulation.lin",
    "final_layer_adaLN_modulation_1": "final_layer.adaLN_modulation.1", "guidance_in_in_layer": "guidance_in.in_layer",
    # sd-scripts, Stable Diffusion 3's own code
    "joint_blocks_3_context_block_attn_qkv": "joint_blocks.3.context_block.attn.qkv",
    "joint_blocks_3_x_block_attn2_proj": "joint_blocks.3.x_block.attn2.proj",
    "joint_blocks_3_x_block_adaLN_modulation_1": "joint_blocks.3.x_block.adaLN_modulation.1",
    # sd-scripts, Stable Diffusion XL
    "input_blocks_4_1_transformer_blocks_1_attn2_to_out_0": "input_blocks.4.1.transformer_blocks.1.attn2.to_out.0",
    "output_blocks_2_2_conv": "output_blocks.2.2.conv", "label_emb_0_2": "label_emb.0.2",
    "down_blocks_1_attentions_0_proj_in": "down_blocks.1.attentions.0.proj_in",
    # musubi-tuner: Wan, HunyuanVideo, Qwen-Image
    "blocks_0_self_attn_q": "blocks.0.self_attn.q", "blocks_39_cross_attn_k_img": "blocks.39.cross_attn.k_img",
    "blocks_0_ffn_2": "blocks.0.ffn.2", "time_projection_1": "time_projection.1", "head_head": "head.head",
    "double_blocks_0_img_mlp_fc1": "double_blocks.0.img_mlp.fc1", "single_blocks_9_modulation_linear":
        "single_blocks.9.modulation.linear", "txt_in_individual_token_refiner_blocks_1_self_attn_qkv":
        "txt_in.individual_token_refiner.blocks.1.self_attn_qkv", "txt_in_c_embedder_linear_1":
        "txt_in.c_embedder.linear_1", "transformer_blocks_5_img_mod_1": "transformer_blocks.5.img_mod.1",
    "transformer_blocks_5_txt_mlp_net_0_proj": "transformer_blocks.5.txt_mlp.net.0.proj",
    # OneTrainer, diffusers' names
    "transformer_blocks_0_norm1_context_linear": "transformer_blocks.0.norm1_context.linear",
    "norm_out_linear": "norm_out.linear",
    "single_transformer_blocks_1_proj_mlp": "single_transformer_blocks.1.proj_mlp",
    "time_text_embed_timestep_embedder_linear_1": "time_text_embed.timestep_embedder.linear_1",
    "context_embedder_token_refiner_refiner_blocks_0_norm_out_linear":
        "context_embedder.token_refiner.refiner_blocks.0.norm_out.linear",
    "condition_embedder_image_embedder_ff_net_0_proj": "condition_embedder.image_embedder.ff.net.0.proj",
    "blocks_3_attn2_add_k_proj": "blocks.3.attn2.add_k_proj", "layers_0_attention_to_q": "layers.0.attention.to_q",
    "all_final_layer_2-1_linear": "all_final_layer.2-1.linear", "cap_embedder_1": "cap_embedder.1",
}
AMBIGUOUS = [f"double_blocks_0_{stream}_attn_{part}" for stream in ("img", "txt") for part in ("qkv", "proj")]


def file_of(*names, prefix="lora_unet_", alpha=None):
    found = {}
    for name in names:
        found |= {f"{prefix}{name}.lora_down.weight": DOWN, f"{prefix}{name}.lora_up.weight": UP}
        if alpha is not None:
            found[f"{prefix}{name}.alpha"] = np.float32(alpha)
    return found


@pytest.mark.parametrize("name", TRAINERS)
def test_the_layers_of_known_networks(name):
    assert list(kohya.decode(file_of(name), {}).layers) == [TRAINERS[name]]
    # The net's own names count, whatever the tables say.
    assert list(kohya.decode(file_of(name), {}, [name, "other"]).layers) == [name]


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_name_that_may_be_two_layers_is_refused(name):
    dotted, joined = (f"double_blocks.0.{name[16:19]}{rest}" for rest in
                      (f"_attn.{name[25:]}", f"_attn_{name[25:]}"))
    with pytest.raises(ValueError, match=f"lora_unet_{name} may be {dotted} or {joined}: .*--base"):
        kohya.decode(file_of(name), {})
    for path in (dotted, joined):
        assert list(kohya.decode(file_of(name), {}, [path, "double_blocks.1"]).layers) == [path]
    # The other layers of a file say whose they are.
    flux = kohya.decode(file_of(name, "double_blocks_0_img_mlp_0"), {})
    video = kohya.decode(file_of(name, "double_blocks_0_img_mlp_fc1"), {})
    assert dotted in flux.layers and joined in video.layers
    assert flux.component == video.component == "transformer"


def test_a_transformer_keeps_kohyas_prefix_and_gets_its_component():
    tensors = file_of("double_blocks_0_img_mlp_0", "single_blocks_0_linear1", alpha=1)
    state = kohya.decode(tensors, {})
    assert set(state.layers) == {"double_blocks.0.img_mlp.0", "single_blocks.0.linear1"}
    assert state.component == "transformer"
    assert set(kohya.encode(state)[0]) == set(tensors)
    with pytest.raises(ValueError, match="img_mlp.0 has its name in the network's own code, .*--names"):
        diffusers.encode(state)
    ours = file_of("transformer_blocks_0_attn_to_q", "single_transformer_blocks_0_proj_mlp", prefix="lora_transformer_")
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in diffusers.encode(kohya.decode(ours, {}))[0]
    unet = kohya.decode(file_of("down_blocks_0_resnets_0_conv1"), {})
    assert list(unet.layers) == ["down_blocks.0.resnets.0.conv1"] and unet.component == "unet"


@pytest.mark.parametrize("network", NETWORKS)
def test_a_net_with_a_networks_names_gets_each_layer(network):
    paths = sorted({path.replace("#", "3") for row in NETWORKS[network] for path in expanded(row)})
    tensors = file_of(*(path.replace(".", "_") for path in paths))
    assert set(kohya.decode(tensors, {}, paths).layers) == set(paths)
    dotted = {key: value for path in paths for key, value in file_of("", prefix=f"diffusion_model.{path}").items()}
    assert set(diffusers.decode(dotted, {}).layers) == set(paths)


def test_a_base_settles_a_name_and_inspect_shows_it_as_it_stands():
    name = "double_blocks_0_img_attn_qkv"
    Path("base.safetensors").write_bytes(to_bytes({"double_blocks.0.img_attn_qkv.weight": tensor((5, 3))}))
    for prefix in ("lora_unet_", "lycoris_"):
        Path("a.safetensors").write_bytes(to_bytes(file_of(name, prefix=prefix)))
        assert [layer["path"] for layer in inspect(Path("a.safetensors"))["layers"]] == [name]
        with pytest.raises(ValueError, match="the underscores do not say"):
            convert(Path("a.safetensors"), Path("adapter"), "peft")
        convert(Path("a.safetensors"), Path("adapter"), "peft", base=Path("base.safetensors"))
        assert list(read_adapter(Path("adapter")).state.layers) == ["double_blocks.0.img_attn_qkv"]


PREFIXES = ["unet.", "transformer.", "diffusion_model.", "model.diffusion_model.", "lora_unet.", "lora_transformer.",
            ""]


class Net(nn.Cell):
    """One layer, below a U-Net or a transformer."""

    def __init__(self, component="unet"):
        super().__init__()
        self.component = component
        setattr(self, component, nn.CellDict({"to_q": nn.Dense(3, 5, has_bias=False)}))

    def construct(self, x):
        return getattr(self, self.component)["to_q"](x)


@pytest.mark.parametrize("spelling", ["lora_down lora_up", "lora_A lora_B", "lora.down lora.up"])
@pytest.mark.parametrize("alpha", [None, 1])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_dotted_names(prefix, alpha, spelling, pynative_mode):
    down, up = spelling.split()
    tensors = {f"{prefix}to_q.{down}.weight": DOWN, f"{prefix}to_q.{up}.weight": UP}
    if alpha:
        tensors[f"{prefix}to_q.alpha"] = np.float32(alpha)
    Path("a.safetensors").write_bytes(to_bytes(tensors))
    net = Net("transformer" if "transformer" in prefix else "unet")
    x = np.random.default_rng(0).standard_normal((2, 3))
    weight = getattr(net, net.component)["to_q"].weight.asnumpy().astype(np.float64)
    mp.load_adapter(net, "a.safetensors")
    wanted = x @ (weight + (alpha or 2) / 2 * UP.astype(np.float64) @ DOWN).T
    np.testing.assert_allclose(net(ms.Tensor(x, ms.float32)).asnumpy(), wanted, rtol=1e-5, atol=1e-6)


def test_dotted_names_of_several_components():
    path = "text_model.encoder.layers.0.mlp.fc1"
    prefixes = ("diffusion_model.double_blocks.0.img_mlp.0", f"text_encoders.clip_l.transformer.{path}",
                f"lora_te2.{path}")
    tensors = {key: value for prefix in prefixes for key, value in file_of("", prefix=prefix).items()}
    assert set(diffusers.decode(tensors, {}).layers) == {
        "transformer.double_blocks.0.img_mlp.0", f"text_encoder.{path}", f"text_encoder_2.{path}"}
    unet = file_of("", prefix="diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q")
    assert list(diffusers.decode(unet, {}).layers) == ["input_blocks.1.1.transformer_blocks.0.attn1.to_q"]


@pytest.mark.parametrize("key, decode", [("lora_unet_conv_in", kohya.decode), ("unet.conv_in", diffusers.decode)])
def test_what_stands_beside_loras_tensors(key, decode):
    pair = file_of("", prefix=key)
    plain = decode(pair | {f"{key}.alpha": np.float32(1)}, {}).layers["conv_in"]
    assert plain.settings["lora_alpha"] == 1
    # LyCORIS' scalar multiplies the update.
    scaled = decode(pair | {f"{key}.alpha": np.float32(1), f"{key}.scalar": np.float32(0.25)}, {}).layers["conv_in"]
    assert scaled.settings == {**plain.settings, "lora_alpha": 0.25}
    for wrong in (np.float32(0), np.float32(-1), np.float32(np.inf), np.float32(np.nan), np.complex64(1), np.ones(2)):
        with pytest.raises(ValueError, match="conv_in: LyCORIS' scalar must be one positive number"):
            decode(pair | {f"{key}.scalar": np.asarray(wrong)}, {})
    dora = decode(pair | {f"{key}.dora_scale": np.arange(1, 6, dtype=np.float32).reshape(5, 1)}, {}).layers["conv_in"]
    assert dora.settings["use_dora"] and dora.tensors[MAGNITUDE].tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="dora_scale of shape .1, 3. .*wd_on_out=False"):
        decode(pair | {f"{key}.dora_scale": np.ones((1, 3), np.float32)}, {})
    with pytest.raises(ValueError, match="dora_scale of shape|do not belong together"):
        decode(pair | {f"{key}.dora_scale": np.ones(5), f"{key}.lora_up.weight": np.float32(1)}, {})
    for last, what in {"diff": "a full difference of weights", "diff_b": "a difference of a bias",
                       "w_norm": "a difference of a norm's weight", "b_norm": "a difference of a norm's bias"}.items():
        assert_same(decode(pair | {f"{key}.{last}": np.zeros(5, np.float32)}, {}), decode(pair, {}))
        with pytest.raises(ValueError, match=f"{key}.{last} is {what}, which cannot be read here"):
            decode(pair | {f"{key}.{last}": np.ones(5, np.float32)}, {})
    for last, what in {"lora_mid.weight": "LoCon with a third factor", "oft_blocks": "OFT",
                       "hada_w3_a": "a part that LoHa", "set_weight": "a whole weight"}.items():
        assert detect([*pair, f"{key}.{last}"], {}, None)
        with pytest.raises(ValueError, match=f"{key}.{last} is {what}"):
            decode(pair | {f"{key}.{last}": UP}, {})


def test_embeddings_in_the_file_are_left_out_with_a_warning():
    bundled = {f"bundle_emb.me{number}.clip_l": np.ones((1, 3), np.float32) for number in range(12)}
    for prefix in ("lora_unet_conv_in", "unet.conv_in"):
        Path("a.safetensors").write_bytes(to_bytes(file_of("", prefix=prefix) | bundled))
        with pytest.warns(UserWarning, match="embeddings of words .*bundle_emb.me0.clip_l, .* and 2 more") as caught:
            found = read_adapter(Path("a.safetensors")).state
        assert list(found.layers) == ["conv_in"] and len(caught) == 1 and caught[0].filename == __file__


# Alpha in the metadata

LAYERS = {"transformer.q": dense(4), "transformer.mod": dense(2)}
PEFT = {f"{path}.lora_{name}.weight": layer.tensors[own] for path, layer in LAYERS.items()
        for name, own in (("A", A), ("B", B))}
KOHYA = {f"lora_unet_{name}.{part}.weight": layer.tensors[own] for name, layer in
         (("conv_in", LAYERS["transformer.q"]), ("conv_out", LAYERS["transformer.mod"]))
         for part, own in (("lora_down", A), ("lora_up", B))}


def alphas(tensors, metadata):
    Path("a.safetensors").write_bytes(to_bytes(tensors, metadata))
    return [layer.settings["lora_alpha"] for layer in read_adapter(Path("a.safetensors")).state.layers.values()]


@pytest.mark.parametrize("metadata", [
    {"alpha": "2", "rank": "4"}, {"lora_alpha": "2.0"}, {"network_alpha": "2", "r": "2"},
    {"transformer.lora_alpha": "2", "transformer.r": "4"}, {"alpha": "2", "lora_alpha": "2"}])
def test_diffusers_layout_reads_the_alpha_of_its_metadata(metadata):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert alphas(PEFT, metadata) == [2, 2]
    # Tensors of alpha count before it, and the rank where others have one.
    with pytest.warns(UserWarning, match="say .*alpha=.*, which is not used: .*rank for it, 4 for q"):
        assert sorted(alphas(PEFT | {"transformer.mod.alpha": np.float32(1)},
                             {name.removeprefix("transformer."): text for name, text in metadata.items()})) == [1, 4]


@pytest.mark.parametrize("metadata, message", [
    ({"alpha": "Dynamic"}, "say alpha='Dynamic', which is not one positive number"), ({"alpha": "-1"}, "alpha='-1'"),
    ({"alpha": "nan"}, "which is not one positive number"), ({"alpha": "2", "lora_alpha": "4"}, "which alpha counts"),
    ({"alpha": "2", "rank": "8"}, "for a rank that no layer has .rank='8'; the layers have 2, 4")])
def test_an_alpha_that_cannot_be_right_is_refused(metadata, message):
    with pytest.raises(ValueError, match=message):
        alphas(PEFT, metadata)


@pytest.mark.parametrize("name", ["ss_network_alpha", "alpha", "lora_alpha"])
def test_kohyas_layout_has_its_alpha_in_tensors_alone(name):
    with pytest.warns(UserWarning, match=f"say {name}='2', which is not used: .*, 4 for conv_in and its own for 1"):
        assert alphas(KOHYA, {name: "2"}) == [4, 2]
    own = {f"lora_unet_conv_{way}.alpha": np.float32(1) for way in ("in", "out")}
    with pytest.warns(UserWarning, match=f"say {name}='2', which is not used: the tensors of alpha count, 1 for"):
        assert alphas(KOHYA | own, {name: "2"}) == [1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert alphas(KOHYA | own, {name: "1"}) == alphas(KOHYA | own, {name: "Dynamic"}) == [1, 1]


def test_what_kohya_tells_of_the_training_is_not_used_in_diffusers_layout():
    with pytest.warns(UserWarning, match="say ss_network_alpha='2', which is not used"):
        assert sorted(alphas(PEFT, {"ss_network_alpha": "2", "ss_network_dim": "4"})) == [2, 4]


def test_an_alpha_beside_a_config_is_named_where_no_layer_has_it():
    files = to_files(lora({"q": dense(2, 4)}), "peft", Path("adapter"))
    write_files(files)
    tensors = {"base_model.model.q.lora_A.weight": dense(2).tensors[A],
               "base_model.model.q.lora_B.weight": dense(2).tensors[B]}
    Path("adapter/adapter_model.safetensors").write_bytes(to_bytes(tensors, {"lora_alpha": "8"}))
    with pytest.warns(UserWarning, match="say lora_alpha='8', which is not used: the config counts, 4 for q"):
        assert read_adapter(Path("adapter")).state.layers["q"].settings["lora_alpha"] == 4
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["lora_alpha"] == 4


def test_torchtunes_names_hold_no_alpha():
    tensors = {"layers.0.q.lora_a.weight": DOWN, "layers.0.q.lora_b.weight": UP}
    assert detect(tensors, {}, None) == "mindformers"
    Path("a.safetensors").write_bytes(to_bytes(tensors))
    (layer,) = read_adapter(Path("a.safetensors")).state.layers.values()
    assert layer.settings is None and layer.tensors[A].shape == (2, 3)
    with pytest.raises(ValueError, match="the file does not say rank and alpha"):
        mp.load_adapter(nn.CellDict({"q": nn.Dense(3, 5)}), "a.safetensors", name_map={"layers.0.q": "q"})
