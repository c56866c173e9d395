"""The decoder's operators: plain ones written for CPU, and Ascend's fused ones, behind one switch (`fused`).

On CPU an operator on two shapes of float32 keeps the place of each element in tables and takes several times as long,
so all operands are brought to one shape first; and each operator that is made of several has a gradient of its own,
which makes again what it needs instead of keeping it.
"""

import mindspore as ms
from mindspore import Tensor, nn, ops

# `ops.tile` makes such a primitive in each call, which a `bprop` in graph mode cannot compile.
TILE = ops.Tile()
MASKED = -1e9


def fused() -> bool:
    """The switch: whether the cells built now use Ascend's fused operators."""
    return ms.get_context("device_target") == "Ascend"


def column(rows: int, value: float) -> Tensor:
    """float32 (rows, 1), all `value`."""
    return ops.fill(ms.float32, (rows, 1), value)


class RMSNormRows(nn.Cell):
    """y = x / sqrt(mean(x^2) + eps) * weight for each row of x (rows, width) (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.matmul = ops.MatMul()
        self.matmul_left = ops.MatMul(transpose_a=True)

    def scale(self, x: Tensor) -> Tensor:
        """1 / sqrt(mean(x^2) + eps), one for each row."""
        return ops.rsqrt(self.matmul(x * x, column(x.shape[1], 1.0 / x.shape[1])) + self.eps)

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        # A product of a column and a row: one operator instead of two that spread them and one that multiplies.
        return x * self.matmul(self.scale(x), weight.reshape(1, -1))

    def bprop(self, x: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """With r the scale and g = dout weight: dx = r g - x r^3 mean(g x); dweight = sum of dout x r over the rows."""
        x = ops.depend(x, dout)
        width = x.shape[1]
        r = self.scale(x)
        g = dout * ops.broadcast_to(ops.depend(weight, dout), x.shape)
        slope = r * r * r * self.matmul(g * x, column(width, 1.0 / width))
        rows = TILE(r, (1, width))
        dweight = self.matmul_left(dout * x * rows, column(x.shape[0], 1.0)).reshape(-1)
        return g * rows - x * TILE(slope, (1, width)), dweight


class FusedRMSNorm(nn.Cell):
    """The same by Ascend's RmsNorm."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm(x, weight, self.eps)[0]


