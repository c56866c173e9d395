"""R-Drop: Regularized Dropout for Neural Networks, Liang et al., 2021, https://arxiv.org/abs/2106.14448.

Each sample goes through the net twice in one batch; dropout makes two distributions p1 and p2 of it, and the loss pulls
them towards each other. Nothing is added to the net: `rdrop_repeat` doubles the batch, `RDropLoss` is the
loss.
"""
from __future__ import annotations

import math

import mindspore
from mindspore import Tensor, nn, ops

from mindpet_lite.arguments import check_number
from mindpet_lite.delta.base import FLOAT_TYPES

_LABEL_TYPES = (mindspore.int8, mindspore.int16, mindspore.int32, mindspore.int64, mindspore.uint8)


# constexpr: a graph runs these as plain Python when it is compiled, so that the errors are the same in both modes.
@ops.constexpr
def _refuse(what: str, value: object) -> None:
    raise TypeError(f"{what} must be a Tensor, but got {value!r:.100} of type {type(value).__name__}.")


@ops.constexpr
def _check_repeat(position: int, shape: tuple[int, ...]) -> None:
    if not shape:
        raise ValueError(f"item {position} of rdrop_repeat is a scalar Tensor: it has no axis 0 to repeat along.")


@ops.constexpr
def _is_batch(logits_shape: tuple[int, ...], logits_type: mindspore.dtype, label_shape: tuple[int, ...],
              label_type: mindspore.dtype) -> bool:
    """Raise unless the loss is defined; tell whether logits are (rows, classes) rather than one row."""
    if len(logits_shape) not in (1, 2):
        raise ValueError(f"logits must have the shape (rows, classes), but got {logits_shape}. Fold further axes "
                         f"into the rows, keeping the two passes of a sample next to each other.")
    if logits_type not in FLOAT_TYPES:
        raise TypeError(f"logits must be float16, bfloat16 or float32, but got {logits_type}.")
    rows = logits_shape[0]
    if rows % 2 or not rows:
        raise ValueError(f"the batch must be even, rows 2i and 2i + 1 being two passes of one sample, but logits of "
                         f"shape {logits_shape} have {rows} rows. Use rdrop_repeat on the inputs and the labels.")
    if math.prod(label_shape) != rows:
        raise ValueError(f"label_ids must hold one label for each of the {rows} rows of logits, but got the shape "
                         f"{label_shape}. Use rdrop_repeat on the labels as on the inputs.")
    is_batch = len(logits_shape) == 2
    if is_batch and label_type not in _LABEL_TYPES:
        raise TypeError(f"label_ids must be class numbers of an integer type, but got {label_type}.")
    if not is_batch and label_type not in FLOAT_TYPES:
        raise TypeError(f"with logits of rank 1 label_ids must be class probabilities in float16, bfloat16 or "
                        f"float32, but got {label_type}. Class numbers need logits of shape (rows, classes).")
    return is_batch


@ops.constexpr
def _divergence_weight(alpha: float) -> float:
    """Return alpha / 4 as a float after checking it: a numpy number times a Tensor would lose the gradient."""
    number = check_number("alpha", alpha)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"alpha must be a finite number, 0 or above, but got {alpha}.")
    return number / 4


def _log_softmax(logits: Tensor) -> Tensor:
    """Return log softmax over the last axis; in float32 nearer to the exact value than the CPU's own operator."""
    shifted = logits - ops.stop_gradient(ops.amax(logits, -1, True))
    return shifted - ops.log(ops.exp(shifted).sum(-1, keepdims=True))


