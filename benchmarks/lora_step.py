"""One training step with LoRA beside the same step with the base frozen, in one run.

    python benchmarks/lora_step.py                    # 4 blocks, width 512, 4 x 128 tokens, rank 8, fp32, graph mode
    python benchmarks/lora_step.py --blocks 12 --width 256 --batch 1 --tokens 16

The floor is what any tuning of a frozen base must pay: forward, backward down to the input, one bias trainable at the
bottom. Steps run interleaved (floor, LoRA, full, floor, ...) and medians are compared, because a machine's speed
drifts by more than the differences; the spread of the floor against itself is printed beside them.
"""
import argparse
import os
import statistics
import tempfile
import time

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from tqdm import tqdm

import mindpet_lite


class Attention(nn.Cell):
    """Multi-head self-attention on (batch, tokens, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Dense(width, width) for _ in range(4))
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()
        self.softmax = ops.Softmax()

    def split(self, x):
        return x.reshape(x.shape[0], x.shape[1], self.heads, self.size).transpose(0, 2, 1, 3)

    def construct(self, x):
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        y = self.mix(self.softmax(self.scores(q, k) * self.size ** -0.5), v)
        return self.to_out(y.transpose(0, 2, 1, 3).reshape(x.shape))


class Block(nn.Cell):
    """Pre-norm transformer block with an MLP of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm((width,)), nn.LayerNorm((width,))
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Dense(width, 4 * width), nn.Dense(4 * width, width)

    def construct(self, x):
        x = x + self.attention(self.norm1(x))
        h = self.up(self.norm2(x))
        # ops.GeLU within 6e-7, and several times faster on CPU.
        h = h * ops.sigmoid(1.5957691216 * (h + 0.044715 * h * h * h))
        return x + self.down(h)


class Loss(nn.Cell):
    """Mean square of the output of a stack of blocks."""

    def __init__(self, blocks: int, width: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.SequentialCell([Block(width, heads) for _ in range(blocks)])

    def construct(self, x):
        return ops.square(self.blocks(x)).mean()


class Step(nn.Cell):
    """Forward, backward and AdamW on what is trainable."""

    def __init__(self, loss: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer = nn.AdamWeightDecay(loss.trainable_params(), 1e-4)
        self.value_and_grad = ms.value_and_grad(loss, None, self.optimizer.parameters)

    def construct(self, x):
        loss, grads = self.value_and_grad(x)
        return ops.depend(loss, self.optimizer(grads))


def floor(args: argparse.Namespace) -> nn.Cell:
    net = Loss(args.blocks, args.width, args.heads)
    mindpet_lite.freeze_modules(net, include=["*"])
    mindpet_lite.freeze_modules(net, exclude=["blocks.0.norm1.beta"])
    return net


def lora(args: argparse.Namespace) -> nn.Cell:
    return mindpet_lite.get_pet_model(Loss(args.blocks, args.width, args.heads), mindpet_lite.LoraConfig(
        args.rank, args.rank, target_modules=["to_q", "to_k", "to_v", "to_out"]))


def full(args: argparse.Namespace) -> nn.Cell:
    return Loss(args.blocks, args.width, args.heads)


def measure(steps: dict[str, nn.Cell], x: ms.Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every step, run in turns after two warm-up turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in tqdm(range(rounds + 2), desc="rounds"):
        for name, step in steps.items():
            start = time.perf_counter()
            step(x).asnumpy()
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("blocks", 4), ("width", 512), ("heads", 8), ("batch", 4), ("tokens", 128), ("rank", 8),
                          ("rounds", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--mode", choices=("graph", "pynative"), default="graph")
    args = parser.parse_args()
    # MindSpore drops folders where it runs.
    os.chdir(tempfile.mkdtemp())
    ms.set_context(mode=ms.GRAPH_MODE if args.mode == "graph" else ms.PYNATIVE_MODE)
    ms.set_seed(1)
    x = ms.Tensor(np.random.default_rng(1).standard_normal((args.batch, args.tokens, args.width)), ms.float32)
    # The floor stands there twice: how far it is from itself is the noise of the machine.
    builders = {"floor": floor, "LoRA": lora, "floor again": floor, "full": full}
    times = measure({name: Step(build(args)) for name, build in builders.items()}, x, args.rounds)
    base = statistics.median(times["floor"])
    print(f"{'step':12} {'median ms':>10} {'of floor':>9} {'paired':>7}")
    for name, values in times.items():
        paired = statistics.median(value / other for value, other in zip(values, times["floor"]))
        median = statistics.median(values)
        print(f"{name:12} {1000 * median:10.2f} {median / base:9.3f} {paired:7.3f}")


if __name__ == "__main__":
    main()
