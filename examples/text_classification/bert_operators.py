"""The operators of BERT for which CPU has slow gradients; other devices take MindSpore's own.

The gradients of `nn.LayerNorm` and `ops.gelu` take several times as long on CPU as the same sums written out: sums over
a row are products with a column of ones, and what stands once for a row or a column is written out to the whole shape
first (docs/performance.md). The values are those of the operators within float32 rounding.
"""

import mindspore as ms
from mindspore import Tensor, nn, ops

# `ops.tile` makes such a primitive in each call, which a `bprop` in graph mode cannot compile.
TILE = ops.Tile()
HALF, ROOT_HALF, DENSITY = 0.5, 0.7071067811865476, 0.3989422804014327


def on_cpu() -> bool:
    """Whether the cells built now are for CPU."""
    return ms.get_context("device_target") == "CPU"


def layer_norm(width: int, eps: float) -> nn.Cell:
    """LayerNorm over the last axis, with its Parameters `gamma` and `beta`, for the device that is set now."""
    return CpuLayerNorm(width, eps) if on_cpu() else nn.LayerNorm((width,), epsilon=eps)


def gelu() -> nn.Cell:
    """GELU by the error function, x Phi(x), for the device that is set now."""
    return CpuGelu() if on_cpu() else nn.GELU(approximate=False)


class CpuGelu(nn.Cell):
    """x Phi(x) = x (1 + erf(x / √2)) / 2."""

    def construct(self, x: Tensor) -> Tensor:
        return x * (HALF + HALF * ops.erf(x * ROOT_HALF))

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Gives dx = dout (Phi(x) + x exp(-x² / 2) / √(2π)); the compiler takes Phi from the forward pass."""
        return (dout * (HALF + HALF * ops.erf(x * ROOT_HALF) + x * ops.exp(x * x * -HALF) * DENSITY),)


class CpuLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last axis, with a gradient of its own.

    Args:
        width: Of the last axis.
        eps: Added to the variance.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__((width,), epsilon=eps)
        self.written_out = _Normalise(eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.written_out(x, self.gamma, self.beta)


class _Normalise(nn.Cell):
    """gamma (x - mean) / √(var + eps) + beta for float32 x of shape (..., width)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.norm = ops.LayerNorm(-1, -1, eps)
        self.matmul, self.matmul_left = ops.MatMul(), ops.MatMul(transpose_a=True)

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return self.norm(x, gamma, beta)[0]

    def over_rows(self, x: Tensor) -> Tensor:
        """The mean of each row of x (rows, width), in the shape of x."""
        column = ops.fill(ms.float32, (x.shape[1], 1), 1.0 / x.shape[1])
        return TILE(self.matmul(x, column), (1, x.shape[1]))

    def bprop(self, x: Tensor, gamma: Tensor, beta: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With n the normalised x and dn = gamma dout: dx = (dn - mean(dn) - n mean(dn n)) / √(var + eps)."""
        rows = ops.reshape(x, (-1, x.shape[-1]))
        dy = ops.reshape(dout, rows.shape)
        off = rows - self.over_rows(rows)
        r = ops.rsqrt(self.over_rows(off * off) + self.eps)
        n = off * r
        dn = dy * ops.broadcast_to(gamma, n.shape)
        dx = (dn - self.over_rows(dn) - n * self.over_rows(dn * n)) * r
        ones = ops.fill(ms.float32, (n.shape[0], 1), 1.0)
        return (ops.reshape(dx, x.shape), ops.reshape(self.matmul_left(dy * n, ones), (-1,)),
                ops.reshape(self.matmul_left(dy, ones), (-1,)))
