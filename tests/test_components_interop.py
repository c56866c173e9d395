"""PEFT and diffusers find every layer of a component that we converted, both ways."""
from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mindpet_lite.offline.convert import convert

MISSING = [name for name in ("torch", "peft", "diffusers", "transformers") if importlib.util.find_spec(name) is None]
pytestmark = [pytest.mark.interop, pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'mindpet_lite[interop]'")]

SMALL = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
         "pooled_projection_dim": 8}
# By model: its component, its class and sizes, the layers to adapt, and diffusers' pipeline.
MODELS = {
    "U-Net": ("unet", "UNet2DConditionModel", {
        "sample_size": 8, "block_out_channels": (8, 8), "layers_per_block": 1, "cross_attention_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 4, "attention_head_dim": 4,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}, ["to_q", "to_v"], "StableDiffusion"),
    "FLUX": ("transformer", "FluxTransformer2DModel", {
        **SMALL, "num_single_layers": 1, "joint_attention_dim": 8, "axes_dims_rope": (2, 2, 4)}, ["to_q", "to_v"],
        "Flux"),
    "SD3": ("transformer", "SD3Transformer2DModel", {
        **SMALL, "sample_size": 4, "joint_attention_dim": 8, "caption_projection_dim": 16, "out_channels": 4},
        ["to_q", "to_v"], "StableDiffusion3"),
    "CLIP": ("text_encoder", "CLIPTextModel", {
        "vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 16}, ["q_proj", "v_proj"], "StableDiffusion")}


def make(name):
    import diffusers
    import torch
    import transformers
    _, kind, sizes, _, _ = MODELS[name]
    torch.manual_seed(0)
    if name == "CLIP":
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))
    return getattr(diffusers, kind)(**sizes)


def factors(model):
    """Return the factors of LoRA by the name of their layer and their own."""
    return {name.removeprefix("base_model.model.").replace(".default", ""): value.detach()
            for name, value in model.named_parameters() if "lora_" in name}


def trained(model):
    import torch
    with torch.no_grad():
        for value in factors(model).values():
            value.add_(torch.randn_like(value) / 3)
    return model


def same(found, wanted):
    import torch
    assert found.keys() == wanted.keys() and wanted
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", MODELS)
def test_a_directory_of_pefts_in_diffusers(name, to):
    import diffusers
    import peft
    component, _, _, targets, pipeline = MODELS[name]
    tuned = trained(peft.get_peft_model(make(name), peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets)))
    tuned.save_pretrained("peft")
    if component != "unet":
        with pytest.raises(ValueError, match=f"component='{component}'"):
            convert(Path("peft"), Path("a.safetensors"), to)
    convert(Path("peft"), Path("a.safetensors"), to, component=component)
    convert(Path("a.safetensors"), Path("back"), "peft")
    same(factors(peft.PeftModel.from_pretrained(make(name), "back")), factors(tuned))
    if to == "kohya" and component != "unet":
        # Of kohya's files diffusers reads transformers in the names of their own code, and text encoders beside a U-Net
        # (test_formats_interop).
        return
    mixin = getattr(diffusers.loaders, {"Flux": "FluxLoraLoaderMixin", "StableDiffusion3": "SD3LoraLoaderMixin"}.get(
        pipeline, "StableDiffusionLoraLoaderMixin"))
    # diffusers tells a factor of a U-Net's kohya file by its config.
    more = {"unet_config": make("U-Net").config} if pipeline == "StableDiffusion" else {}
    tensors, *rest, metadata = mixin.lora_state_dict("a.safetensors", return_lora_metadata=True, **more)
    alphas, model = rest[0] if rest else None, make(name)
    if component == "unet":
        mixin.load_lora_into_unet(tensors, alphas, model, metadata=metadata)
    elif component == "text_encoder":
        mixin.load_lora_into_text_encoder(tensors, alphas, model, metadata=metadata)
    else:
        mixin.load_lora_into_transformer(tensors, transformer=model, metadata=metadata,
                                         **({"network_alphas": alphas} if pipeline == "Flux" else {}))
    found = {path.replace(".default_0", ""): value for path, value in factors(model).items()}
    assert len(found) == len(factors(tuned))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "CLIP"])
def test_diffusers_own_file_in_peft(name):
    import diffusers
    import peft
    component, _, _, targets, pipeline = MODELS[name]
    model = make(name)
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    wanted = factors(trained(model))
    getattr(diffusers, f"{pipeline}Pipeline").save_lora_weights(
        "theirs", **{f"{component}_lora_layers": peft.get_peft_model_state_dict(model)})
    convert(Path("theirs"), Path("ours"), "peft")
    same(factors(peft.PeftModel.from_pretrained(make(name), "ours")), wanted)
