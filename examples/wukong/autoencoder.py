"""The autoencoder of Wukong-Huahua (AutoencoderKL): pictures to latents and back."""

from dataclasses import dataclass
from itertools import pairwise

from layers import Attend, GroupNorm, name_parameters, upsample
from mindspore import Tensor, nn, ops

EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderConfig:
    """The keys of `ddconfig`.

    Attributes:
        ch: Width of the first level.
        ch_mult: Width of each level as a multiple of `ch`; each level but the last halves the side.
        num_res_blocks: Residual blocks per level of the encoder (the decoder has one more).
        in_channels: Channels of the pictures that come in.
        out_ch: Channels of the pictures that go out.
        z_channels: Channels of the latents before `quant_conv`.
        resolution: Side of the pictures, in pixels, that `attn_resolutions` counts from.
        attn_resolutions: Sides, in pixels, of the levels that have attention.
        double_z: The encoder gives mean and log-variance; only True makes sense here.
        dropout: Probability inside the residual blocks.
        groups: Groups of every GroupNorm. A narrow autoencoder needs fewer than Wukong's 32: where a group is one
            channel, each picture's own mean of it, and with it the colour, is lost.
        spare_resampling: Every level has `downsample` or `upsample`, as in Wukong's checkpoints, although that of
            the deepest level of the encoder and of the first of the decoder is not run.
    """

    ch: int
    ch_mult: list[int]
    num_res_blocks: int
    in_channels: int
    out_ch: int
    z_channels: int
    resolution: int
    attn_resolutions: list[int]
    double_z: bool = True
    dropout: float = 0.0
    groups: int = 32
    spare_resampling: bool = True

    def __post_init__(self) -> None:
        sides = self.sides()
        if not self.double_z:
            raise ValueError("AutoencoderKL needs double_z=True: its encoder gives a mean and a log-variance.")
        unknown = [side for side in self.attn_resolutions if side not in sides]
        if unknown:
            raise ValueError(f"attn_resolutions must be among the sides {sides} of the levels, got {unknown}.")

    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.ch * mult for mult in self.ch_mult]

    def sides(self) -> list[int]:
        """Pixels along a side at each level."""
        return [self.resolution // 2 ** level for level in range(len(self.ch_mult))]


def conv(in_channels: int, out_channels: int, kernel: int) -> nn.Conv2d:
    """A convolution with bias that keeps the side."""
    return nn.Conv2d(in_channels, out_channels, kernel, pad_mode="pad", padding=kernel // 2, has_bias=True)


class ResnetBlock(nn.Cell):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with a 1x1 convolution on x where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_channels, EPS, groups)
        self.conv1 = conv(in_channels, out_channels, 3)
        self.norm2 = GroupNorm(out_channels, EPS, groups)
        self.dropout = nn.Dropout(p=dropout)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.nin_shortcut = conv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def construct(self, x: Tensor) -> Tensor:
        h = self.conv1(ops.silu(self.norm1(x)))
        h = self.conv2(self.dropout(ops.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Cell):
    """x plus single-head attention over the pixels, with 1x1 convolutions for query, key, value and output."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, EPS, groups)
        self.q = conv(channels, channels, 1)
        self.k = conv(channels, channels, 1)
        self.v = conv(channels, channels, 1)
        self.proj_out = conv(channels, channels, 1)
        self.attend = Attend(heads=1)

    def construct(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        out = self.attend(tokens(self.q(h)), tokens(self.k(h)), tokens(self.v(h)))
        return x + self.proj_out(out.transpose(0, 2, 1).reshape(x.shape))


def tokens(x: Tensor) -> Tensor:
    """(batch, channels, height, width) -> (batch, height * width, channels)."""
    return x.reshape(x.shape[0], x.shape[1], -1).transpose(0, 2, 1)


class Downsample(nn.Cell):
    """Halves the side: a 3x3 convolution with stride 2 over x padded on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, pad_mode="pad", padding=(0, 1, 0, 1), has_bias=True)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Cell):
    """Doubles the side: each pixel four times, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, 3)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv(upsample(x))


class Level(nn.Cell):
    """The residual blocks of one level, each followed by attention where the level has it."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool, dropout: float,
                 groups: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.CellList([ResnetBlock(a, b, dropout, groups) for a, b in pairwise(widths)])
        self.attn = nn.CellList([AttnBlock(out_channels, groups) for _ in range(blocks if attention else 0)])

    def construct(self, x: Tensor) -> Tensor:
        for i in range(len(self.block)):
            x = self.block[i](x)
            if len(self.attn) > 0:
                x = self.attn[i](x)
        return x


