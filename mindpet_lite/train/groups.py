"""LoRA+: the factor B learns faster than A."""
from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet_lite.arguments import check_number, check_positive
from mindpet_lite.graph.adapters import deltas


def lora_plus_groups(net: nn.Cell, lr: Any, ratio: float) -> list[dict[str, Any]]:
    r"""Return parameter groups in which LoRA's B has the learning rate `ratio` · `lr`, and all else that trains `lr`.

    $$
    \eta_A = \eta, \quad \eta_B = \lambda \eta
    $$

    B is what the deltas say is on the side of their output: LoRA's B and its bias, an embedding's B too. A, DoRA's
    magnitude and whatever trains beside the deltas keep `lr`.

    The groups are for the optimizers of `mindspore.nn`: ``nn.AdamWeightDecay(lora_plus_groups(net, 1e-4, 16))``. Each
    takes over the optimizer's `weight_decay`; parameters with beta or gamma in their names, which MindSpore does not
    decay where there are no groups, stand in a group of their own with ``weight_decay`` 0.

    Source: Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, https://arxiv.org/abs/2402.12354,
    section 4; the authors suggest a ratio of 16. Their code, and PEFT's, gives both factors of embeddings a fixed rate
    of 1e-6, and `ratio` · `lr` to every trained parameter with one axis.

    Args:
        net: a net with adapted layers, frozen as it is to be trained.
        lr: the learning rate η: a number, a list of numbers or a Tensor with one for each step, or a
            `nn.learning_rate_schedule.LearningRateSchedule`.
        ratio: λ, finite and above 0.

    Returns:
        Dictionaries with ``params``, ``lr`` and, in the group without decay, ``weight_decay``.

    Raises:
        TypeError: `net` is no Cell, `lr` no learning rate, or `ratio` no number.
        ValueError: `ratio` or `lr` is not finite and positive (a rate of 0 is allowed within a list); the net has no
            adapted layer, nothing in it trains, or no B does: the message says which.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> groups = mp.lora_plus_groups(net, lr=1e-4, ratio=16)
        >>> [(group["lr"], [item.name for item in group["params"]]) for group in groups]
        [(0.0001, ['0.mindpet_delta_lora_a']), (0.0016, ['0.mindpet_delta_lora_b'])]
        >>> optimizer = nn.AdamWeightDecay(groups)
    """
    check_positive("ratio", ratio)
    slow_rate, fast_rate = _rates(lr, float(ratio))
    trained = list(net.trainable_params()) if isinstance(net, nn.Cell) else []
    fast = _outputs(net, trained)
    groups: list[dict[str, Any]] = []
    for rate, is_fast in ((slow_rate, False), (fast_rate, True)):
        for decays, more in ((True, {}), (False, {"weight_decay": 0.0})):
            chosen = [item for item in trained if (id(item) in fast) == is_fast and _decays(item) == decays]
            if chosen:
                groups.append({"params": chosen, "lr": rate, **more})
    return groups


def _outputs(net: nn.Cell, trained: list[Parameter]) -> set[int]:
    """Return the ids of the trained Parameters on the output's side; raise ValueError where there is none."""
    found = deltas(net)
    if not trained:
        raise ValueError("Nothing in the net trains: call freeze_delta() or get_pet_model(), and make the groups "
                         "afterwards.")
    outputs = {id(delta.delta_parameters()[name]) for delta in found.values() for name in delta.output_names}
    if not outputs:
        methods = " and ".join(sorted({delta.method for delta in found.values()}))
        raise ValueError(f"LoRA+ is for LoRA's factor B, but the net's method is {methods}: give the optimizer "
                         f"net.trainable_params().")
    chosen = {id(item) for item in trained} & outputs
    if not chosen:
        raise ValueError("Every B in the net is frozen, so there is nothing for LoRA+ to train faster: thaw them with "
                         "freeze_delta(net, 'lora'), or give the optimizer net.trainable_params().")
    return chosen


def _decays(parameter: Parameter) -> bool:
    """Tell whether MindSpore's optimizers apply weight decay to a Parameter that is in no group."""
    return "beta" not in parameter.name and "gamma" not in parameter.name


def _rates(lr: Any, ratio: float) -> tuple[Any, Any]:
    """Return the learning rate as an optimizer takes it, and `ratio` times it."""
    if isinstance(lr, nn.learning_rate_schedule.LearningRateSchedule):
        return lr, _Scaled(lr, ratio)
    if isinstance(lr, (Tensor, np.ndarray, np.generic)):
        lr = (lr.asnumpy() if isinstance(lr, Tensor) else lr).tolist()
    if isinstance(lr, Iterable) and not isinstance(lr, (str, bytes, dict)):
        steps = [check_number("a learning rate in lr", one) for one in lr]
        if not steps or not all(math.isfinite(one) and one >= 0 for one in steps):
            raise ValueError("lr must hold a learning rate for each step, finite and not negative, but it "
                             + ("is empty." if not steps else
                                f"holds {next(one for one in steps if not (math.isfinite(one) and one >= 0))}."))
        return steps, [ratio * one for one in steps]
    check_positive("lr", lr)
    return float(lr), ratio * float(lr)


class _Scaled(nn.learning_rate_schedule.LearningRateSchedule):
    """A learning rate schedule times a constant."""

    def __init__(self, schedule: nn.learning_rate_schedule.LearningRateSchedule, ratio: float) -> None:
        super().__init__()
        self.schedule, self.ratio = schedule, ratio

    def construct(self, step: Tensor) -> Tensor:
        """Return the learning rate of a step."""
        return self.schedule(step) * self.ratio