def _cross_entropy(log_p: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of -ln p(label) over the rows of `log_p` (rows, classes) whose label (rows,) is not negative."""
    kept = labels >= 0
    picked = ops.gather_elements(log_p, 1, ops.expand_dims(labels * ops.cast(kept, labels.dtype), 1))
    kept = ops.cast(kept, log_p.dtype)
    return -(ops.reshape(picked, (-1,)) * kept).sum() / kept.sum()


def _divergence(log_p: Tensor) -> Tensor:
    """Return the sum over all pairs of rows of KL(p1 || p2) + KL(p2 || p1), which is that of (p1 - p2)(ln p1 - ln p2).

    `log_p` (2n, classes) holds ln p1 and ln p2 of sample i in rows 2i and 2i + 1.
    """
    pairs = ops.reshape(log_p, (-1, 2, log_p.shape[-1]))
    first, second = pairs[:, 0], pairs[:, 1]
    return ((ops.exp(first) - ops.exp(second)) * (first - second)).sum()


class RDropLoss(nn.Cell):
    r"""Cross entropy of a doubled batch plus the distance of the two passes of each sample from each other.

    Rows 2i and 2i + 1 of the batch are two dropout passes of sample i, as `rdrop_repeat` lays them out:

    $$
    L = \frac{1}{2n} \sum_{j=1}^{2n} -\ln p_j(y_j)
    + \frac{\alpha}{4} \sum_{i=1}^{n} [KL(p_{i1} \| p_{i2}) + KL(p_{i2} \| p_{i1})]
    $$

    Source: Liang et al., https://arxiv.org/abs/2106.14448, section 2.1. A sample's loss is there the sum of its two
    negative log-likelihoods and of α times half the two divergences; half of its mean over the samples is this loss,
    except that the divergences are summed over the samples, not averaged. This is MindPet's scale: for the paper's α
    in a batch of n samples (2n rows) pass `alpha` = α / n. The gradient is that of the formula; MindPet took the
    target of each divergence for a constant.

    It computes in float32 and returns float32 whatever the type of the logits, for the sum of the divergences soon
    leaves the range of float16. (MindPet returned the type of the logits.) Gradients have the type of the logits.

    Inputs:
        - **logits** (Tensor): (2n, classes), finite, in float16, bfloat16 or float32.
        - **label_ids** (Tensor): (2n,), or another shape with 2n elements, the class numbers in 0 ... classes - 1 of
          an integer type. Rows with a negative label (-100 in nn.CrossEntropyLoss, often -1) are left
          out of the cross entropy's mean, not out of the divergences.
        - **alpha** (int | float): weight of the divergences, finite and not negative. Default: 4.

        One form more works as in MindPet: one row of logits (2n,) with class probabilities (2n,) in a float type
        gives -Σ label · ln softmax(logits), and softmax(logits[0::2]) and softmax(logits[1::2]) as the only pair.

    Outputs:
        Tensor, a float32 scalar.

    Raises:
        TypeError: logits or label_ids is no Tensor or of another type than said above; alpha is a bool or no number.
        ValueError: logits have another rank, or an odd number of rows, or none; the labels are not as many as the
            rows; alpha is negative or not finite.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> logits = Tensor(np.zeros((4, 3), np.float32))       # two passes of each of two samples
        >>> loss = mp.RDropLoss()(logits, Tensor([0, 0, 1, 1]), alpha=2)
        >>> round(float(loss), 4)
        1.0986
    """

    def construct(self, logits: Tensor, label_ids: Tensor, alpha: float = 4) -> Tensor:
        """Return the loss of `logits` (2n, classes) with the class numbers `label_ids` (2n,)."""
        if not isinstance(logits, Tensor):
            _refuse("logits", logits)
        if not isinstance(label_ids, Tensor):
            _refuse("label_ids", label_ids)
        # The branch hangs on the check: a graph looks at nothing behind it before the check has passed.
        if _is_batch(logits.shape, logits.dtype, label_ids.shape, label_ids.dtype):
            log_p = _log_softmax(ops.cast(logits, mindspore.float32))
            labels = ops.reshape(ops.cast(label_ids, mindspore.int32), (-1,))
            return _cross_entropy(log_p, labels) + _divergence_weight(alpha) * _divergence(log_p)
        logits = ops.cast(logits, mindspore.float32)
        labels = ops.reshape(ops.cast(label_ids, mindspore.float32), (-1,))
        passes = ops.transpose(ops.reshape(logits, (-1, 2)), (1, 0))
        return _divergence_weight(alpha) * _divergence(_log_softmax(passes)) - (_log_softmax(logits) * labels).sum()


def rdrop_repeat(*items: Tensor) -> tuple[Tensor, ...]:
    """Repeat every item twice along its first axis: [a, b] becomes [a, a, b, b], as RDropLoss wants the batch.

    Args:
        *items (Tensor): inputs, labels, masks and the like, of any shape but () and of any type.

    Returns:
        tuple[Tensor, ...]: as many Tensors, each of the shape (2 * n, ...) where the item's is (n, ...).

    Raises:
        TypeError: an item is no Tensor.
        ValueError: an item is a scalar.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import Tensor
        >>> (labels,) = mp.rdrop_repeat(Tensor([7, 8]))
        >>> labels.asnumpy().tolist()
        [7, 7, 8, 8]
    """
    repeated = []
    for position, item in enumerate(items):
        if not isinstance(item, Tensor):
            _refuse(f"item {position} of rdrop_repeat", item)
        _check_repeat(position, item.shape)
        pair = ops.stack((item, item), 1)
        repeated.append(ops.reshape(pair, (2 * item.shape[0],) + item.shape[1:]))
    return tuple(repeated)
