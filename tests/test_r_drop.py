"""R-Drop: the loss and its gradient against the formula in float64, its errors in both modes, and a training."""
from __future__ import annotations

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from nets import TOLERANCE

from mindpet_lite.train.r_drop import RDropLoss, rdrop_repeat


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.sum(p * (np.log(p) - np.log(q))))


def reference(logits: np.ndarray, labels: np.ndarray, alpha: float = 4) -> float:
    """The loss in numpy and float64, as it is written down: one row, one pair at a time."""
    p = softmax(logits.astype(np.float64))
    cross_entropy = np.mean([-np.log(p[row, label]) for row, label in enumerate(labels) if label >= 0])
    divergence = sum(kl(p[row], p[row + 1]) + kl(p[row + 1], p[row]) for row in range(0, len(p), 2))
    return cross_entropy + alpha / 4 * divergence


def reference_gradient(logits: np.ndarray, loss) -> np.ndarray:
    """Central differences in float64: their own error is below 1e-9 here."""
    logits, step = logits.astype(np.float64), 1e-5
    gradient = np.zeros_like(logits)
    for index in np.ndindex(*logits.shape):
        moved = np.zeros_like(logits)
        moved[index] = step
        gradient[index] = (loss(logits + moved) - loss(logits - moved)) / (2 * step)
    return gradient


