"""Operators written out for CPU, where MindSpore's own kernels or their gradients take two to three times as long.

Sums are products with a column of ones, and `bprop` gives the gradient in as few passes as it needs. What stands once
for a row or a column is written out to the whole shape first: an operator on two shapes looks up the place of each
element in tables (16 bytes an element, kept as long as the graph lives) and takes three to four times as long. The
values are those of the operators they stand for, within float32 rounding. Other devices use the operators themselves.
"""

import mindspore
from mindspore import Tensor, nn, ops

# `ops.tile` makes such a primitive in each call, which a `bprop` in graph mode cannot compile.
TILE = ops.Tile()


def column(rows: int, value: float) -> Tensor:
    """float32 (rows, 1), all `value`."""
    return ops.fill(mindspore.float32, (rows, 1), value)


def along_rows(values: Tensor, like: Tensor) -> Tensor:
    """Values (rows, 1) in the shape of like (rows, width)."""
    return TILE(values, (1, like.shape[1]))


def along_columns(values: Tensor, like: Tensor) -> Tensor:
    """Values (width,) in the shape of like (rows, width)."""
    return ops.broadcast_to(values, like.shape)


class GroupNorm(nn.Cell):
    """`ops.group_norm(x, groups, gamma, beta, eps)` for float32 x of shape (batch, channels, height, width)."""

    def __init__(self, groups: int, eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.matmul = ops.MatMul()

    def deviations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gives x - mean, a row for each group of each sample, and 1 / sqrt(var + eps), one for each row."""
        rows = x.reshape(x.shape[0] * self.groups, -1)
        ones = column(rows.shape[1], 1.0 / rows.shape[1])
        d = rows - along_rows(self.matmul(rows, ones), rows)
        return d, ops.rsqrt(self.matmul(d * d, ones) + self.eps)

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        d, r = self.deviations(x)
        scale = r.reshape(batch, self.groups, 1) * gamma.reshape(1, self.groups, -1)
        d = d.reshape(batch * channels, height * width)
        y = d * along_rows(scale.reshape(-1, 1), d) + along_rows(TILE(beta, (batch,)).reshape(-1, 1), d)
        return y.reshape(x.shape)

    def bprop(self, x: Tensor, gamma: Tensor, beta: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With n = d r and dn = gamma dout: dx = r (dn - mean(dn) - n mean(dn n)), the means over the group."""
        batch, channels, height, width = x.shape
        by_group = (batch, self.groups, channels // self.groups)
        d, r = self.deviations(x)
        dy = dout.reshape(batch * channels, height * width)
        ones = column(height * width, 1.0)
        sums = self.matmul(dy, ones).reshape(by_group)
        products = self.matmul(dy * d.reshape(dy.shape), ones).reshape(by_group)
        g = gamma.reshape(1, self.groups, -1)
        mean = (g * sums).sum(-1).reshape(-1, 1) / d.shape[1]
        slope = (g * products).sum(-1).reshape(-1, 1) / d.shape[1]
        r_by_group = r.reshape(batch, self.groups, 1)
        dn = (dy * along_rows((r_by_group * g).reshape(-1, 1), dy)).reshape(d.shape)
        dx = dn - (d * along_rows(r * r * r * slope, d) + along_rows(r * mean, d))
        return dx.reshape(x.shape), (products * r_by_group).sum(0).reshape(-1), sums.sum(0).reshape(-1)


class Softmax(nn.Cell):
    """`ops.softmax` of float32 x over its last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = ops.Softmax(-1)
        self.matmul = ops.MatMul()

    def construct(self, x: Tensor) -> Tensor:
        return self.softmax(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Gives dx = y dout - y sum(y dout)."""
        products = (out * dout).reshape(-1, x.shape[-1])
        sums = self.matmul(products, column(x.shape[-1], 1.0))
        return ((products - out.reshape(products.shape) * along_rows(sums, products)).reshape(x.shape),)


class LayerNorm(nn.Cell):
    """`ops.layer_norm(x, (width,), gamma, beta, eps)` for float32 x of shape (..., width)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.matmul = ops.MatMul()
        self.matmul_left = ops.MatMul(transpose_a=True)

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gives n = (x - mean) / sqrt(var + eps), a row for each vector, and 1 / sqrt(var + eps), one for each row."""
        rows = x.reshape(-1, x.shape[-1])
        ones = column(rows.shape[1], 1.0 / rows.shape[1])
        d = rows - along_rows(self.matmul(rows, ones), rows)
        r = ops.rsqrt(self.matmul(d * d, ones) + self.eps)
        return d * along_rows(r, d), r

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        n, _ = self.normalised(x)
        return (n * along_columns(gamma, n) + along_columns(beta, n)).reshape(x.shape)

    def bprop(self, x: Tensor, gamma: Tensor, beta: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With dn = gamma dout: dx = r (dn - mean(dn) - n mean(dn n)), the means over each row."""
        n, r = self.normalised(x)
        dy = dout.reshape(n.shape)
        dn = dy * along_columns(gamma, n)
        mean = column(n.shape[1], 1.0 / n.shape[1])
        slope = along_rows(self.matmul(dn * n, mean), n)
        dx = (dn - along_rows(self.matmul(dn, mean), n) - n * slope) * along_rows(r, n)
        ones = column(n.shape[0], 1.0)
        return (dx.reshape(x.shape), self.matmul_left(dy * n, ones).reshape(-1),
                self.matmul_left(dy, ones).reshape(-1))


class Gelu(nn.Cell):
    """`ops.gelu(x, approximate="tanh")`, the tanh written with the sigmoid: 0.5 (1 + tanh(u)) = sigmoid(2u)."""

    def gate(self, x: Tensor, square: Tensor) -> Tensor:
        """Gives sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
        return ops.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * square))

    def construct(self, x: Tensor) -> Tensor:
        return x * self.gate(x, x * x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """With g the gate: dx = dout (g + x g (1 - g) d(2u)/dx)."""
        square = x * x
        g = self.gate(x, square)
        y = x * g
        return (dout * (g + (y - y * g) * (1.5957691216057308 + 0.21406444881780074 * square)),)
