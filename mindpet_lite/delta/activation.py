"""The activations that MindPet names, all of them MindSpore's own, and how one is split in parallel training."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindspore import Tensor, nn, ops

from mindpet_lite.arguments import UnknownNameError, did_you_mean


class LeakyReLU(nn.LeakyReLU):
    """max(x, 0.2 · x), as one comparison that can be split: `nn.LeakyReLU` has no operator to give a strategy to."""

    def __init__(self) -> None:
        super().__init__(0.2)
        self.select_op = ops.Maximum()

    def construct(self, x: Tensor) -> Tensor:
        """Return the activation of `x`, of its shape and type."""
        return self.select_op(x * self.alpha, x)


class GELU(nn.GELU):
    """`nn.GELU`, which is the tanh form, with its operator in sight, so that it can be split."""

    def __init__(self) -> None:
        super().__init__()
        self.gelu = ops.GeLU()

    def construct(self, x: Tensor) -> Tensor:
        """Return the activation of `x`, of its shape and type."""
        return self.gelu(x)


class RReLU(nn.RReLU):
    """`nn.RReLU` in training; else with the mean of the slopes it draws there, so that a net has one output.

    Source: Xu et al., 2015, https://arxiv.org/abs/1505.00853, section 2.4.
    """

    def construct(self, x: Tensor) -> Tensor:
        """Return the activation of `x`, of its shape and type."""
        if self.training:
            return super().construct(x)
        return ops.maximum(x, x * ((1 / 8 + 1 / 3) / 2))


# `threshold` has no default of its own; at 0 with value 0 it is ReLU.
ACTIVATIONS: dict[str, Callable[[], nn.Cell]] = {
    "softmin": nn.Softmin, "softmax": nn.Softmax, "softmax2d": nn.Softmax2d, "logsoftmax": nn.LogSoftmax,
    "relu": nn.ReLU, "relu6": nn.ReLU6, "rrelu": RReLU, "silu": nn.SiLU, "tanh": nn.Tanh,
    "tanhshrink": nn.Tanhshrink, "hardtanh": nn.Hardtanh, "gelu": GELU, "fast_gelu": nn.FastGelu, "elu": nn.ELU,
    "sigmoid": nn.Sigmoid, "softsign": nn.Softsign, "prelu": nn.PReLU, "leakyrelu": LeakyReLU, "hswish": nn.HSwish,
    "hsigmoid": nn.HSigmoid, "logsigmoid": nn.LogSigmoid, "softshrink": nn.SoftShrink, "hshrink": nn.HShrink,
    "threshold": lambda: nn.Threshold(0.0, 0.0), "mish": nn.Mish,
}


def get_activation(name: str | None, prim_name: str | None = None) -> nn.Cell | None:
    """Return a new activation cell by its name, or None for None.

    Args:
        name: one of softmin, softmax, softmax2d, logsoftmax, relu, relu6, rrelu, silu, tanh, tanhshrink, hardtanh,
            gelu, fast_gelu, elu, sigmoid, softsign, prelu, leakyrelu, hswish, hsigmoid, logsigmoid, softshrink,
            hshrink, threshold (at 0), mish; in any case.
        prim_name: who asks, for the message.

    Raises:
        KeyError: the name is unknown (the error is a ValueError too).
    """
    if name is None:
        return None
    if not isinstance(name, str) or name.lower() not in ACTIVATIONS:
        raise UnknownNameError(f"{prim_name + ': ' if prim_name else ''}activation must be one of "
                               f"{', '.join(ACTIVATIONS)}, but got {name!r:.100}.{did_you_mean(name, ACTIVATIONS)}")
    return ACTIVATIONS[name.lower()]()


def check_non_linearity(name: object) -> None:
    """Raise TypeError unless `name` is the name of an activation."""
    if not isinstance(name, str) or name.lower() not in ACTIVATIONS:
        raise TypeError(f"non_linearity must be one of {', '.join(ACTIVATIONS)}, but got {name!r:.100}."
                        f"{did_you_mean(name, ACTIVATIONS)}")


def as_activation(activation: object) -> nn.Cell | ops.Primitive | None:
    """Return the activation that a layer's `activation` argument means: a name, a Cell, a Primitive or None.

    Raises:
        KeyError: the name is unknown (the error is a ValueError too).
        TypeError: it is of another kind.
    """
    if activation is None or isinstance(activation, (nn.Cell, ops.Primitive)):
        return activation
    if isinstance(activation, str):
        return get_activation(activation)
    raise TypeError(f"activation must be a name, a Cell, a Primitive or None, but got {activation!r:.100} of type "
                    f"{type(activation).__name__}.")


def activation_strategies(activation: Any, strategy: tuple) -> list[tuple[ops.Primitive, tuple]]:
    """Return each operator of an activation with its own strategy, where the activation can be split.

    Raises:
        ValueError: it cannot: LogSoftmax, or an activation that is not made of one operator; or the strategy is empty.
    """
    if not strategy:
        raise ValueError(f"the strategy must split the input, such as ((2, 1),), but got {strategy!r:.100}.")
    own = [part for part in vars(activation).values() if isinstance(part, ops.Primitive)] \
        if isinstance(activation, nn.Cell) else [activation]
    if isinstance(activation, LeakyReLU):
        return [(activation.select_op, (strategy[0], strategy[0]))]
    if isinstance(activation, nn.LogSigmoid):
        scalar = (strategy[0], ())
        return [(activation.mul, scalar), (activation.exp, strategy), (activation.add, scalar),
                (activation.rec, strategy), (activation.log, strategy)]
    if isinstance(activation, nn.LogSoftmax):
        raise ValueError("LogSoftmax cannot be split in semi-auto or auto parallel mode: leave its strategy out.")
    # RReLU has one operator in sight and more that are not.
    if len(own) != 1 or isinstance(activation, nn.RReLU):
        raise ValueError(f"{type(activation).__name__} is not made of one operator, so one strategy does not say how "
                         f"to split it; leave it out, or call shard() on its operators yourself.")
    return [(own[0], strategy)]