def batch(rows: int = 6, classes: int = 5, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return (scale * rng.standard_normal((rows, classes))).astype(np.float32), rng.integers(0, classes, rows)


def loss_and_gradient(logits: Tensor, labels: Tensor, *alpha: float) -> tuple[Tensor, Tensor]:
    return ms.value_and_grad(RDropLoss(), 0)(logits, labels, *alpha)


@pytest.mark.parametrize("rows, classes, scale, alpha", [
    *((6, 5, 1.0, alpha) for alpha in ((), (0,), (4,), (2.5,), (np.float32(1.5),))),
    (2, 2, 3.0, (2.5,)), (8, 1, 1.0, ()), (4, 7, 8.0, (4,)), (4, 7, 8.0, (0,))])
def test_loss_and_gradient_are_those_of_the_formula(mode, rows, classes, scale, alpha):
    logits, labels = batch(rows, classes, scale)
    loss, gradient = loss_and_gradient(Tensor(logits), Tensor(labels, ms.int32), *alpha)
    assert loss.dtype == ms.float32 and loss.shape == ()
    alpha = tuple(map(float, alpha))
    np.testing.assert_allclose(loss.asnumpy(), reference(logits, labels, *alpha), **TOLERANCE[ms.float32])
    expected = reference_gradient(logits, lambda x: reference(x, labels, *alpha))
    np.testing.assert_allclose(gradient.asnumpy(), expected, rtol=1e-5, atol=2e-6)


def test_default_alpha_is_4(mode):
    logits, labels = batch()
    arguments = Tensor(logits), Tensor(labels, ms.int32)
    assert RDropLoss()(*arguments).asnumpy() == RDropLoss()(*arguments, 4).asnumpy()
    assert RDropLoss().construct(*arguments).asnumpy() == RDropLoss().construct(*arguments, alpha=4).asnumpy()


def test_alpha_over_the_number_of_samples_is_half_the_loss_of_the_paper(mode):
    logits, labels = batch(8)
    p = softmax(logits.astype(np.float64))
    samples = [-np.log(p[i, labels[i]]) - np.log(p[i + 1, labels[i + 1]])
               + 3.0 * 0.5 * (kl(p[i], p[i + 1]) + kl(p[i + 1], p[i])) for i in range(0, 8, 2)]
    loss = RDropLoss()(Tensor(logits), Tensor(labels, ms.int32), 3.0 / 4)
    np.testing.assert_allclose(loss.asnumpy(), 0.5 * np.mean(samples), rtol=1e-5)


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_half_precision_logits_give_a_float32_loss_and_their_own_gradient_type(mode, dtype):
    logits, labels = batch()
    low = Tensor(logits).astype(dtype)
    logits = low.astype(ms.float32).asnumpy()
    loss, gradient = loss_and_gradient(low, Tensor(labels, ms.int32))
    assert loss.dtype == ms.float32 and gradient.dtype == dtype
    np.testing.assert_allclose(loss.asnumpy(), reference(logits, labels), **TOLERANCE[ms.float32])
    expected = reference_gradient(logits, lambda x: reference(x, labels))
    rounding = {"rtol": 1e-3, "atol": 1e-5} if dtype == ms.float16 else {"rtol": 8e-3, "atol": 1e-5}
    np.testing.assert_allclose(gradient.astype(ms.float32).asnumpy(), expected, **rounding)


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_large_logits_stay_finite(mode, dtype):
    logits = np.array([[1e4, -1e4, 0], [-1e4, 1e4, 0], [1e4, 1e4, -1e4], [1e4, 0, 1e4]], np.float32)
    loss, gradient = loss_and_gradient(Tensor(logits).astype(dtype), Tensor([0, 1, 1, 2], ms.int32))
    # Rows 0 and 1 are certain of different classes, 2e4 each way; rows 2 and 3 share one half: 1e4 / 2 and 2e4 / 2.
    np.testing.assert_allclose(loss.asnumpy(), (2 * math.log(2)) / 4 + 2 * 2e4 + 1e4 / 2 + 2e4 / 2, rtol=1e-6)
    assert np.isfinite(gradient.asnumpy()).all()


def test_a_shift_of_all_logits_changes_nothing(mode):
    logits, labels = batch()
    logits = np.round(logits, 2) + np.float32(8192)  # what float32 can hold of it is the input
    loss, gradient = loss_and_gradient(Tensor(logits), Tensor(labels, ms.int32))
    np.testing.assert_allclose(loss.asnumpy(), reference(logits, labels), **TOLERANCE[ms.float32])
    expected = reference_gradient(logits - 8192, lambda x: reference(x, labels))
    np.testing.assert_allclose(gradient.asnumpy(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype, shape", [
    *((dtype, (6,)) for dtype in (ms.int8, ms.int16, ms.int32, ms.int64, ms.uint8)),
    (ms.int32, (6, 1)), (ms.int64, (3, 2))])
def test_labels_of_any_integer_type_and_any_shape_of_as_many(mode, dtype, shape):
    logits, labels = batch()
    loss = RDropLoss()(Tensor(logits), Tensor(labels.reshape(shape)).astype(dtype))
    np.testing.assert_allclose(loss.asnumpy(), reference(logits, labels), **TOLERANCE[ms.float32])


@pytest.mark.parametrize("ignored", [-100, -1])
def test_rows_with_a_negative_label_are_left_out_of_the_cross_entropy_only(ignored, mode):
    logits, labels = batch()
    labels[[1, 4]] = ignored
    loss, gradient = loss_and_gradient(Tensor(logits), Tensor(labels, ms.int32))
    np.testing.assert_allclose(loss.asnumpy(), reference(logits, labels), **TOLERANCE[ms.float32])
    expected = reference_gradient(logits, lambda x: reference(x, labels))
    np.testing.assert_allclose(gradient.asnumpy(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_one_row_of_logits_with_class_probabilities(mode, dtype):
    logits = np.random.default_rng(4).standard_normal(6).astype(np.float16).astype(np.float32)
    labels = np.array([1, 0, 4, 1, 0, 0.5], np.float32)

    def expected(x: np.ndarray) -> float:
        even, odd = softmax(x[0::2]), softmax(x[1::2])
        return -np.sum(labels * np.log(softmax(x))) + 3 / 4 * (kl(even, odd) + kl(odd, even))

    loss, gradient = loss_and_gradient(Tensor(logits).astype(dtype), Tensor(labels).astype(dtype), 3)
    np.testing.assert_allclose(loss.asnumpy(), expected(logits.astype(np.float64)), **TOLERANCE[ms.float32])
    tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype == ms.float32 else {"rtol": 1e-3, "atol": 1e-5}
    np.testing.assert_allclose(gradient.asnumpy(), reference_gradient(logits, expected), **tolerance)


class Inside(nn.Cell):
    """The loss with its arguments fixed, below another cell: alpha is no input of the graph."""

    def __init__(self, alpha) -> None:
        super().__init__()
        self.loss, self.alpha = RDropLoss(), alpha

    def construct(self, logits, labels):
        return self.loss(logits, labels, self.alpha)


ROWS, LABELS = np.zeros((6, 5), np.float32), np.zeros(6, np.int32)
REFUSED = [
    (ROWS[:5], LABELS[:5], ValueError, r"batch must be even.*\(5, 5\) have 5 rows\. Use rdrop_repeat"),
    (ROWS[:1], LABELS[:1], ValueError, r"batch must be even.*have 1 rows"),
    (ROWS[0, :3], LABELS[:3].astype(np.float32), ValueError, r"batch must be even.*\(3,\) have 3 rows"),
    (np.float32(1), LABELS[:1], ValueError, r"logits must have the shape \(rows, classes\), but got \(\)"),
    (ROWS.reshape(2, 3, 5), LABELS, ValueError, r"logits must have the shape \(rows, classes\), but got \(2, 3, 5\)"),
    (ROWS, LABELS[:3], ValueError, r"one label for each of the 6 rows.*got the shape \(3,\)\. Use rdrop_repeat"),
    (ROWS, np.zeros((6, 5), np.int32), ValueError, r"one label for each of the 6 rows.*got the shape \(6, 5\)"),
    (ROWS[0, :4], LABELS[:2].astype(np.float32), ValueError, r"one label for each of the 4 rows"),
    (ROWS.astype(np.float64), LABELS, TypeError, "logits must be float16, bfloat16 or float32, but got .*loat64"),
    (ROWS.astype(np.int32), LABELS, TypeError, "logits must be float16, bfloat16 or float32, but got .*nt32"),
    (ROWS, LABELS.astype(np.float32), TypeError, "label_ids must be class numbers of an integer type, but got .*32"),
    (ROWS, LABELS.astype(bool), TypeError, "label_ids must be class numbers of an integer type, but got .*ool"),
    (ROWS[:, 0], LABELS, TypeError, "label_ids must be class probabilities .* got .*nt32. Class numbers need"),
]


@pytest.mark.parametrize("logits, labels, error, message", REFUSED)
def test_what_does_not_fit_is_refused_in_plain_words(mode, logits, labels, error, message):
    logits, labels = Tensor(logits), Tensor(labels)
    for call in (RDropLoss(), Inside(4), RDropLoss().construct):
        with pytest.raises(error, match=message):
            call(logits, labels)


@pytest.mark.parametrize("alpha, error, message", [
    ("4", TypeError, "alpha must be a number, but got '4' of type str"),
    (None, TypeError, "alpha must be a number, but got None"),
    (True, TypeError, "alpha must be a number, but got True of type bool"),
    ([4], TypeError, r"alpha must be a number, but got \[4\]"),
    (Tensor(4.0), TypeError, "alpha must be a number, but got Tensor"),
    (-1, ValueError, "alpha must be a finite number, 0 or above, but got -1"),
    (math.inf, ValueError, "alpha must be a finite number, 0 or above, but got inf"),
    (math.nan, ValueError, "alpha must be a finite number, 0 or above, but got nan"),
])
def test_alpha_that_is_no_weight_is_refused(mode, alpha, error, message):
    with pytest.raises(error, match=message):
        RDropLoss()(Tensor(ROWS), Tensor(LABELS), alpha)
    with pytest.raises(error, match=message):
        Inside(alpha)(Tensor(ROWS), Tensor(LABELS))


def test_what_is_no_tensor_is_refused(mode):
    with pytest.raises(TypeError, match="logits must be a Tensor, but got .* of type list"):
        RDropLoss().construct([[1.0, 2.0], [3.0, 4.0]], Tensor(LABELS[:2]))
    with pytest.raises(TypeError, match="label_ids must be a Tensor, but got .* of type"):
        RDropLoss()(Tensor(ROWS[:2]), (0, 1))


def test_defect_15_an_odd_batch_is_named_while_a_training_step_is_built(mode):
    step = ms.value_and_grad(RDropLoss(), 0)
    with pytest.raises(ValueError, match="the batch must be even.*Use rdrop_repeat"):
        step(Tensor(ROWS[:5]), Tensor(LABELS[:5]))


def test_defect_15_construct_builds_no_tensor(pynative_mode, monkeypatch):
    logits, labels, loss, built = Tensor(ROWS), Tensor(LABELS), RDropLoss(), []
    original = Tensor.__init__

    def counting(self, *args, **kwargs):
        built.append(args)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "__init__", counting)
    loss(logits, labels)
    assert not built


class Repeat(nn.Cell):
    def construct(self, *items):
        return rdrop_repeat(*items)


@pytest.mark.parametrize("repeat", [rdrop_repeat, Repeat()])
@pytest.mark.parametrize("dtype", [ms.float32, ms.float16, ms.float64, ms.int32, ms.int64, ms.uint8, ms.bool_])
def test_repeat_puts_the_two_passes_of_a_sample_next_to_each_other(mode, dtype, repeat):
    ids, tokens = Tensor([1, 0, 3]).astype(dtype), Tensor(np.arange(12).reshape(3, 2, 2)).astype(dtype)
    one, two = repeat(ids, tokens)
    assert isinstance(rdrop_repeat(ids), tuple) and one.dtype == two.dtype == dtype
    np.testing.assert_array_equal(one.asnumpy(), np.repeat(ids.asnumpy(), 2, 0))
    np.testing.assert_array_equal(two.asnumpy(), np.repeat(tokens.asnumpy(), 2, 0))


def test_repeat_has_the_gradient_of_both_copies(mode):
    factor = Tensor(np.arange(8, dtype=np.float32).reshape(4, 2))

    def weighted(x):
        return (rdrop_repeat(x)[0] * factor).sum()

    gradient = ms.grad(weighted)(Tensor(np.ones((2, 2), np.float32)))
    np.testing.assert_array_equal(gradient.asnumpy(), [[2, 4], [10, 12]])


@pytest.mark.parametrize("repeat", [rdrop_repeat, Repeat()])
def test_repeat_refuses_what_has_no_rows(mode, repeat):
    row = Tensor([1.0, 2.0])
    with pytest.raises(TypeError, match="item 1 of rdrop_repeat must be a Tensor, but got 3 of type int"):
        repeat(row, 3)
    with pytest.raises(TypeError, match="item 0 of rdrop_repeat must be a Tensor, but got .* of type"):
        repeat((1, 2), row)
    with pytest.raises(ValueError, match="item 1 of rdrop_repeat is a scalar Tensor"):
        repeat(row, Tensor(1.0))


class Classifier(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Dense(4, 32, activation="tanh"), nn.Dense(32, 3)
        self.dropout = nn.Dropout(p=0.3)

    def construct(self, x):
        return self.outer(self.dropout(self.inner(x)))


class WithLoss(nn.Cell):
    def __init__(self, net: nn.Cell, alpha: float) -> None:
        super().__init__()
        self.net, self.loss, self.alpha = net, RDropLoss(), alpha

    def construct(self, x, labels):
        x, labels = rdrop_repeat(x, labels)
        return self.loss(self.net(x), labels, self.alpha)


def train(alpha: float, steps: int = 25) -> tuple[list[float], float]:
    """Return the losses and how far two passes of a sample are apart after the training."""
    ms.set_seed(5)
    rng = np.random.default_rng(5)
    x = Tensor(rng.standard_normal((16, 4)).astype(np.float32))
    labels = Tensor(rng.integers(0, 3, 16), ms.int32)
    net = Classifier()
    step = nn.TrainOneStepCell(WithLoss(net, alpha), nn.Adam(net.trainable_params(), 0.02)).set_train()
    losses = [float(step(x, labels).asnumpy()) for _ in range(steps)]
    apart = []
    for _ in range(4):
        p = softmax(net(*rdrop_repeat(x)).asnumpy().astype(np.float64))
        assert (p[0::2] != p[1::2]).any(axis=-1).all()
        apart.append(sum(kl(p[i], p[i + 1]) + kl(p[i + 1], p[i]) for i in range(0, len(p), 2)))
    return losses, float(np.mean(apart))


def test_training_with_dropout_pulls_the_two_passes_together(mode):
    plain, apart_plain = train(alpha=0)
    losses, apart = train(alpha=2)
    for history in (plain, losses):
        assert np.mean(history[-5:]) < 0.9 * np.mean(history[:3])
    assert apart < 0.2 * apart_plain
