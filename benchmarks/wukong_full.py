"""Wukong's U-Net at full size: training steps with LoRA, beside full fine-tuning and beside the floor.

    python benchmarks/wukong_full.py                                  # all: about half an hour on two cores, 20 GB
    python benchmarks/wukong_full.py --side 64 --only LoRA            # a picture of 512 x 512, LoRA alone
    python benchmarks/wukong_full.py --side 64 --only LoRA --checkpoint

859,520,964 parameters, one latent and a text of 77 x 768, LoRA of rank 4 on the 128 layers of the attention, AdamW,
graph mode; each in a process of its own. The floor is what any tuning of a frozen base pays: backward to the bottom,
one bias trainable there. Memory is the most that the process had above what it had when MindSpore was imported; the
first step compiles. Planned is what `mindpet-lite estimate` says it will be.
"""
from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import mindspore as ms
import numpy as np
from fresh import Peak, fresh
from mindspore import nn
from models import Loss, Step, set_mode
from run import row

import mindpet_lite
from mindpet_lite import yaml_files
from mindpet_lite.estimate import estimate

CONFIG = Path(__file__).resolve().parents[1] / "examples" / "wukong" / "configs" / "wukong_full_lora.yaml"
GIB, MB = 2 ** 30, 1e6
STEPS = 3
# The bar in GiB for LoRA at 64 x 64; (side, beside what): those for LoRA's ratios of time and memory.
ROOM = 8.0
RATIOS = {(32, "full"): (0.50, 0.36), (32, "floor"): (1.05, 1.06)}


@dataclasses.dataclass(frozen=True)
class Found:
    """Seconds and bytes of one process."""

    build: float
    built: int
    weights: int
    injected: int
    first: float
    step: float
    peak: int
    adapter: int


def fill(unet: nn.Cell, rng: np.random.Generator) -> None:
    """Draw the weights that are zero at first: memory that nobody wrote to is not there yet."""
    for parameter in unet.get_parameters():
        if not parameter.asnumpy().any():
            parameter.set_data(ms.Tensor(0.01 * rng.standard_normal(parameter.shape, np.float32), parameter.dtype))


def train(kind: str, side: int, dtype: str, checkpoint: bool) -> Found:
    """Build the U-Net, take a step that compiles and some more, and say what it took."""
    from unet import UNetModel

    set_mode("graph")
    sizes = {**yaml_files.read_yaml(CONFIG)["model"]["unet"], "image_size": side, "use_checkpoint": checkpoint}
    peak, started = Peak(), time.perf_counter()
    unet = UNetModel(**sizes, use_fp16=dtype == "float16")
    if dtype == "float16":
        for parameter in unet.get_parameters():
            parameter.set_dtype(ms.float16)
    rng = np.random.default_rng(1)
    fill(unet, rng)
    build, built = time.perf_counter() - started, peak.most()
    weights = sum(parameter.nbytes for parameter in unet.get_parameters())
    adapter = 0
    if kind == "LoRA":
        mindpet_lite.get_pet_model(unet, mindpet_lite.LoraConfig(4, 4, target_modules=["to_q", "to_k", "to_v",
                                                                                       "to_out.0"]))
        folder = mindpet_lite.save_adapter(unet, "adapter")
        adapter = max(file.stat().st_size for file in folder.iterdir())
    elif kind == "floor":
        for path, parameter in unet.parameters_and_names():
            parameter.requires_grad = path == "input_blocks.0.0.conv.bias"
    injected = peak.most()
    inputs = (ms.Tensor(rng.standard_normal((1, 4, side, side)), ms.float32), ms.Tensor([500], ms.int32),
              ms.Tensor(rng.standard_normal((1, 77, 768)), ms.float32))
    step, seconds = Step(Loss(unet)).set_train(), []
    for _ in range(1 + STEPS):
        started = time.perf_counter()
        step(*inputs).asnumpy()
        seconds.append(time.perf_counter() - started)
    return Found(build, built, weights, injected, seconds[0], min(seconds[1:]), peak.most(), adapter)


def planned(kind: str, side: int, dtype: str, checkpoint: bool) -> int:
    """Return what `mindpet-lite estimate` says of it, in bytes; 0 of what it does not know."""
    config = yaml_files.read_yaml(CONFIG)
    config["model"]["unet"]["image_size"] = side
    return 0 if kind == "floor" else estimate(config, 1, dtype=dtype).plans[
        f"{kind}, recompute" if checkpoint else kind].process


def report(kinds: list[str], side: int, dtype: str, checkpoint: bool) -> None:
    """Print the rows of one size."""
    found = {}
    for kind in kinds:
        one = found[kind] = fresh(train, kind, side, dtype, checkpoint)
        name = f"{side} x {side}, {dtype}, {kind}{', use_checkpoint' if checkpoint else ''}"
        row(name, f"{one.step:.2f} s a step", f"first {one.first:.0f} s, built in {one.build:.1f} s")
        plan = planned(kind, side, dtype, checkpoint)
        row(f"{name}: memory", f"{one.peak / GIB:.2f} GiB",
            f"planned {plan / GIB:.2f} GiB, {plan / one.peak:.2f} of it" if plan else "",
            f"<= {ROOM:g} GiB" if (side, kind, dtype) == (64, "LoRA", "float32") else "")
        row(f"{name}: built, injected", f"{one.built / GIB:.2f}, {one.injected / GIB:.2f} GiB",
            f"{one.weights / GIB:.2f} GiB of weights")
        if one.adapter:
            row(f"{name}: adapter", f"{one.adapter / MB:.2f} MB", "", "3.1 to 3.4 MB")
    for kind in ("full", "floor"):
        if {"LoRA", kind} <= set(found):
            for what, value, bar in zip(("time", "memory"), ("step", "peak"), RATIOS.get((side, kind), ("", ""))):
                ratio = getattr(found["LoRA"], value) / getattr(found[kind], value)
                row(f"{side} x {side}, {dtype}: LoRA / {kind}, {what}", f"{ratio:.3f}", "",
                    f"<= {bar:.2f}" if bar else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, nargs="+", default=[32, 64], help="of the latents")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="of weights and activations")
    parser.add_argument("--only", choices=["LoRA", "floor", "full"], nargs="+", default=["LoRA", "floor", "full"])
    parser.add_argument("--checkpoint", action="store_true", help="recompute the blocks (use_checkpoint)")
    args = parser.parse_args()
    for side in args.side:
        report([kind for kind in args.only if kind != "full" or side < 64], side, args.dtype, args.checkpoint)


if __name__ == "__main__":
    main()
