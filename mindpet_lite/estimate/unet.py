"""The U-Net of `examples/wukong` from its YAML, with the operators that it is made of on CPU."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from mindpet_lite.estimate.cpu_operators import CpuOperators
from mindpet_lite.estimate.sizes import number, numbers
from mindpet_lite.estimate.tape import Value

# Threads of oneDNN's convolutions, each with a buffer of its own.
THREADS = 2
# Of every GroupNorm.
GROUPS = 32
# From so many queries on, attention goes head by head.
MANY = 1024


@dataclasses.dataclass(frozen=True)
class UNet:
    """Sizes of a U-Net, by their names in the `unet` block of the example's YAML."""

    image_size: int
    in_channels: int
    out_channels: int
    model_channels: int
    attention_resolutions: tuple[int, ...]
    num_res_blocks: int
    channel_mult: tuple[int, ...]
    num_heads: int
    context_dim: int
    transformer_depth: int = 1
    words: int = 77

    kind: ClassVar[str] = "U-Net"
    # What LoRA adapts unless it is told otherwise: the attention.
    targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> UNet:
        """Return the sizes that a mapping says in its block `unet`.

        Raises:
            ValueError: a size is missing, no positive int or list of them, or they do not fit together.
        """
        unet, text = config["unet"], config.get("text_encoder")
        net = cls(number(unet, "image_size"), number(unet, "in_channels"), number(unet, "out_channels"),
                  number(unet, "model_channels"), numbers(unet, "attention_resolutions"),
                  number(unet, "num_res_blocks"), numbers(unet, "channel_mult"), number(unet, "num_heads"),
                  number(unet, "context_dim"), number(unet, "transformer_depth", 1),
                  number(text, "context_length", cls.words) if isinstance(text, Mapping) else cls.words)
        halvings = 2 ** (len(net.channel_mult) - 1)
        if net.image_size % halvings:
            raise ValueError(f"image_size must be a multiple of {halvings}, because channel_mult halves the side "
                             f"{len(net.channel_mult) - 1} times, but is {net.image_size}.")
        if net.model_channels % GROUPS:
            raise ValueError(f"model_channels must be a multiple of {GROUPS}, but is {net.model_channels}.")
        odd = [width for width in net.widths if width % net.num_heads]
        if odd:
            raise ValueError(f"num_heads must divide the width of every level, but {net.num_heads} does not divide "
                             f"{odd[0]}.")
        return net

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.model_channels * factor for factor in self.channel_mult]

    def forward(self, tape: CpuOperators, batch: int, words: int | None, recompute: bool) -> Value:
        """Record the prediction of the noise in `batch` latents, given so many words, and its mean square."""
        side, words = self.image_size, words or self.words
        steps = UNetTape(tape, self, tape.input(batch, words, self.context_dim), recompute)
        width, widths = self.model_channels, self.widths
        emb = steps.time(tape.input(batch, width), 4 * width)
        x = tape.input(batch, self.in_channels, side, side)
        with tape.recomputed(recompute):
            x = steps.conv(x, "input_blocks.0.0.conv", width, 3)
        skips, number = [x], 0
        for level, out in enumerate(widths):
            for _ in range(self.num_res_blocks):
                number += 1
                with tape.recomputed(recompute):
                    x = steps.block(x, emb, f"input_blocks.{number}", out, level)
                skips.append(x)
            if level < len(widths) - 1:
                number += 1
                with tape.recomputed(recompute):
                    x = steps.conv(x, f"input_blocks.{number}.0.op.conv", out, 3, stride=2)
                skips.append(x)
        with tape.recomputed(recompute):
            x = steps.residual(x, emb, "middle_block.0", widths[-1])
            x = steps.transformer(x, "middle_block.1")
            x = steps.residual(x, emb, "middle_block.2", widths[-1])
        number = 0
        for level, out in reversed(list(enumerate(widths))):
            for index in range(self.num_res_blocks + 1):
                x = tape.concat([x, skips.pop()], 1)
                with tape.recomputed(recompute):
                    x = steps.block(x, emb, f"output_blocks.{number}", out, level)
                    if level > 0 and index == self.num_res_blocks:
                        place = 2 if steps.attends(level) else 1
                        x = steps.conv(steps.upsample(x), f"output_blocks.{number}.{place}.conv.conv", out, 3)
                number += 1
        x = tape.silu(steps.group_norm(x, "out.0"))
        x = steps.conv(x, "out.2.conv", self.out_channels, 3)
        return tape.reduce("ReduceMean", tape.unary("Square", x, "x"), 1)