class DownLevel(Level):
    """A level of the encoder; `downsample` is run only where the level halves the side (`resample`)."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool, dropout: float,
                 groups: int, resample: bool, spare: bool) -> None:
        super().__init__(in_channels, out_channels, blocks, attention, dropout, groups)
        self.downsample = Downsample(out_channels) if resample or spare else nn.Identity()
        self.resample = resample

    def construct(self, x: Tensor) -> Tensor:
        x = super().construct(x)
        return self.downsample(x) if self.resample else x


class UpLevel(Level):
    """A level of the decoder; `upsample` is run only where the level doubles the side (`resample`)."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool, dropout: float,
                 groups: int, resample: bool, spare: bool) -> None:
        super().__init__(in_channels, out_channels, blocks, attention, dropout, groups)
        self.upsample = Upsample(out_channels) if resample or spare else nn.Identity()
        self.resample = resample

    def construct(self, x: Tensor) -> Tensor:
        x = super().construct(x)
        return self.upsample(x) if self.resample else x


class Middle(nn.Cell):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, dropout, groups)

    def construct(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Cell):
    """Pictures (batch, in_channels, s, s) -> (batch, 2 * z_channels, s / 2^(levels-1), s / 2^(levels-1))."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, last = config.widths(), len(config.ch_mult) - 1
        self.conv_in = conv(config.in_channels, config.ch, 3)
        inputs = [config.ch] + widths
        self.down = nn.CellList([
            DownLevel(inputs[i], widths[i], config.num_res_blocks, side in config.attn_resolutions, config.dropout,
                      config.groups, resample=i != last, spare=config.spare_resampling)
            for i, side in enumerate(config.sides())])
        self.mid = Middle(widths[-1], config.dropout, config.groups)
        self.norm_out = GroupNorm(widths[-1], EPS, config.groups)
        self.conv_out = conv(widths[-1], 2 * config.z_channels, 3)

    def construct(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(ops.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Cell):
    """Latents (batch, z_channels, s, s) -> pictures (batch, out_ch, s * 2^(levels-1), s * 2^(levels-1))."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths()
        self.conv_in = conv(config.z_channels, widths[-1], 3)
        self.mid = Middle(widths[-1], config.dropout, config.groups)
        inputs = widths[1:] + widths[-1:]
        self.up = nn.CellList([
            UpLevel(inputs[i], widths[i], config.num_res_blocks + 1, side in config.attn_resolutions, config.dropout,
                    config.groups, resample=i != 0, spare=config.spare_resampling)
            for i, side in enumerate(config.sides())])
        self.norm_out = GroupNorm(widths[0], EPS, config.groups)
        self.conv_out = conv(widths[0], config.out_ch, 3)

    def construct(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in self.up[::-1]:
            h = level(h)
        return self.conv_out(ops.silu(self.norm_out(h)))


class AutoencoderKL(nn.Cell):
    """The KL-regularised autoencoder of latent diffusion (Rombach et al., 2022) with Wukong's parameter paths.

    Args:
        ddconfig: The keys of `AutoencoderConfig`.
        embed_dim: Channels of the latents.

    Raises:
        TypeError: An unknown or a missing key in `ddconfig`.
        ValueError: Values that do not fit together.
    """

    def __init__(self, ddconfig: dict, embed_dim: int) -> None:
        super().__init__()
        config = AutoencoderConfig(**ddconfig)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = conv(2 * config.z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = conv(embed_dim, config.z_channels, 1)
        name_parameters(self)

    def encode_moments(self, img: Tensor) -> Tensor:
        """Pictures in [-1, 1] (batch, in_channels, s, s) -> mean and log-variance, (batch, 2 * embed_dim, ...)."""
        return self.quant_conv(self.encoder(img))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (batch, embed_dim, s, s) -> pictures, about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def construct(self, img: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The training pass: z = mean + exp(logvar / 2) * noise, logvar kept in [-30, 20].

        Returns:
            (the decoded z, the moments it was drawn from).
        """
        moments = self.encode_moments(img)
        mean, logvar = ops.split(moments, moments.shape[1] // 2, axis=1)
        deviation = ops.exp(0.5 * ops.clamp(logvar, -30.0, 20.0))
        return self.decode(mean + deviation * noise), moments
