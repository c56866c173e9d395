"""What bitsandbytes makes of weights in NF4, and PEFT's QLoRA of a layer: a script of its own, as they need PyTorch.

    python bnb_side.py <weights.npz> <out.npz> <folder for the adapter>

The result holds for each weight its codes, the codes and scales of the second quantisation, and the numbers again; and
for the weight "layer" input and output of a QLoRA layer on it, whose adapter is saved.
"""
from __future__ import annotations

import sys

import bitsandbytes as bnb
import numpy as np
import torch
from bitsandbytes import functional
from peft import LoraConfig, get_peft_model


class Net(torch.nn.Module):
    """One layer in NF4."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=True, compute_dtype=torch.float32,
                                       compress_statistics=True, quant_type="nf4")
        self.layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
        self.layer.bias.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def main(weights: str, out: str, folder: str) -> None:
    """Write the result."""
    found: dict[str, np.ndarray] = {}
    for name, value in np.load(weights).items():
        codes, state = functional.quantize_4bit(torch.from_numpy(value), blocksize=64, compress_statistics=True,
                                                quant_type="nf4")
        found |= {f"{name}/codes": codes.reshape(-1).numpy(), f"{name}/scale": state.absmax.numpy(),
                  f"{name}/scale_scale": state.state2.absmax.numpy(), f"{name}/mean": state.offset.numpy(),
                  f"{name}/dynamic": state.state2.code.numpy(), f"{name}/values": state.code.numpy(),
                  f"{name}/numbers": functional.dequantize_4bit(codes, state).numpy()}
    torch.manual_seed(0)
    net = get_peft_model(Net(torch.from_numpy(np.load(weights)["layer"])).to("cpu"),
                         LoraConfig(r=4, lora_alpha=8, target_modules=["layer"], init_lora_weights=False))
    assert isinstance(net.base_model.model.layer.base_layer, bnb.nn.Linear4bit)
    x = torch.randn(5, net.base_model.model.layer.in_features, requires_grad=True)
    y = net(x)
    (y * torch.arange(y.numel()).reshape(y.shape)).sum().backward()
    found |= {"x": x.detach().numpy(), "y": y.detach().numpy(), "slope": x.grad.numpy()}
    net.save_pretrained(folder)
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
