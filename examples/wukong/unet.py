"""The U-Net of Wukong-Huahua: predicts the noise in a latent, given the time step and the embedded text."""

import math
from collections.abc import Sequence

import mindspore
from attention import Build, SpatialTransformer
from layers import GroupNorm, name_parameters, upsample, use_plain_operators
from mindspore import Tensor, nn, ops


class Conv(nn.Cell):
    """Holds a convolution one level down, where Wukong's checkpoints have it (`.conv`)."""

    def __init__(self, build: Build, in_channels: int, out_channels: int, kernel: int, stride: int = 1,
                 zero: bool = False) -> None:
        super().__init__()
        self.conv = build.conv(in_channels, out_channels, kernel, stride, zero)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ResBlock(nn.Cell):
    """skip(x) + conv(silu(norm(conv(silu(norm(x))) + dense(silu(emb))))); skip: a 1x1 convolution if widths differ."""

    reads = "emb"

    def __init__(self, build: Build, in_channels: int, emb_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_layers_norm = GroupNorm(in_channels, 1e-5, build.groups)
        self.in_layers_conv = Conv(build, in_channels, out_channels, 3)
        self.emb_layers = nn.SequentialCell(nn.SiLU(), build.dense(emb_channels, out_channels))
        self.out_layers_norm = GroupNorm(out_channels, 1e-5, build.groups)
        self.out_layers_drop = nn.Dropout(p=build.dropout)
        self.out_layers_conv = Conv(build, out_channels, out_channels, 3, zero=True)
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else Conv(build, in_channels, out_channels, 1)

    def construct(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers_conv(ops.silu(self.in_layers_norm(x)))
        emb = self.emb_layers(emb)
        # Spelled out first: on CPU a sum of two shapes keeps a table of 16 bytes an element.
        h = h + ops.broadcast_to(emb.reshape(emb.shape[0], emb.shape[1], 1, 1), h.shape)
        h = self.out_layers_drop(ops.silu(self.out_layers_norm(h)))
        return self.skip_connection(x) + self.out_layers_conv(h)


class Downsample(nn.Cell):
    """Halves the side by a 3x3 convolution with stride 2."""

    reads = ""

    def __init__(self, build: Build, channels: int) -> None:
        super().__init__()
        self.op = Conv(build, channels, channels, 3, stride=2)

    def construct(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Cell):
    """Doubles the side: each pixel four times, then a 3x3 convolution."""

    reads = ""

    def __init__(self, build: Build, channels: int) -> None:
        super().__init__()
        self.conv = Conv(build, channels, channels, 3)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(upsample(x))


class Stem(Conv):
    """The first convolution."""

    reads = ""


class Block(nn.SequentialCell):
    """Cells run one after the other; each also gets what its `reads` says: the time's "emb", the text's "context"."""

    def __init__(self, *cells: nn.Cell) -> None:
        super().__init__(*cells)
        self.reads = tuple(cell.reads for cell in cells)

    def construct(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        for cell, reads in zip(self.cell_list, self.reads):
            if reads == "emb":
                x = cell(x, emb)
            elif reads == "context":
                x = cell(x, context)
            else:
                x = cell(x)
        return x


class UNetModel(nn.Cell):
    """Latent diffusion's U-Net (Rombach et al., 2022) with attention to the text, at Wukong's parameter paths.

    Args:
        image_size: The latents' usual side; other sides work where every level can halve them.
        in_channels: Channels of x.
        out_channels: Channels of the output.
        model_channels: Width of the first level, a multiple of `groups`.
        attention_resolutions: Downsampling factors (1, 2, 4, ...) of the levels with attention. Factors deeper than
            the U-Net are allowed, as Wukong's configs share one list.
        num_res_blocks: Residual blocks per level on the way down (one more on the way up).
        channel_mult: Width of each level as a multiple of `model_channels`.
        num_heads: Attention heads; must divide the width of every level with attention.
        transformer_depth: Transformer blocks in each SpatialTransformer.
        context_dim: Width of the embedded text.
        dropout: Dropout probability.
        use_spatial_transformer: Must be True: the other kind of attention cannot read text.
        use_checkpoint: Recompute the activations of each block in the backward pass: less memory, more time (on CPU at
            full size and 64 x 64 an eighth of the process's memory, for a third more time).
        legacy: Must be False: it only changes the width of heads where their width is given instead of their number.
        use_fp16: Convolutions and dense layers compute in float16; norms, softmax and the output stay float32.
        enable_lora: `to_q`, `to_k`, `to_v` and `to_out.0` of every attention are `LoRADense`.
        lora_rank: Their rank; needed with `enable_lora` and refused without.
        lora_alpha: Their alpha; needed with `enable_lora` and refused without.
        groups: Groups of every GroupNorm.
        exact_gelu: GELU by the error function, as Stable Diffusion has it, instead of Wukong's by tanh.

    Inputs:
        x: float (batch, in_channels, height, width).
        timesteps: (batch,), the time step of each sample.
        context: float (batch, tokens, context_dim), the embedded text.

    Outputs:
        (batch, out_channels, height, width) in the dtype of x.

    Raises:
        TypeError: An unknown argument.
        ValueError: Arguments that do not fit together.
    """

    def __init__(self, image_size: int, in_channels: int, out_channels: int, model_channels: int,
                 attention_resolutions: Sequence[int], num_res_blocks: int, channel_mult: Sequence[int],
                 num_heads: int, context_dim: int, transformer_depth: int = 1, dropout: float = 0.0,
                 use_spatial_transformer: bool = True, use_checkpoint: bool = False, legacy: bool = False,
                 use_fp16: bool = False, enable_lora: bool = False, lora_rank: int | None = None,
                 lora_alpha: float | None = None, groups: int = 32, exact_gelu: bool = False) -> None:
        super().__init__()
        check(image_size, channel_mult, attention_resolutions, use_spatial_transformer, legacy, enable_lora, lora_rank,
              lora_alpha)
        dtype = mindspore.float16 if use_fp16 else mindspore.float32
        build = Build(dropout, dtype, lora_rank or 0, lora_alpha or 0.0, groups, exact_gelu)
        emb_channels = 4 * model_channels
        widths = [model_channels * mult for mult in channel_mult]

        def res_block(in_width: int, out_width: int, level: int) -> list[nn.Cell]:
            cells: list[nn.Cell] = [ResBlock(build, in_width, emb_channels, out_width)]
            if 2 ** level in attention_resolutions:
                cells.append(SpatialTransformer(build, out_width, context_dim, num_heads, transformer_depth))
            return cells

        self.time_embed = nn.SequentialCell(build.dense(model_channels, emb_channels), nn.SiLU(),
                                            build.dense(emb_channels, emb_channels))
        blocks, skips = [Block(Stem(build, in_channels, model_channels, 3))], [model_channels]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                blocks.append(Block(*res_block(skips[-1], width, level)))
                skips.append(width)
            if level < len(widths) - 1:
                blocks.append(Block(Downsample(build, width)))
                skips.append(width)
        self.input_blocks = nn.CellList(blocks)
        top = widths[-1]
        self.middle_block = Block(ResBlock(build, top, emb_channels, top),
                                  SpatialTransformer(build, top, context_dim, num_heads, transformer_depth),
                                  ResBlock(build, top, emb_channels, top))
        blocks, below = [], top
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                cells = res_block(below + skips.pop(), width, level)
                if level > 0 and i == num_res_blocks:
                    cells.append(Upsample(build, width))
                blocks.append(Block(*cells))
                below = width
        self.output_blocks = nn.CellList(blocks)
        self.out = nn.SequentialCell(GroupNorm(model_channels, 1e-5, groups), nn.SiLU(),
                                     Conv(build, model_channels, out_channels, 3, zero=True))
        if use_checkpoint:
            for block in (*self.input_blocks, self.middle_block, *self.output_blocks):
                block.recompute()
            use_plain_operators(self)
        self.model_channels = model_channels
        self.dtype = dtype
        name_parameters(self)

    def construct(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).astype(self.dtype))
        context = context.astype(self.dtype)
        h = x.astype(self.dtype)
        skips = ()
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips = skips + (h,)
        h = self.middle_block(h, emb, context)
        for i, block in enumerate(self.output_blocks):
            h = block(ops.concat((h, skips[-1 - i]), axis=1), emb, context)
        return self.out(h).astype(x.dtype)


def check(image_size: int, channel_mult: Sequence[int], attention_resolutions: Sequence[int],
          use_spatial_transformer: bool, legacy: bool, enable_lora: bool, lora_rank: int | None,
          lora_alpha: float | None) -> None:
    """Refuses arguments of `UNetModel` that it does not support or that contradict each other."""
    halvings = 2 ** (len(channel_mult) - 1)
    if image_size % halvings:
        raise ValueError(f"channel_mult={list(channel_mult)} halves the side {len(channel_mult) - 1} times: "
                         f"image_size must be a multiple of {halvings}, got {image_size}.")
    odd = [factor for factor in attention_resolutions if factor < 1 or factor & (factor - 1)]
    if odd:
        raise ValueError(f"attention_resolutions are downsampling factors, so powers of 2; got {odd}.")
    if not use_spatial_transformer:
        raise ValueError("UNetModel needs use_spatial_transformer=True: without it the U-Net cannot read the text.")
    if legacy:
        raise ValueError("UNetModel needs legacy=False: legacy heads are given by their width, ours by num_heads.")
    given = (lora_rank is not None, lora_alpha is not None)
    if enable_lora and given != (True, True):
        raise ValueError(f"enable_lora=True needs lora_rank and lora_alpha, got {lora_rank} and {lora_alpha}.")
    if not enable_lora and given != (False, False):
        raise ValueError(f"lora_rank={lora_rank} and lora_alpha={lora_alpha} have no effect without enable_lora=True: "
                         "set it, or leave them out.")


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """(cos(t f), sin(t f)) with f_i = 10000^(-i / half), i < half = dim / 2 (Vaswani et al., 2017).

    Args:
        timesteps: (batch,), integers or floats.
        dim: Width of the embedding, even.

    Returns:
        float32 (batch, dim).
    """
    half = dim // 2
    # exp on the device and in float32, as Wukong was trained: t up to 1000 magnifies the last bit of the frequencies.
    frequencies = ops.exp(ops.arange(half).astype(mindspore.float32) * (-math.log(10000.0) / half))
    angles = timesteps.astype(mindspore.float32).reshape(-1, 1) * frequencies
    return ops.concat((ops.cos(angles), ops.sin(angles)), axis=1)
