"""AdaLoRA's training: which singular values stay, and the regularisation that keeps their vectors orthogonal."""
from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet_lite.delta.parts import as_type
from mindpet_lite.graph.adapters import deltas

_SCHEDULE = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step")


class RankAllocation(nn.Cell):
    r"""An optimizer that gives AdaLoRA's layers their ranks: after each step it sets what matters least to zero.

    It stands where the optimizer stood, in a loop, in `nn.TrainOneStepCell` or in `GradientAccumulation`, and calls it.
    For every number w of P, Λ and Q with gradient g, at step t = 0, 1, ...:

    $$
    I = |w g|, \quad \bar I \leftarrow \beta_1 \bar I + (1 - \beta_1) I, \quad
    \bar U \leftarrow \beta_2 \bar U + (1 - \beta_2) |I - \bar I|, \quad s = \bar I \bar U
    $$

    The score of a triplet is s of its singular value and the means of s over its column of P and its row of Q.
    The budget b of all layers falls from `init_r` to `target_r` for each, with T = `total_step`:

    $$
    b_t = b_T + (b_0 - b_T) (1 - \frac{t - t_i}{T - t_i - t_f})^3 \text{ for } t_i < t \le T - t_f
    $$

    At every `deltaT`-th step in between, and at step T - t_f, the singular values of all triplets but the b of the
    highest scores become zero; afterwards those of that step stay zero. Those that are zero before still get
    gradients and can come back. Scores that are equal fall together, as in PEFT. w is the value after the optimizer's
    step, as in the authors' code and in PEFT (`update_and_allocate` after `optimizer.step`); algorithm 1 of the paper
    takes the one before.

    All of it is in Parameters and by values: a compiled graph needs no host for it. `mindpet_lite.TrainingState`
    keeps it where the training step is given. `save_adapter` leaves out the triplets that are gone.

    For `Model`, give it the step: ``Model(nn.TrainOneStepCell(net_with_loss, optimizer)).train(epochs, dataset)``.

    Source: Zhang et al., AdaLoRA, https://arxiv.org/abs/2303.10512, sections 3.2 and 3.3.

    Args:
        net: a net with AdaLoRA's layers; their config has the schedule.
        optimizer: of `mindspore.nn`, which holds what trains of them.

    Inputs:
        - **gradients** (tuple[Tensor]): of `parameters`, in their order.

    Outputs:
        What the optimizer returns.

    Raises:
        TypeError: `net` is no Cell, or `optimizer` no optimizer.
        ValueError: no layer is AdaLoRA's, their schedules differ, or the optimizer lacks a part of one.

    Examples:
        >>> import mindspore as ms
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> config = mp.AdaLoraConfig(total_step=3, init_r=3, target_r=2, target_modules=["0"])
        >>> net = mp.get_pet_model(net, config)
        >>> optimizer = mp.RankAllocation(net, nn.Adam(net.trainable_params(), 1e-3))
        >>> gradients_of = ms.value_and_grad(lambda x: net(x).mean(), None, optimizer.parameters)
        >>> x = Tensor(np.ones((3, 4), np.float32))
        >>> for _ in range(3):
        ...     loss, gradients = gradients_of(x)
        ...     _ = optimizer(gradients)
        >>> int(net[0].kept.asnumpy().sum())       # the layer has two of its three ranks
        2
    """

    def __init__(self, net: nn.Cell, optimizer: nn.Optimizer) -> None:
        super().__init__(auto_prefix=False)
        if not isinstance(optimizer, nn.Optimizer):
            raise TypeError(f"optimizer must be an optimizer of mindspore.nn, such as nn.Adam, but got "
                            f"{type(optimizer).__name__}.")
        found = _adaptive(net, _SCHEDULE)
        triplets = [layer.triplets() for layer in found.values()]
        self.places = _places(found, optimizer)
        config = next(iter(found.values())).config
        self.optimizer, self.beta1, self.beta2 = optimizer, float(config.beta1), float(config.beta2)
        self.triplets = ParameterTuple([item for parts in triplets for item in parts])
        self.records = ParameterTuple([layer.kept for layer in found.values()])
        self.ranks = tuple(int(record.shape[0]) for record in self.records)
        kept = np.concatenate([record.asnumpy().reshape(-1) for record in self.records])
        self.count, self.last = kept.size, config.total_step - config.tfinal
        self.drops = Tensor(kept.size - _budgets(config, int(kept.sum()), len(found)), mstype.int32)
        self.allocates = Tensor(_allocates(config), mstype.bool_)
        self.step = Parameter(Tensor(0, mstype.int32), name="allocation_step", requires_grad=False)
        self.kept = Parameter(Tensor(kept), name="allocation_kept", requires_grad=False)
        self.means, self.doubts = (ParameterTuple([
            Parameter(Tensor(np.zeros(item.shape, np.float32)), name=f"{name}.{item.name}", requires_grad=False)
            for item in self.triplets]) for name in ("importance", "uncertainty"))
        self.sort = ops.TopK(sorted=True)
        # As MindSpore's own optimizers: else the gradients' values are constants, and every call compiles.
        self.enable_tuple_broaden = True

    @property
    def parameters(self) -> Any:
        """The Parameters whose gradients it takes: those of the optimizer."""
        return self.optimizer.parameters

    def construct(self, gradients: tuple[Tensor, ...]) -> Any:
        """Update the weights, then the importance of each, and what stays."""
        done = self.optimizer(gradients)
        step = ops.minimum(self.step, self.last + 1)
        scores = self._scores(gradients, ops.less(step, self.last))
        # From the last allocation on nothing changes any more.
        entry = ops.minimum(step, self.last)
        drops = ops.gather(self.drops, entry, 0)
        allocates = ops.logical_and(ops.gather(self.allocates, entry, 0), ops.less_equal(step, self.last))
        ordered, _ = self.sort(scores, self.count)
        threshold = ops.gather(ordered, ops.minimum(self.count - drops, self.count - 1), 0)
        stays = ops.logical_or(ops.greater(scores, threshold), ops.less_equal(drops, 0))
        kept = ops.where(allocates, ops.cast(stays, mstype.float32), self.kept)
        self._mask(kept, ops.logical_or(allocates, ops.greater(step, self.last)))
        ops.assign(self.kept, kept)
        ops.assign_add(self.step, 1)
        return done

    def _scores(self, gradients: tuple[Tensor, ...], learns: Tensor) -> Tensor:
        """Return the score of every triplet, after the importance of this step where it counts."""
        found: tuple[Tensor, ...] = ()
        for layer in range(len(self.ranks)):
            parts: tuple[Tensor, ...] = ()
            for part in range(3):
                place = 3 * layer + part
                value = as_type(self.triplets[place], mstype.float32)
                now = ops.abs(value * as_type(gradients[self.places[place]], mstype.float32))
                before, doubt = self.means[place], self.doubts[place]
                mean = ops.where(learns, self.beta1 * before + (1 - self.beta1) * now, before)
                doubt = ops.where(learns, self.beta2 * doubt + (1 - self.beta2) * ops.abs(now - mean), doubt)
                ops.assign(self.means[place], mean)
                ops.assign(self.doubts[place], doubt)
                parts = parts + (mean * doubt,)
            found = found + (ops.reshape(parts[2], (-1,)) + parts[0].mean(1) + parts[1].mean(0),)
        return ops.concat(found)

    def _mask(self, kept: Tensor, masks: Tensor) -> None:
        """Set the singular values of triplets that are gone to zero, where this step does that."""
        start = 0
        for layer in range(len(self.ranks)):
            own = ops.reshape(kept[start:start + self.ranks[layer]], (-1, 1))
            start = start + self.ranks[layer]
            values = self.triplets[3 * layer + 2]
            gone = ops.logical_and(masks, ops.equal(own, 0))
            ops.assign(values, ops.where(gone, ops.zeros_like(values), values))
            ops.assign(self.records[layer], own)


