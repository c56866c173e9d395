"""What `mindpet-lite estimate` says beside what training steps take, each in a process of its own.

    python benchmarks/estimate.py                          # all cases: about twenty minutes on two cores
    python benchmarks/estimate.py --case "llama small"     # one of them
    python benchmarks/estimate.py --constants              # the constants of the plan, measured

What counts is the most that the process had in memory above the import, as in memory.py: three steps in graph mode on
CPU with AdamW, float32. Recomputed are the layers of the Llama, and the U-Net's blocks.

--constants trains nets so narrow that their tensors count for next to nothing, of several depths, and prints what a
compiled graph takes at all, for each kernel, and for each that recomputes.
"""
from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import mindspore as ms
import numpy as np
from fresh import Peak, fresh
from llama import Llama, Sizes
from mindspore import Tensor, nn
from models import SHAPES, Loss, Step, UNet, set_mode
from run import row

import mindpet_lite
from mindpet_lite.estimate import estimate
from mindpet_lite.estimate.plan import PER_COPY, PER_KERNEL, START, Plan
from mindpet_lite.estimate.report import COLUMNS

BLOCKS = {"llama": r"model\.layers\.\d+", "unet": r"net\.(input_blocks\.\d+|middle_block|output_blocks\.\d+)"}
MB = 1e6


@dataclasses.dataclass(frozen=True)
class Case:
    """A model's config, and what a step is called with."""

    config: dict[str, Any]
    batch: int
    seq: int
    rank: int

    @property
    def kind(self) -> str:
        """Return "unet" or "llama"."""
        return "unet" if "unet" in self.config else "llama"


def unet(shape: UNet, batch: int, blocks: int = 1) -> Case:
    """Return the case of a U-Net of models.py."""
    return Case({"unet": {
        "image_size": shape.side, "in_channels": 8, "out_channels": 8, "model_channels": shape.channels,
        "attention_resolutions": [1, 2, 4], "num_res_blocks": blocks, "channel_mult": list(shape.mult),
        "num_heads": shape.heads, "context_dim": shape.context}}, batch, shape.words, shape.rank)


def llama(width: int, layers: int, groups: int, vocabulary: int, batch: int, tokens: int) -> Case:
    """Return the case of a Llama with 8 heads."""
    return Case({"hidden_size": width, "intermediate_size": width * 43 // 16, "num_hidden_layers": layers,
                 "num_attention_heads": 8, "num_key_value_heads": groups, "vocab_size": vocabulary}, batch, tokens, 8)


TINY, MID = SHAPES["unet-tiny"], SHAPES["unet-mid"]
CASES = {
    "unet tiny, batch 4": unet(TINY, 4), "unet tiny, batch 32": unet(TINY, 32),
    "unet mid, batch 2": unet(MID, 2), "unet mid, batch 8": unet(MID, 8),
    "llama small": llama(256, 2, 4, 4096, 2, 128), "llama 256, 4 layers, 2 x 128": llama(256, 4, 4, 4096, 2, 128),
    "llama 256, 4 layers, 8 x 256": llama(256, 4, 4, 4096, 8, 256),
    "llama 512, 8 layers, 4 x 128": llama(512, 8, 2, 8192, 4, 128),
    "llama 512, 8 layers, 2 x 512": llama(512, 8, 2, 8192, 2, 512),
}
# So narrow that the graph is what counts.
DEPTHS = [*(llama(32, layers, 4, 64, 1, 8) for layers in (2, 8, 24)),
          *(unet(dataclasses.replace(TINY, channels=32, context=32), 1, blocks) for blocks in (1, 3))]


def measured(case: Case, column: str) -> int:
    """Return the peak of three training steps in this process, over what it has now."""
    set_mode("graph")
    peak = Peak()
    adapts, recomputed = COLUMNS[column]
    rng = np.random.default_rng(1)
    if case.kind == "llama":
        net: nn.Cell = Llama(Sizes(**case.config), case.seq)
        inputs = (Tensor(rng.integers(0, case.config["vocab_size"], (case.batch, case.seq + 1)), ms.int32),)
    else:
        from unet import UNetModel

        sizes = case.config["unet"]
        net = Loss(UNetModel(**sizes))
        side = sizes["image_size"]
        inputs = (Tensor(rng.standard_normal((case.batch, sizes["in_channels"], side, side)), ms.float32),
                  Tensor(rng.integers(0, 1000, case.batch), ms.int32),
                  Tensor(rng.standard_normal((case.batch, case.seq, sizes["context_dim"])), ms.float32))
    if adapts:
        targets = [f"net.{name}" if case.kind == "unet" else name
                   for name in estimate(case.config, 1, case.seq).lora_layers]
        mindpet_lite.get_pet_model(net, mindpet_lite.LoraConfig(case.rank, 2 * case.rank, target_modules=targets))
    if recomputed:
        mindpet_lite.net_recompute(net, BLOCKS[case.kind])
        if case.kind == "unet":
            from layers import use_plain_operators

            # As the example's own use_checkpoint.
            use_plain_operators(net)
    training = Step(net).set_train()
    for _ in range(3):
        training(*inputs).asnumpy()
    return peak.most()


def planned(case: Case) -> dict[str, Plan]:
    """Return the plans of a case."""
    return estimate(case.config, case.batch, case.seq, case.rank).plans


def constants() -> None:
    """Print what a compiled graph takes at all, for each kernel and for each copy: least squares over the depths."""
    counts, sizes = [], []
    for case in DEPTHS:
        plans = planned(case)
        kernels = (plans["LoRA"].compiler - START) // PER_KERNEL
        for column in ("LoRA", "LoRA, recompute"):
            copies = (plans[column].compiler - plans["LoRA"].compiler) // PER_COPY
            counts.append((1, kernels, copies))
            sizes.append(fresh(measured, case, column) - plans[column].device - plans[column].tables)
            row(f"{case.kind}: {kernels} kernels, {copies} copies", f"{sizes[-1] / MB:.0f} MB")
    solved = np.linalg.lstsq(np.array(counts, np.float64), np.array(sizes, np.float64), rcond=None)[0]
    for label, found, used in zip(("a compiled graph", "a kernel", "a copy"), solved, (START, PER_KERNEL, PER_COPY)):
        row(label, f"{found / 1e3:,.0f} kB", f"{used / 1e3:,.0f} kB planned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--constants", action="store_true")
    args = parser.parse_args()
    if args.constants:
        constants()
        return
    for name in args.case:
        for column, plan in planned(CASES[name]).items():
            peak = fresh(measured, CASES[name], column)
            row(f"{name}: {column}", f"{plan.process / MB:.0f} MB planned", f"{peak / MB:.0f} MB measured: "
                f"{plan.process / peak:.2f}", "0.85 to 1.15")


if __name__ == "__main__":
    main()
