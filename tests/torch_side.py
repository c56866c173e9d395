"""What PEFT and diffusers themselves compute with adapter files: a script of its own, as they need PyTorch.

    python torch_side.py <jobs.json> <out.npz>

A job is {"name", "kind", "base": folder, "data": npz with the inputs, "adapter": file or folder}; of kind "diffusers",
"peft" or "plain" (the base alone). The result holds each model's output by name.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
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


def output(job: dict[str, str]) -> np.ndarray:
    """Return the model's output on the inputs of the npz file."""
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