@dataclasses.dataclass(frozen=True)
class UNetTape:
    """Records the parts of a U-Net; each method is a cell of the example."""

    tape: CpuOperators
    net: UNet
    context: Value
    recompute: bool

    def group_norm(self, x: Value, path: str) -> Value:
        """`GroupNorm`; plain in a net that recomputes."""
        return self.tape.plain_norm("GroupNorm", x, path, x.shape[1]) if self.recompute else \
            self.tape.group_norm(x, path, GROUPS)

    def layer_norm(self, x: Value, path: str) -> Value:
        """`LayerNorm`; plain in a net that recomputes."""
        return self.tape.plain_norm("LayerNorm", x, path, x.shape[-1]) if self.recompute else \
            self.tape.layer_norm(x, path)

    def attends(self, level: int) -> bool:
        """Tell whether a level has attention."""
        return 2 ** level in self.net.attention_resolutions

    def time(self, x: Value, width: int) -> Value:
        """Two dense layers."""
        return self.tape.dense(self.tape.silu(self.tape.dense(x, "time_embed.0", width)), "time_embed.2",
                               width)

    def block(self, x: Value, emb: Value, path: str, out: int, level: int) -> Value:
        """A residual block, and attention where the level has it."""
        x = self.residual(x, emb, f"{path}.0", out)
        return self.transformer(x, f"{path}.1") if self.attends(level) else x

    def residual(self, x: Value, emb: Value, path: str, out: int) -> Value:
        """`ResBlock`."""
        tape = self.tape
        h = tape.silu(self.group_norm(x, f"{path}.in_layers_norm"))
        h = self.conv(h, f"{path}.in_layers_conv.conv", out, 3)
        e = tape.dense(tape.silu(emb), f"{path}.emb_layers.1", out)
        h = tape.binary("Add", h, tape.broadcast(e, *h.shape))
        h = tape.silu(self.group_norm(h, f"{path}.out_layers_norm"))
        h = self.conv(h, f"{path}.out_layers_conv.conv", out, 3)
        skip = x if x.shape[1] == out else self.conv(x, f"{path}.skip_connection.conv", out, 1)
        return tape.binary("Add", skip, h)

    def transformer(self, x: Value, path: str) -> Value:
        """`SpatialTransformer`."""
        tape, (batch, channels, height, width) = self.tape, x.shape
        pixels = height * width
        h = self.conv(self.group_norm(x, f"{path}.norm"), f"{path}.proj_in", channels, 1)
        h = tape.transpose(tape.view(h, batch, channels, pixels), batch, pixels, channels)
        for block in range(self.net.transformer_depth):
            inner = f"{path}.transformer_blocks.{block}"
            n = self.layer_norm(h, f"{inner}.norm1")
            h = tape.binary("Add", h, self.attention(n, n, f"{inner}.attn1"))
            h = tape.binary("Add", h, self.attention(self.layer_norm(h, f"{inner}.norm2"), self.context,
                                                     f"{inner}.attn2"))
            h = tape.binary("Add", h, self.feed_forward(self.layer_norm(h, f"{inner}.norm3"), f"{inner}.ff.net"))
        h = tape.view(tape.transpose(h, batch, channels, pixels), *x.shape)
        return tape.binary("Add", x, self.conv(h, f"{path}.proj_out", channels, 1))

    def attention(self, x: Value, context: Value, path: str) -> Value:
        """`CrossAttention`."""
        tape, heads, (batch, rows, width) = self.tape, self.net.num_heads, x.shape
        size, keys = width // heads, context.shape[1]

        def split(value: Value) -> Value:
            count = value.shape[1]
            return tape.transpose(tape.view(value, batch, count, heads, size), batch, heads, count, size)

        q = tape.dense(x, f"{path}.to_q", width, bias=False)
        k, v = (tape.dense(context, f"{path}.{name}", width, bias=False) for name in ("to_k", "to_v"))
        if rows >= MANY:
            return tape.dense(tape.attend_by_head(q, k, v, heads), f"{path}.to_out.0", width)
        scores = tape.batched(split(tape.unary("Mul", q)), split(k), (batch, heads, rows, keys), False)
        mixed = tape.batched(tape.row_softmax(scores), split(v), (batch, heads, rows, size), False)
        mixed = tape.view(tape.transpose(mixed, batch, rows, heads, size), batch, rows, width)
        return tape.dense(mixed, f"{path}.to_out.0", width)

    def feed_forward(self, x: Value, path: str) -> Value:
        """`FeedForward`: value · gelu(gate), the GELU written out."""
        tape, width = self.tape, x.shape[-1]
        both = tape.dense(x, f"{path}.0.proj", 8 * width)
        gated = tape.plain_gated(both) if self.recompute else tape.gated(both)
        return tape.dense(gated, f"{path}.2", width)

    def upsample(self, x: Value) -> Value:
        """Each pixel four times."""
        batch, channels, height, width = x.shape
        return self.tape.broadcast(x, batch, channels, 2 * height, 2 * width)

    def conv(self, x: Value, path: str, out: int, kernel: int, stride: int = 1) -> Value:
        """`nn.Conv2d` with a bias; the gradients' kernels have a buffer for each thread."""
        tape, (batch, channels, height, width) = self.tape, x.shape
        weight = tape.weight(f"{path}.weight", out, channels, kernel, kernel)
        bias = tape.parameter(f"{path}.bias", out)
        shape = (batch, out, height // stride, width // stride)
        threads = min(THREADS, batch)
        buffer = 4 * kernel ** 2 * channels * math.prod(shape[2:]) * threads if kernel > 1 else 0

        y = tape.apply("Conv2D", [x, weight], shape, lambda reads, results, dy: [
            tape.run("Conv2DBackpropInput", [dy, reads[1]], x.shape, buffer=buffer) if x.graded else None,
            tape.run("Conv2DBackpropFilter", [dy, reads[0]], weight.shape, buffer=4 * threads * weight.numel)
            if weight.graded else None])
        return tape.bias(y, bias)
