"""Small cells and functions that the U-Net, the text encoder and the autoencoder share."""

import os

import cpu_operators
import mindspore
from cpu_operators import exact_gelu, gelu
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

# With AVX-512, oneDNN has no fast kernel for the layout MindSpore hands it and runs 3x3 convolutions on its reference
# code, about 100 times slower than with AVX2. oneDNN reads the variable when its first operator runs.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")


def on_cpu() -> bool:
    """Whether the cells built now are for CPU."""
    return mindspore.get_context("device_target") == "CPU"


class GroupNorm(nn.Cell):
    """y = gamma * (x - mean) / sqrt(var + eps) + beta, mean and variance over each group of channels and all pixels.

    Args:
        channels: Channels of x, a multiple of `groups`.
        eps: Added to the (biased) variance.
        groups: Groups the channels are divided into.

    Inputs:
        x of shape (batch, channels, height, width).

    Outputs:
        The shape and dtype of x; the statistics are float32 whatever x is.

    Raises:
        ValueError: `channels` is not a multiple of `groups`.
    """

    def __init__(self, channels: int, eps: float, groups: int = 32) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"GroupNorm needs channels that are a multiple of {groups}, got {channels}: "
                             f"choose widths that are multiples of {groups}.")
        self.gamma = Parameter(initializer("ones", (channels,)), name="gamma")
        self.beta = Parameter(initializer("zeros", (channels,)), name="beta")
        self.groups = groups
        self.eps = eps
        self.written_out = cpu_operators.GroupNorm(groups, eps) if on_cpu() else None

    def construct(self, x: Tensor) -> Tensor:
        y = x.astype(mindspore.float32)
        if self.written_out is not None:
            y = self.written_out(y, self.gamma, self.beta)
        else:
            y = ops.group_norm(y, self.groups, self.gamma, self.beta, self.eps)
        return y.astype(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last axis in float32, the output in the dtype of x."""

    def __init__(self, channels: int) -> None:
        super().__init__((channels,), epsilon=1e-5)
        self.written_out = cpu_operators.LayerNorm(1e-5) if on_cpu() else None

    def construct(self, x: Tensor) -> Tensor:
        y = x.astype(mindspore.float32)
        if self.written_out is not None:
            y = self.written_out(y, self.gamma, self.beta)
        else:
            y = super().construct(y)
        return y.astype(x.dtype)


def use_plain_operators(net: nn.Cell) -> None:
    """Makes the norms and gates of a net that recomputes use MindSpore's own operators on CPU too.

    Of a cell with a gradient of its own MindSpore keeps the input, even where the cell is recomputed.
    """
    for _, cell in net.cells_and_names():
        if isinstance(cell, GroupNorm | LayerNorm | GatedGelu):
            cell.written_out = None


def upsample(x: Tensor) -> Tensor:
    """Each pixel four times: (batch, channels, h, w) -> (batch, channels, 2h, 2w)."""
    batch, channels, height, width = x.shape
    x = ops.broadcast_to(x.reshape(batch, channels, height, 1, width, 1), (batch, channels, height, 2, width, 2))
    return x.reshape(batch, channels, 2 * height, 2 * width)


class GatedGelu(nn.Cell):
    """a gelu(b), a and b the halves of x (..., 2 width).

    Args:
        exact: GELU by the error function instead of by tanh.
    """

    def __init__(self, exact: bool) -> None:
        super().__init__()
        self.gelu = exact_gelu if exact else gelu
        self.written_out = cpu_operators.GatedGelu(exact) if on_cpu() else None

    def construct(self, x: Tensor) -> Tensor:
        if self.written_out is not None:
            return self.written_out(x)
        a, b = ops.split(x, x.shape[-1] // 2, axis=-1)
        return a * self.gelu(b)


class Attend(nn.Cell):
    """softmax(Q K^T / sqrt(d) + mask) V for each head (Vaswani et al., 2017), the softmax in float32.

    Args:
        heads: Number of heads.

    Inputs:
        query: (batch, queries, heads * d).
        key: (batch, keys, heads * d).
        value: (batch, keys, heads * d).
        mask: (queries, keys), added to the scores; None for no mask.

    Outputs:
        (batch, queries, heads * d) in the dtype of `value`.

    On CPU many queries are computed head by head, and their weights again for the gradient: for 4096 queries and keys
    they take 67 MB a head.
    """

    MANY = 1024

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.by_head = cpu_operators.AttendByHead(heads) if on_cpu() else None
        self.softmax = cpu_operators.Softmax() if on_cpu() else ops.Softmax(-1)
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.average = ops.BatchMatMul()

    def split(self, x: Tensor) -> Tensor:
        """(batch, tokens, heads * d) -> (batch, heads, tokens, d)."""
        return x.reshape(x.shape[0], x.shape[1], self.heads, -1).transpose(0, 2, 1, 3)

    def construct(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.by_head is not None and mask is None and query.shape[1] >= self.MANY:
            return self.by_head(query, key, value)
        scale = (query.shape[-1] // self.heads) ** -0.5
        scores = self.scores(self.split(query * scale), self.split(key)).astype(mindspore.float32)
        if mask is not None:
            scores = scores + mask
        weights = self.softmax(scores).astype(value.dtype)
        return self.average(weights, self.split(value)).transpose(0, 2, 1, 3).reshape(query.shape)


def name_parameters(net: nn.Cell) -> None:
    """Gives every parameter its path as its name, because containers can leave the two different."""
    for path, parameter in net.parameters_and_names():
        parameter.name = path
