"""The nets that the benchmarks train: stacks of transformer blocks and the Wukong U-Net, their shapes, and the step.

    python benchmarks/models.py                       # the shapes, and how many parameters each net has

The layers that LoRA adapts (to_q, to_k, to_v, to_out) are made by the class or function `dense(in, out, has_bias=...)`
that a net is built with, so that a library whose layers are written into the model stands beside one that replaces
plain layers.
"""
from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "wukong"))
import cpu_operators  # noqa: E402

Dense = Callable[..., nn.Cell]


@dataclasses.dataclass(frozen=True)
class Stack:
    """Sizes of a stack of transformer blocks, of its input and of its LoRA."""

    blocks: int
    width: int
    batch: int
    tokens: int
    rank: int
    heads: int = 8
    targets: tuple[str, ...] = dataclasses.field(default=("to_q", "to_k", "to_v", "to_out"), repr=False)

    @property
    def layers(self) -> int:
        """How many layers LoRA adapts."""
        return self.blocks * len(self.targets)

    def net(self, dense: Dense) -> nn.Cell:
        """Build the net with its loss."""
        return Loss(nn.SequentialCell([Block(self.width, self.heads, dense) for _ in range(self.blocks)]))

    def inputs(self) -> tuple[Tensor, ...]:
        """Return what the net is called with."""
        rng = np.random.default_rng(1)
        return (Tensor(rng.standard_normal((self.batch, self.tokens, self.width)), ms.float32),)


@dataclasses.dataclass(frozen=True)
class UNet:
    """Sizes of a Wukong U-Net, of its input and of its LoRA."""

    side: int
    channels: int
    mult: tuple[int, ...]
    heads: int
    context: int
    words: int
    batch: int
    rank: int
    targets: tuple[str, ...] = dataclasses.field(default=("to_q", "to_k", "to_v", "to_out.0"), repr=False)

    @property
    def layers(self) -> int:
        """How many layers LoRA adapts: those of two attentions in each transformer, three a level and the middle's."""
        return 2 * len(self.targets) * (3 * len(self.mult) + 1)

    def net(self, dense: Dense) -> nn.Cell:
        """Build the net with its loss."""
        import attention
        from unet import UNetModel

        # The U-Net writes its attention's layers by this method.
        attention.Build.attention_dense = lambda self, width, out, has_bias: dense(width, out, has_bias=has_bias)
        return Loss(UNetModel(self.side, 8, 8, self.channels, (1, 2, 4), 1, self.mult, self.heads, self.context))

    def inputs(self) -> tuple[Tensor, ...]:
        """Return what the net is called with."""
        rng = np.random.default_rng(1)
        return (Tensor(rng.standard_normal((self.batch, 8, self.side, self.side)), ms.float32),
                Tensor(rng.integers(0, 1000, self.batch), ms.int32),
                Tensor(rng.standard_normal((self.batch, self.words, self.context)), ms.float32))


SHAPES: dict[str, Stack | UNet] = {
    "tiny": Stack(blocks=12, width=256, batch=1, tokens=16, rank=8),
    "text": Stack(blocks=4, width=512, batch=4, tokens=128, rank=8),
    "wide": Stack(blocks=2, width=2048, batch=1, tokens=256, rank=16),
    "many": Stack(blocks=4, width=320, batch=8, tokens=256, rank=64),
    # A U-Net of the kind of examples/wukong, and one four times as wide inside with one level more.
    "unet-tiny": UNet(side=8, channels=96, mult=(1, 1), heads=4, context=64, words=16, batch=4, rank=4),
    "unet-mid": UNet(side=16, channels=192, mult=(1, 2, 2), heads=8, context=256, words=16, batch=2, rank=8),
}
STACKS = [name for name, shape in SHAPES.items() if isinstance(shape, Stack)]


class Attention(nn.Cell):
    """Multi-head self-attention on (batch, tokens, width)."""

    def __init__(self, width: int, heads: int, dense: Dense) -> None:
        super().__init__()
        self.size = width // heads
        self.to_q, self.to_k, self.to_v, self.to_out = (dense(width, width, has_bias=True) for _ in range(4))
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()
        self.softmax = cpu_operators.Softmax()

    def split(self, x):
        # As many heads as arrive: a process may have some of them.
        return x.reshape(x.shape[0], x.shape[1], -1, self.size).transpose(0, 2, 1, 3)

    def construct(self, x):
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        y = self.mix(self.softmax(self.scores(q, k) * self.size ** -0.5), v)
        return self.to_out(y.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[1], -1))


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm, written out where there is much to do: below 2^16 numbers one kernel is faster than ten."""

    def __init__(self, width: int) -> None:
        super().__init__((width,))
        self.written_out = cpu_operators.LayerNorm(self.epsilon)

    def construct(self, x):
        if x.size < 2 ** 16:
            return super().construct(x)
        return self.written_out(x, self.gamma, self.beta)


class Block(nn.Cell):
    """Pre-norm transformer block with an MLP of four times the width."""

    def __init__(self, width: int, heads: int, dense: Dense) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attention = Attention(width, heads, dense)
        self.up, self.down = nn.Dense(width, 4 * width), nn.Dense(4 * width, width)
        self.gelu = cpu_operators.Gelu()

    def construct(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.gelu(self.up(self.norm2(x))))


class Loss(nn.Cell):
    """Mean square of what a net gives."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__()
        self.net = net

    def construct(self, *inputs):
        return ops.square(self.net(*inputs)).mean()


class Step(nn.Cell):
    """Forward, backward and AdamW on what is trainable."""

    def __init__(self, loss: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer = nn.AdamWeightDecay(loss.trainable_params(), 1e-4)
        self.value_and_grad = ms.value_and_grad(loss, None, self.optimizer.parameters)

    def construct(self, *inputs):
        loss, grads = self.value_and_grad(*inputs)
        return ops.depend(loss, self.optimizer(grads))


def set_mode(mode: str) -> None:
    """Run what follows in "graph" or "pynative" mode, from the same random numbers."""
    ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
    ms.set_seed(1)


def main() -> None:
    for name, shape in SHAPES.items():
        net = shape.net(nn.Dense)
        count = sum(parameter.size for parameter in net.get_parameters())
        found = sum(isinstance(cell, nn.Dense) and path.endswith(shape.targets)
                    for path, cell in net.cells_and_names())
        assert found == shape.layers, (found, shape.layers)
        print(f"{name:9} {count / 1e6:6.2f} M parameters, {shape.layers:3} layers adapted: {shape}")


if __name__ == "__main__":
    main()
