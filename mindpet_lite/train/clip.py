"""Clip gradients by the norm of all of them together."""
from __future__ import annotations

from mindspore import Tensor, ops
from mindspore import dtype as mstype

from mindpet_lite.delta.parts import as_type

_EACH = ops.HyperMap()


def clip_global_norm(gradients: tuple[Tensor, ...], max_norm: float) -> tuple[tuple[Tensor, ...], Tensor]:
    r"""Scale gradients so that the norm of all of them together is at most `max_norm`.

    $$
    g_i \leftarrow g_i \frac{c}{\|g\|} \text{ where } \|g\| > c, \quad \|g\| = \sqrt{\sum_i \sum_j g_{ij}^2}
    $$

    with c = `max_norm`. Where the norm is not above it, the gradients come back bit for bit. Norm and product are
    computed in float32 whatever the gradients' type, so float16 neither overflows in the squares nor loses a small
    factor. (PyTorch's `clip_grad_norm_` divides by ||g|| + 1e-6.) For use in `construct` and in functions, in both
    modes.

    Gradients that are not finite stay so: an infinite norm makes infinite ones NaN and all others 0, a norm of NaN
    makes all NaN. With loss scaling, ask `mindspore.amp.all_finite` first.

    Source: Pascanu et al., On the difficulty of training recurrent neural networks, https://arxiv.org/abs/1211.5063,
    algorithm 1.

    Args:
        gradients: of any shapes and float types, as `mindspore.value_and_grad` gives them for the parameters of an
            optimizer; with frozen base weights these are the deltas'. Unscaled, where the loss was scaled.
        max_norm: c, above 0.

    Returns:
        The gradients, each of its own type, and ||g|| from before, () in float32.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> gradients, norm = mp.clip_global_norm((Tensor(np.full(4, 3.0, np.float32)),), max_norm=1.0)
        >>> float(norm), gradients[0].asnumpy().tolist()
        (6.0, [0.5, 0.5, 0.5, 0.5])
    """
    norm = ops.sqrt(ops.addn(_EACH(_squares, gradients)))
    # Not by a maximum, which on CPU passes over NaN.
    factor = ops.where(ops.less_equal(norm, max_norm), 1.0, max_norm / norm)
    return _EACH(ops.partial(_times, factor), gradients), norm


def _squares(gradient: Tensor) -> Tensor:
    return ops.ReduceSum()(ops.square(as_type(gradient, mstype.float32)))


def _times(factor: Tensor, gradient: Tensor) -> Tensor:
    return as_type(as_type(gradient, mstype.float32) * factor, gradient.dtype)
