"""Small cells and functions that the U-Net, the text encoder and the autoencoder share."""

import os

import mindspore
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

# With AVX-512, oneDNN has no fast kernel for the layout MindSpore hands it and runs 3x3 convolutions on its reference
# code, about 100 times slower than with AVX2. oneDNN reads the variable when its first operator runs.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")


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

    def construct(self, x: Tensor) -> Tensor:
        y = ops.group_norm(x.astype(mindspore.float32), self.groups, self.gamma, self.beta, self.eps)
        return y.astype(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last axis in float32, the output in the dtype of x."""

    def __init__(self, channels: int) -> None:
        super().__init__((channels,), epsilon=1e-5)

    def construct(self, x: Tensor) -> Tensor:
        return super().construct(x.astype(mindspore.float32)).astype(x.dtype)


def upsample(x: Tensor) -> Tensor:
    """Each pixel four times: (batch, channels, h, w) -> (batch, channels, 2h, 2w)."""
    batch, channels, height, width = x.shape
    x = ops.broadcast_to(x.reshape(batch, channels, height, 1, width, 1), (batch, channels, height, 2, width, 2))
    return x.reshape(batch, channels, 2 * height, 2 * width)


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU (Hendrycks and Gimpel, 2016), written with the sigmoid: 0.5 * (1 + tanh(a)) = sigmoid(2a).

    The same function as `ops.gelu(x, approximate="tanh")` within 1e-6 and several times faster on CPU.
    """
    return x * ops.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d) + mask) V for each head (Vaswani et al., 2017), the softmax in float32.

    Args:
        query: (batch, queries, heads * d).
        key: (batch, keys, heads * d).
        value: (batch, keys, heads * d).
        heads: Number of heads.
        mask: (queries, keys), added to the scores; None for no mask.

    Returns:
        (batch, queries, heads * d) in the dtype of `value`.
    """
    batch, queries, width = query.shape
    size = width // heads
    q = query.reshape(batch, queries, heads, size).transpose(0, 2, 1, 3)
    k = key.reshape(batch, key.shape[1], heads, size).transpose(0, 2, 1, 3)
    v = value.reshape(batch, key.shape[1], heads, size).transpose(0, 2, 1, 3)
    scores = ops.BatchMatMul(transpose_b=True)(q * size ** -0.5, k).astype(mindspore.float32)
    if mask is not None:
        scores = scores + mask
    weights = ops.softmax(scores, axis=-1).astype(value.dtype)
    return ops.BatchMatMul()(weights, v).transpose(0, 2, 1, 3).reshape(batch, queries, width)


def name_parameters(net: nn.Cell) -> None:
    """Gives every parameter its path as its name, because containers can leave the two different."""
    for path, parameter in net.parameters_and_names():
        parameter.name = path
