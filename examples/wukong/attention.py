"""The attention of Wukong-Huahua's U-Net: from pixel to pixel, and from pixels to the words of the text."""

from dataclasses import dataclass

import mindspore
from layers import Attend, GatedGelu, GroupNorm, LayerNorm
from mindspore import Tensor, nn

from mindpet_lite.delta import LoRADense


@dataclass(frozen=True)
class Build:
    """What every block of one U-Net is built with.

    Attributes:
        dropout: Probability, in the residual blocks, the attention's output and the feed-forward part.
        dtype: Type the convolutions and dense layers compute in.
        lora_rank: Rank of the LoRA layers in the attention; 0 for plain dense layers.
        lora_alpha: Their alpha.
        groups: Groups of every GroupNorm.
        exact_gelu: GELU by the error function instead of by tanh.
    """

    dropout: float
    dtype: mindspore.Type
    lora_rank: int
    lora_alpha: float
    groups: int = 32
    exact_gelu: bool = False

    def dense(self, in_channels: int, out_channels: int) -> nn.Dense:
        """A dense layer with bias."""
        return self.typed(nn.Dense(in_channels, out_channels))

    def conv(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, zero: bool = False) -> nn.Conv2d:
        """A convolution with bias, padded to keep the side; `zero` starts it at 0."""
        init = {"weight_init": "zeros", "bias_init": "zeros"} if zero else {}
        return self.typed(nn.Conv2d(in_channels, out_channels, kernel, stride, pad_mode="pad", padding=kernel // 2,
                                    has_bias=True, **init))

    def attention_dense(self, in_channels: int, out_channels: int, has_bias: bool) -> nn.Dense:
        """A dense layer of the attention: with LoRA where the net has it."""
        if self.lora_rank:
            return self.typed(LoRADense(in_channels, out_channels, self.lora_rank, self.lora_alpha, has_bias=has_bias))
        return self.typed(nn.Dense(in_channels, out_channels, has_bias=has_bias))

    def typed(self, cell: nn.Cell) -> nn.Cell:
        """Makes the cell compute in `dtype`."""
        return cell if self.dtype == mindspore.float32 else cell.to_float(self.dtype)


class CrossAttention(nn.Cell):
    """Attention from x (batch, tokens, channels) to context (batch, keys, context_dim), output as x."""

    def __init__(self, build: Build, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"num_heads must divide the width of every level with attention, got num_heads={heads} "
                             f"and a width of {channels}.")
        self.to_q = build.attention_dense(channels, channels, has_bias=False)
        self.to_k = build.attention_dense(context_dim, channels, has_bias=False)
        self.to_v = build.attention_dense(context_dim, channels, has_bias=False)
        self.to_out = nn.SequentialCell(build.attention_dense(channels, channels, has_bias=True),
                                        nn.Dropout(p=build.dropout))
        self.attend = Attend(heads)

    def construct(self, x: Tensor, context: Tensor) -> Tensor:
        return self.to_out(self.attend(self.to_q(x), self.to_k(context), self.to_v(context)))


class GEGLU(nn.Cell):
    """a * gelu(b), a and b the two halves of one dense layer's output (Shazeer, 2020)."""

    def __init__(self, build: Build, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = build.dense(in_channels, 2 * out_channels)
        self.gated = GatedGelu(build.exact_gelu)

    def construct(self, x: Tensor) -> Tensor:
        return self.gated(self.proj(x))


class FeedForward(nn.Cell):
    """dense(dropout(geglu(x))), four times as wide inside."""

    def __init__(self, build: Build, channels: int) -> None:
        super().__init__()
        self.net = nn.SequentialCell(GEGLU(build, channels, 4 * channels), nn.Dropout(p=build.dropout),
                                     build.dense(4 * channels, channels))

    def construct(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Cell):
    """Self-attention, attention to the text and feed-forward, each on the normed x and added to x."""

    def __init__(self, build: Build, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(build, channels, channels, heads)
        self.ff = FeedForward(build, channels)
        self.attn2 = CrossAttention(build, channels, context_dim, heads)
        self.norm1 = LayerNorm(channels)
        self.norm2 = LayerNorm(channels)
        self.norm3 = LayerNorm(channels)

    def construct(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Cell):
    """x + proj_out(transformer blocks(proj_in(norm(x)))), the pixels as tokens."""

    reads = "context"

    def __init__(self, build: Build, channels: int, context_dim: int, heads: int, depth: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, 1e-6, build.groups)
        self.proj_in = build.conv(channels, channels, 1)
        self.transformer_blocks = nn.CellList([TransformerBlock(build, channels, context_dim, heads)
                                               for _ in range(depth)])
        self.proj_out = build.conv(channels, channels, 1, zero=True)

    def construct(self, x: Tensor, context: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.proj_in(self.norm(x)).reshape(batch, channels, height * width).transpose(0, 2, 1)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(0, 2, 1).reshape(x.shape))