class OrthogonalRegularization(nn.Cell):
    r"""What to add to a loss so that AdaLoRA's P and Q stay near orthogonal, as singular vectors are.

    $$
    \frac{\gamma}{2n} \sum_{k=1}^{n} \|P_k^T P_k - 1\|_F + \|Q_k Q_k^T - 1\|_F
    $$

    with γ = `orth_reg_weight` of the config, over the n layers. It is that of the authors' code and of PEFT; the paper
    (section 3.1) has the squares of these norms. Triplets that are gone from P and Q, as after `load_adapter`, do not
    count.

    Source: Zhang et al., AdaLoRA, https://arxiv.org/abs/2303.10512.

    Args:
        net: a net with AdaLoRA's layers.

    Outputs:
        Tensor (), in float32.

    Raises:
        TypeError: `net` is no Cell.
        ValueError: no layer is AdaLoRA's, or their weights γ differ.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> config = mp.AdaLoraConfig(total_step=10, init_r=3, target_r=2, target_modules=["0"])
        >>> net = mp.get_pet_model(net, config)
        >>> regularization = mp.OrthogonalRegularization(net)
        >>> x = Tensor(np.ones((3, 4), np.float32))
        >>> loss = net(x).mean() + regularization()
        >>> loss.shape
        ()
    """

    def __init__(self, net: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        found = _adaptive(net, ("orth_reg_weight",))
        self.weight = float(next(iter(found.values())).config.orth_reg_weight) / (2 * len(found))
        self.right = ParameterTuple([layer.triplets()[0] for layer in found.values()])
        self.left = ParameterTuple([layer.triplets()[1] for layer in found.values()])
        self.ones = tuple(Tensor(np.eye(item.shape[0], dtype=np.float32)) for item in self.right)
        self.rows, self.columns = ops.MatMul(transpose_b=True), ops.MatMul(transpose_a=True)

    def construct(self) -> Tensor:
        """Return the regularisation of the present values."""
        total = ops.zeros((), mstype.float32)
        for layer in range(len(self.ones)):
            right = as_type(self.right[layer], mstype.float32)
            left = as_type(self.left[layer], mstype.float32)
            total = total + _distance(self.rows(right, right), self.ones[layer])
            total = total + _distance(self.columns(left, left), self.ones[layer])
        return total * self.weight


def _distance(product: Tensor, one: Tensor) -> Tensor:
    """Return the Frobenius norm of the difference; its gradient at 0 is 0, as PyTorch's."""
    off = product - one * ops.cast(ops.greater(product, 0), mstype.float32)
    square = (off * off).sum()
    above = ops.greater(square, 0)
    return ops.where(above, ops.sqrt(ops.where(above, square, ops.ones_like(square))), ops.zeros_like(square))


def _adaptive(net: nn.Cell, fields: tuple[str, ...]) -> dict[str, Any]:
    """Return the layers of a net that have triplets, by path; raise ValueError where their configs differ in fields."""
    found: dict[str, Any] = {path: layer for path, layer in deltas(net).items() if hasattr(layer, "triplets")}
    if not found:
        methods = " and ".join(sorted({delta.method for delta in deltas(net).values()}))
        raise ValueError(f"Ranks are allocated to AdaLoRA's layers, but the net's method is {methods}: adapt it with "
                         f"AdaLoraConfig.")
    first = next(iter(found))
    for name in fields:
        values = {path: getattr(layer.config, name) for path, layer in found.items()}
        other = next((path for path, value in values.items() if value != values[first]), None)
        if other is not None:
            raise ValueError(f"{name} must be the same for all of AdaLoRA's layers, but is {values[first]!r} for "
                             f"{first} and {values[other]!r} for {other}.")
    return found


def _places(found: dict[str, Any], optimizer: nn.Optimizer) -> tuple[int, ...]:
    """Return the place of each part of each triplet among the optimizer's Parameters."""
    place_of = {id(item): place for place, item in enumerate(optimizer.parameters)}
    missing = [item.name for layer in found.values() for item in layer.triplets() if id(item) not in place_of]
    if missing:
        raise ValueError(f"The optimizer lacks {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}, "
                         f"without whose gradients no rank can be allocated: make it from net.trainable_params(), "
                         f"after the net is adapted.")
    return tuple(place_of[id(item)] for layer in found.values() for item in layer.triplets())


def _budgets(config: Any, start: int, layers: int) -> np.ndarray:
    """Return the budget at each step up to the last allocation, `start` triplets at first."""
    end, last = config.target_r * layers, config.total_step - config.tfinal
    return np.array([start if step <= config.tinit else
                     int((start - end) * (1 - (step - config.tinit) / (last - config.tinit)) ** 3 + end)
                     for step in range(last + 1)])


def _allocates(config: Any) -> np.ndarray:
    """Tell for each step up to the last allocation whether it is one."""
    last = config.total_step - config.tfinal
    return np.array([step == last or step > config.tinit and step % config.deltaT == 0 for step in range(last + 1)])
