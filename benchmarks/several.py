"""Several adapters on one net: what a switch costs, and what eight adapters cost beside one of the same rank.

    python benchmarks/several.py
    python benchmarks/several.py --layers 200 --rounds 60

Prints, for a net of so many layers, the time of `set_adapter`, the same without the writes of its values, and the
compiles that switching causes. Then, on the text shape at inference, graph mode: eight adapters of
rank 8 side by side, room of rank 64, and one adapter of rank 64, in turns; medians.
"""
from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from mindspore import Tensor, nn  # noqa: E402
from models import SHAPES, Stack  # noqa: E402
from nets import compile_count  # noqa: E402
from run import row  # noqa: E402

import mindpet_lite as mp  # noqa: E402
from mindpet_lite.delta.lora import bank  # noqa: E402


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def switch(layers: int, rounds: int) -> None:
    """Print what a switch costs."""
    net = nn.SequentialCell([nn.Dense(32, 32) for _ in range(layers)])
    config = mp.LoraConfig(4, 8, target_modules=[str(index) for index in range(layers)])
    mp.get_pet_model(net, config)
    mp.add_adapter(net, "b", config)
    x = Tensor(np.ones((2, 32), np.float32))
    net(x).asnumpy()

    def there_and_back() -> float:
        return (seconds(lambda: mp.set_adapter(net, "b", train=False))
                + seconds(lambda: mp.set_adapter(net, "default", train=False))) / 2

    there_and_back()
    whole, beyond = [], []
    with compile_count() as compiled:
        for _ in range(rounds):
            whole.append(1e3 * there_and_back())
            with mock.patch.object(bank, "put", lambda parameter, value: None):
                beyond.append(1e3 * there_and_back())
        net(x).asnumpy()
    row(f"switch between adapters, {layers} layers, without its writes", f"{statistics.median(beyond):.2f} ms",
        f"with them {statistics.median(whole):.2f} ms", "1 ms")
    row("compiles by switching", str(len(compiled)), "", "0")


def inference(rounds: int) -> None:
    """Print what eight adapters cost beside one."""
    shape = SHAPES["text"]
    assert isinstance(shape, Stack)
    inputs = shape.inputs()
    targets = list(shape.targets)
    one, eight, room = (shape.net(nn.Dense) for _ in range(3))
    mp.get_pet_model(one, mp.LoraConfig(64, 64, target_modules=targets))
    for index in range(8):
        mp.add_adapter(eight, f"a{index}", mp.LoraConfig(8, 8, target_modules=targets))
    mp.reserve_adapters(room, 64, target_modules=targets)
    nets = {"one of rank 64": one, "eight of rank 8": eight, "room of rank 64": room}
    times: dict[str, list[float]] = {name: [] for name in nets}
    for net in nets.values():
        net.set_train(False)
        net(*inputs)
    for _ in range(rounds):
        for name, net in nets.items():
            times[name].append(seconds(lambda net=net: net(*inputs).asnumpy()))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name in ("eight of rank 8", "room of rank 64"):
        row(f"{name}, text, inference", f"{medians[name] / medians['one of rank 64']:.3f}", "one adapter of rank 64",
            "1.10")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=200, help="of the net that switches (%(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="of each measurement (%(default)s)")
    arguments = parser.parse_args()
    ms.set_context(mode=ms.GRAPH_MODE)
    switch(arguments.layers, arguments.rounds)
    inference(arguments.rounds)


if __name__ == "__main__":
    main()
