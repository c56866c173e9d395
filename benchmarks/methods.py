"""What each method trains and costs, on one model: a training step beside LoRA's, in turns.

    python benchmarks/methods.py
    python benchmarks/methods.py --shape text --rounds 20 --only loha oft

The model is a stack of transformer blocks (`models.py`), the layers are those that LoRA adapts there, the settings are
each method's usual ones. Prints for each method the share of parameters that train, the size of its file, and the
median of a step over LoRA's in the same run. fp32, AdamW, graph mode, two processors.
"""
from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from mindspore import Tensor, nn  # noqa: E402
from models import SHAPES, STACKS, Stack, Step  # noqa: E402
from run import row  # noqa: E402
from tqdm import tqdm  # noqa: E402

import mindpet_lite as mp  # noqa: E402
from mindpet_lite.delta import METHODS  # noqa: E402

# By the method: its settings besides target_modules.
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 8, "lora_alpha": 16}, "adalora": {"total_step": 1000}, "vera": {"r": 256},
    "loha": {"r": 8, "alpha": 16}, "lokr": {"r": 8, "alpha": 16}, "hira": {"r": 8}, "oft": {"oft_block_size": 32},
    "boft": {"boft_block_size": 8, "boft_n_butterfly_factor": 2}, "hra": {"r": 8}, "ia3": {},
    "adapter": {"bottleneck_size": 16}, "low_rank_adapter": {"reduction_factor": 32, "low_rank_size": 4},
}


def timed_step(name: str, shape: Stack) -> tuple[Callable[[], float], float, int]:
    """Return what runs a training step and gives its seconds, the share that trains, and the bytes of the file."""
    net = shape.net(nn.Dense)
    config = METHODS[name](target_modules=list(shape.targets), **SETTINGS[name])
    mp.get_pet_model(net, config)
    rng = np.random.default_rng(0)
    for item in net.trainable_params():
        # No zero factor, of which a product costs less.
        item.set_data(Tensor((item.asnumpy() + 0.01 * rng.standard_normal(item.shape)).astype(np.float32)))
    trains = sum(item.size for item in net.trainable_params()) / sum(item.size for item in net.get_parameters())
    with tempfile.TemporaryDirectory() as folder:
        mp.save_adapter(net, folder)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    step, inputs = Step(net).set_train(), shape.inputs()

    def timed() -> float:
        start = time.perf_counter()
        step(*inputs).asnumpy()
        return time.perf_counter() - start

    return timed, trains, size


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=STACKS, default="text", help="of models.py (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="some methods")
    arguments = parser.parse_args()
    ms.set_context(mode=ms.GRAPH_MODE)
    shape = SHAPES[arguments.shape]
    assert isinstance(shape, Stack)
    names = list(dict.fromkeys(["lora", *arguments.only]))
    steps = {name: timed_step(name, shape) for name in names}
    for timed, _, _ in steps.values():
        timed()
        timed()
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in tqdm(range(arguments.rounds), desc="rounds"):
        for name in names:
            times[name].append(steps[name][0]())
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name in names:
        _, share, size = steps[name]
        row(name, f"{100 * share:.3f}%", f"{size / 1e3:.0f} kB", f"{medians[name] / medians['lora']:.2f}")


if __name__ == "__main__":
    main()