class SwiGLURows(nn.Cell):
    """y = silu(gate) * up (Shazeer, arXiv 2002.05202), silu(x) = x sigmoid(x)."""

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.silu(gate) * up

    def bprop(self, gate: Tensor, up: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """With s = sigmoid(gate) and y = gate s: dgate = dout up (s + y - y s), dup = dout y."""
        s = ops.sigmoid(ops.depend(gate, dout))
        y = gate * s
        return dout * up * (s + y - y * s), dout * y


class FusedSwiGLU(nn.Cell):
    """The same by Ascend's SwiGlu."""

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.swiglu(ops.concat((gate, up), -1), -1)


class Rotate(nn.Cell):
    """Rotary positions (Su et al., arXiv 2104.09864): x cos + swapped(x) sin, all of shape (batch, heads, length, d).

    swapped exchanges the halves of the last axis; the sign of the first half is in `sin` (see `decoder.rotation`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.halves = ops.Split(-1, 2)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = self.halves(x)
        return x * cos + ops.concat((second, first), -1) * sin

    def construct(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.turned(x, cos, sin)

    def bprop(self, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A rotation's gradient is the rotation back; the tables are constants."""
        return self.turned(dout, cos, -sin), ops.zeros_like(cos), ops.zeros_like(sin)


class Heads(nn.Cell):
    """Rows (batch * length, heads * d) to (batch, heads, length, d) and back, as rows of width d in another order.

    A transposition does the same, but on CPU keeps 8 bytes for each element as long as the graph lives.
    """

    def __init__(self, heads: int, d: int) -> None:
        super().__init__()
        self.heads, self.d = heads, d
        self.rearrange = Rearrange()

    def orders(self, numbers: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Where each row comes from, there and back; numbers are 0, 1, 2, ..."""
        heads = self.heads
        text, place, part = numbers[:batch], numbers[:length], numbers[:heads]
        there = ops.broadcast_to(text.reshape(batch, 1, 1) * (length * heads), (batch, heads, length)) \
            + place.reshape(1, 1, length) * heads + part.reshape(1, heads, 1)
        back = ops.broadcast_to(text.reshape(batch, 1, 1) * (length * heads), (batch, length, heads)) \
            + place.reshape(1, length, 1) + part.reshape(1, 1, heads) * length
        return there.reshape(-1), back.reshape(-1)

    def split(self, x: Tensor, batch: int, orders: tuple[Tensor, Tensor]) -> Tensor:
        """To heads. A text of one token needs no other order."""
        rows = x.reshape(-1, self.d)
        if x.shape[0] != batch:
            rows = self.rearrange(rows, orders[0], orders[1])
        return rows.reshape(batch, self.heads, -1, self.d)

    def join(self, x: Tensor, orders: tuple[Tensor, Tensor]) -> Tensor:
        """Back to rows."""
        rows = x.reshape(-1, self.d)
        if x.shape[2] != 1:
            rows = self.rearrange(rows, orders[1], orders[0])
        return rows.reshape(-1, self.heads * self.d)


class Rearrange(nn.Cell):
    """Rows of x in another order, with the order back for the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.gather = ops.Gather()

    def construct(self, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        return self.gather(x, there, 0)

    def bprop(self, x: Tensor, there: Tensor, back: Tensor, out: Tensor, dout: Tensor
              ) -> tuple[Tensor, Tensor, Tensor]:
        return self.gather(dout, back, 0), ops.zeros_like(there), ops.zeros_like(back)


class TransposedHeads(Heads):
    """The same by transposition, for Ascend."""

    def orders(self, numbers: Tensor, batch: int, length: int) -> tuple:
        return ()

    def split(self, x: Tensor, batch: int, orders: tuple) -> Tensor:
        return x.reshape(batch, -1, self.heads, self.d).transpose(0, 2, 1, 3)

    def join(self, x: Tensor, orders: tuple) -> Tensor:
        return x.transpose(0, 2, 1, 3).reshape(-1, self.heads * self.d)


class SoftmaxRows(nn.Cell):
    """Softmax over the last axis, with the gradient y dout - y sum(y dout)."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = ops.Softmax(-1)
        self.matmul = ops.MatMul()

    def construct(self, x: Tensor) -> Tensor:
        return self.softmax(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        width = x.shape[-1]
        products = (out * dout).reshape(-1, width)
        sums = TILE(self.matmul(products, column(width, 1.0)), (1, width))
        return ((products - out.reshape(products.shape) * sums).reshape(x.shape),)


class Attend(nn.Cell):
    """Attention of queries (batch, heads, length, d) on keys and values (batch, groups, total, d), queries scaled.

    heads / groups queries share a key (Ainslie et al., arXiv 2305.13245). They are put below one another, as if there
    were that many times more positions, so that keys and values are not copied.
    """

    def __init__(self, heads: int, groups: int) -> None:
        super().__init__()
        self.per = heads // groups
        self.groups = groups
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()
        self.softmax = SoftmaxRows()

    def mask(self, allowed: Tensor) -> Tensor:
        """What is added to the scores: allowed is (batch, length, total) of 0 and 1."""
        batch, length, total = allowed.shape
        below = ((1.0 - allowed) * MASKED).reshape(batch, 1, 1, length, total)
        return ops.broadcast_to(below, (batch, self.groups, self.per, length, total)).reshape(
            batch * self.groups, self.per * length, total)

    def construct(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        rows = query.reshape(mask.shape[0], mask.shape[1], query.shape[-1])
        keys = key.reshape(mask.shape[0], mask.shape[2], query.shape[-1])
        weights = self.softmax(self.scores(rows, keys) + mask)
        return self.mix(weights, value.reshape(keys.shape)).reshape(query.shape)


class FusedAttend(nn.Cell):
    """The same by Ascend's FlashAttentionScore, which computes in half precision."""

    def __init__(self, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads

    def mask(self, allowed: Tensor) -> Tensor:
        """Which scores are left out, as (batch, 1, length, total)."""
        return (allowed < 0.5).reshape(allowed.shape[0], 1, allowed.shape[1], allowed.shape[2])

    def construct(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        kind = ms.float16 if query.dtype == ms.float16 else ms.bfloat16
        out = ops.flash_attention_score(query.astype(kind), key.astype(kind), value.astype(kind), self.heads,
                                        attn_mask=mask, input_layout="BNSD")
        return out.astype(query.dtype)


class Entropy(nn.Cell):
    """Mean cross entropy of logits (rows, classes) and labels (rows,), by the one kernel that CPU has for it."""

    def __init__(self) -> None:
        super().__init__()
        self.entropy = nn.SoftmaxCrossEntropyWithLogits(sparse=True, reduction="mean")

    def construct(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.entropy(logits, labels)


class FusedEntropy(nn.Cell):
    """The same by operators that are documented for Ascend."""

    def construct(self, logits: Tensor, labels: Tensor) -> Tensor:
        return ops.cross_entropy(logits, labels)


def rms_norm(eps: float) -> nn.Cell:
    """The normalisation for this device."""
    return FusedRMSNorm(eps) if fused() else RMSNormRows(eps)


def swiglu() -> nn.Cell:
    """The gate for this device."""
    return FusedSwiGLU() if fused() else SwiGLURows()


def by_head(heads: int, d: int) -> nn.Cell:
    """What tells the heads apart, for this device."""
    return TransposedHeads(heads, d) if fused() else Heads(heads, d)


def attend(heads: int, groups: int) -> nn.Cell:
    """The attention for this device."""
    return FusedAttend(heads, groups) if fused() else Attend(heads, groups)


def entropy() -> nn.Cell:
    """The loss for this device."""
    return FusedEntropy() if fused() else Entropy()
