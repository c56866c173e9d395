"""Operators written out for CPU, where MindSpore's own kernels or their gradients take two to three times as long.

Sums are products with a column of ones, and `bprop` gives the gradient in as few passes as it needs. What stands once
for a row or a column is written out to the whole shape first: an operator on two shapes looks up the place of each
element in tables (16 bytes an element, kept as long as the graph lives) and takes three to four times as long. The
values are those of the operators they stand for, within float32 rounding. Other devices use the operators themselves.

A gradient makes what it needs again from the inputs. These wait for the gradient of the output (`ops.depend`): else the
compiler, which makes one of two equal operators, would keep for it all that the forward pass made.
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
        d, r = self.deviations(ops.depend(x, dout))
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


class AttendByHead(nn.Cell):
    """`layers.Attend`, one head after the other: only one head's weights (queries, keys) are there at a time.

    Heads are cut out of the last axis, so nothing is transposed: a transposition keeps 8 bytes an element in a table.
    Each head waits for the one before it, else the runtime would begin them all at once.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.split = ops.Split(-1, heads)
        self.softmax = ops.Softmax(-1)
        self.matmul = ops.BatchMatMul()
        self.matmul_left = ops.BatchMatMul(transpose_a=True)
        self.matmul_right = ops.BatchMatMul(transpose_b=True)
        self.sums = ops.MatMul()

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Gives softmax(query key^T) in float32."""
        return self.softmax(self.matmul_right(query, key).astype(mindspore.float32))

    def construct(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries = self.split(query * (query.shape[-1] // self.heads) ** -0.5)
        keys, values = self.split(key), self.split(value)
        outputs = (self.matmul(self.weights(queries[0], keys[0]).astype(value.dtype), values[0]),)
        for i in range(1, self.heads):
            p = self.weights(ops.depend(queries[i], outputs[-1]), keys[i])
            outputs = outputs + (self.matmul(p.astype(value.dtype), values[i]),)
        return ops.concat(outputs, axis=-1)

    def bprop(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, dout: Tensor
              ) -> tuple[Tensor, Tensor, Tensor]:
        """With P the weights, r = sum(dO O) and dS = P (dO V^T - r): dQ = s dS K, dK = s dS^T Q, dV = P^T dO.

        dO V^T - r is one product, of dO with a column r more and of V with a column -1 more.
        """
        scale = (query.shape[-1] // self.heads) ** -0.5
        queries, keys = self.split(ops.depend(query, dout) * scale), self.split(ops.depend(key, dout))
        products = (dout * out).astype(mindspore.float32).reshape(-1, query.shape[-1] // self.heads)
        sums = self.sums(products, column(products.shape[1], 1.0)).astype(dout.dtype)
        minus = ops.fill(value.dtype, (*value.shape[:2], self.heads, 1), -1.0)
        douts, more = self.split(dout), self.split(self.widened(dout, sums))
        values = self.split(self.widened(ops.depend(value, dout), minus))
        dq, dk, dv = (), (), ()
        for i in range(self.heads):
            q = queries[i] if i == 0 else ops.depend(queries[i], dq[-1])
            p = self.weights(q, keys[i])
            ds = (p * self.matmul_right(ops.depend(more[i], p), values[i]).astype(mindspore.float32)).astype(dout.dtype)
            dv = dv + (self.matmul_left(p.astype(dout.dtype), douts[i]),)
            dk = dk + (self.matmul_left(ds, q),)
            dq = dq + (self.matmul(ds, keys[i]),)
        return ops.concat(dq, axis=-1) * scale, ops.concat(dk, axis=-1), ops.concat(dv, axis=-1)

    def widened(self, x: Tensor, columns: Tensor) -> Tensor:
        """Gives each head's part of x (batch, tokens, heads * d) one column more."""
        batch, tokens, width = x.shape
        by_head = x.reshape(batch, tokens, self.heads, -1)
        both = ops.concat((by_head, columns.reshape(batch, tokens, self.heads, 1)), axis=-1)
        return both.reshape(batch, tokens, width + self.heads)


class LayerNorm(nn.Cell):
    """`ops.layer_norm(x, (width,), gamma, beta, eps)` for float32 x of shape (..., width)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.norm = ops.LayerNorm(-1, -1, eps)
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
        return self.norm(x, gamma, beta)[0]

    def bprop(self, x: Tensor, gamma: Tensor, beta: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With dn = gamma dout: dx = r (dn - mean(dn) - n mean(dn n)), the means over each row."""
        n, r = self.normalised(ops.depend(x, dout))
        dy = dout.reshape(n.shape)
        # What waits for nothing but a parameter would be spelled out when the step begins, and held until now.
        dn = dy * along_columns(ops.depend(gamma, dout), n)
        mean = column(n.shape[1], 1.0 / n.shape[1])
        slope = along_rows(self.matmul(dn * n, mean), n)
        dx = (dn - along_rows(self.matmul(dn, mean), n) - n * slope) * along_rows(r, n)
        ones = column(n.shape[0], 1.0)
        return (dx.reshape(x.shape), self.matmul_left(dy * n, ones).reshape(-1),
                self.matmul_left(dy, ones).reshape(-1))


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks and Gimpel, 2016), written with the sigmoid: 0.5 (1 + tanh(u)) = sigmoid(2u).

    u = sqrt(2 / pi) (x + 0.044715 x^3). The same function as `ops.gelu(x, approximate="tanh")` within 1e-6 and several
    times faster on CPU.
    """
    return x * gate(x, x * x)


def gate(x: Tensor, square: Tensor) -> Tensor:
    """Gives sigmoid(2u)."""
    return ops.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * square))


def gelu_slope(x: Tensor) -> Tensor:
    """The derivative of `gelu`: with g the gate and y = x g, it is g + (y - y g) d(2u)/dx."""
    square = x * x
    g = gate(x, square)
    y = x * g
    return g + (y - y * g) * (1.5957691216057308 + 0.21406444881780074 * square)


def exact_gelu(x: Tensor) -> Tensor:
    """GELU by the error function, as Stable Diffusion was trained: x Phi(x)."""
    return 0.5 * x * (1.0 + ops.erf(x * 0.7071067811865476))


def exact_gelu_slope(x: Tensor) -> Tensor:
    """The derivative of `exact_gelu`: Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)."""
    return 0.5 * (1.0 + ops.erf(x * 0.7071067811865476)) + x * ops.exp(-0.5 * x * x) * 0.3989422804014327


class Gelu(nn.Cell):
    """`ops.gelu(x, approximate="tanh")`."""

    def construct(self, x: Tensor) -> Tensor:
        return gelu(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Gives dx = dout gelu'(x)."""
        return (dout * gelu_slope(ops.depend(x, dout)),)


class GatedGelu(nn.Cell):
    """`layers.GatedGelu`."""

    def __init__(self, exact: bool) -> None:
        super().__init__()
        self.gelu, self.slope = (exact_gelu, exact_gelu_slope) if exact else (gelu, gelu_slope)
        self.halves = ops.Split(-1, 2)

    def construct(self, x: Tensor) -> Tensor:
        a, b = self.halves(x)
        return a * self.gelu(b)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Gives da = dout gelu(b) and db = dout a gelu'(b)."""
        a, b = self.halves(ops.depend(x, dout))
        return (ops.concat((dout * self.gelu(b), dout * a * self.slope(b)), axis=-1),)
