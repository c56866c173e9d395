"""What PEFT and diffusers themselves compute with adapter files: a script of its own, as they need PyTorch.

    python torch_side.py <jobs.json> <out.npz>

A job is {"name", "kind", "base": folder, "data": npz with the inputs, "adapter": file or folder}; of kind "diffusers",
"peft" or "plain" (the base alone), or of kind "text": a text encoder made here, either with the adapter as diffusers
loads it or, where "data" is given, with the differences of weights in that npz added. The result holds each model's
output by name.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.loaders import StableDiffusionLoraLoaderMixin


def plain(base: Path) -> torch.nn.Module:
    """Load the base alone."""
    if (base / "diffusion_pytorch_model.safetensors").exists():
        return UNet2DConditionModel.from_pretrained(base)
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(base)


def with_diffusers(base: Path, adapter: Path) -> torch.nn.Module:
    """Load as a Stable Diffusion pipeline does."""
    net = plain(base)
    tensors, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(adapter.parent), weight_name=adapter.name, unet_config=net.config, return_lora_metadata=True)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(tensors, network_alphas=alphas, unet=net, metadata=metadata)
    return net


def with_peft(base: Path, adapter: Path) -> torch.nn.Module:
    """Load as PEFT does."""
    from peft import PeftModel
    return PeftModel.from_pretrained(plain(base), str(adapter))


def text(job: dict[str, str]) -> np.ndarray:
    """Return the output of a small CLIP text encoder with the job's adapter or differences of weights."""
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(0)
    net = CLIPTextModel(CLIPTextConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                       num_attention_heads=4, max_position_embeddings=16)).eval()
    layers = dict(net.named_modules())
    with torch.no_grad():
        if job["data"]:
            for path, delta in np.load(job["data"]).items():
                # Newer versions of transformers name layers without what stands before them in older ones.
                layers[path if path in layers else path.removeprefix("text_model.")].weight += torch.from_numpy(delta)
        else:
            adapter, unet = Path(job["adapter"]), UNet2DConditionModel.load_config(job["base"])
            tensors, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
                str(adapter.parent), weight_name=adapter.name, unet_config=FrozenDict(unet),
                return_lora_metadata=True)
            StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
                tensors, network_alphas=alphas, text_encoder=net, lora_scale=1.0, metadata=metadata)
        return net(torch.arange(10)[None]).last_hidden_state.numpy()


def output(job: dict[str, str]) -> np.ndarray:
    """Return the model's output on the inputs of the npz file."""
    if job["kind"] == "text":
        return text(job)
    base = Path(job["base"])
    net = {"plain": lambda: plain(base), "diffusers": lambda: with_diffusers(base, Path(job["adapter"])),
           "peft": lambda: with_peft(base, Path(job["adapter"]))}[job["kind"]]().eval()
    values = np.load(job["data"])
    with torch.no_grad():
        found = net(**{name.removeprefix("input."): torch.from_numpy(values[name])
                       for name in values if name.startswith("input.")})
    return (found.sample if hasattr(found, "sample") else found.logits).numpy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.savez(sys.argv[2], **{job["name"]: output(job) for job in json.loads(Path(sys.argv[1]).read_text())})
