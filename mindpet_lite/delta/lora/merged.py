"""A product with W + s B A whose gradients go by way of the rank: less work where there are many rows."""
from __future__ import annotations

from mindspore import Tensor, context, nn, ops


@ops.constexpr
def merging_pays(rows: int | None, inputs: int, outputs: int) -> bool:
    """Tell, while a graph is compiled, whether the weight is the smaller side to add the update on.

    Beside W the update of `rows` inputs costs 2 · rows · rank · (inputs + outputs) operations and a sum of
    (rows, outputs), and its gradient that of the input as much again; on W it costs 2 · rank · inputs · outputs and a
    sum of (outputs, inputs), once. The sum is kept for the backward pass, so it must not be larger than what a layer
    keeps anyway: hence the 2.

    In PyNative mode the answer is no: there each gradient is computed, even that of a frozen weight. So it is in
    (semi-)auto-parallel training, where the operators that strategies name must be there, and where the number of
    rows is not known (None, or negative).
    """
    in_graph = context.get_context("mode") == context.GRAPH_MODE
    is_split = context.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel")
    return in_graph and not is_split and rows is not None and rows * (inputs + outputs) >= 2 * inputs * outputs


# A layer never changes them (no strategy is set where this product is used), so all share them: making operators is a
# fifth of what an injection takes.
_PRODUCT, _BY_COLUMNS, _BY_ROWS = ops.MatMul(), ops.MatMul(transpose_a=True), ops.MatMul(transpose_b=True)
_ADD, _MUL, _TRANSPOSE = ops.Add(), ops.Mul(), ops.Transpose()


class MergedProduct(nn.Cell):
    r"""The product :math:`y = x (W + s B A)^T` of rows `x`.

    Its gradients are those of :math:`x W^T + s (x A^T) B^T`, not by way of the gradient of W + s B A, which is as large
    as that of full fine-tuning: with G the gradient of y,

    .. math:: dA = (G s B)^T x, \quad dB = s ((x A^T)^T G)^T, \quad dx = G (W + s B A), \quad dW = G^T x

    The compiler leaves out dW where W is frozen. The order of the products is that of RunLoRA
    (https://arxiv.org/abs/2312.03415, section 3) with the fewest operations for a rank below the widths; B's gradient
    is made transposed, because CPU kernels are a third slower with the small axis last.

    Inputs:
        - **x** (Tensor): (rows, inputs).
        - **weight** (Tensor): W (outputs, inputs).
        - **a**, **b** (Tensor): A (rank, inputs) and B (outputs, rank).
        - **scale** (Tensor): s (), without a gradient.
    """

    def construct(self, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        """Return the product (rows, outputs)."""
        return _BY_ROWS(x, _ADD(weight, _PRODUCT(_MUL(b, scale), a)))

    def bprop(self, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: Tensor, out: Tensor,
              dout: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the inputs."""
        scaled = _MUL(b, scale)
        d_x = _PRODUCT(dout, _ADD(weight, _PRODUCT(scaled, a)))
        d_a = _BY_COLUMNS(_PRODUCT(dout, scaled), x)
        d_b = _TRANSPOSE(_BY_COLUMNS(_BY_ROWS(x, a), dout), (1, 0))
        return d_x, _BY_COLUMNS(dout, x), d_a, _MUL(d_b, scale), ops.zeros_like(scale)


# All layers use this one: it holds nothing.
merged_product = MergedProduct()
