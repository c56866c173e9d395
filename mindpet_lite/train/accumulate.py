"""A training step that accumulates gradients."""
from __future__ import annotations

from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet_lite.arguments import check_int, check_positive
from mindpet_lite.delta.parts import as_type, put
from mindpet_lite.graph.split import is_split
from mindpet_lite.graph.tree import call_at_train_end
from mindpet_lite.train.allocation import RankAllocation
from mindpet_lite.train.clip import clip_global_norm
from mindpet_lite.train.ema import DeltaEMA

_SPLIT = (mindspore.ParallelMode.DATA_PARALLEL, mindspore.ParallelMode.HYBRID_PARALLEL)


class GradientAccumulation(nn.Cell):
    r"""A training step that updates the weights once in `steps` calls, from the mean of their gradients.

    $$
    g = \frac{1}{n} \sum_{i=1}^{n} \nabla L(x_i)
    $$

    For micro-batches of one size and a loss that is a mean over examples, that is the gradient of the batch of all of
    them, at the memory of one. Sums are kept in float32 for the optimizer's parameters alone: with a frozen base these
    are the deltas. They, and the count, are Parameters, and what is done in which call is decided in the compiled
    graph, without the host. A window that an epoch leaves open goes on in the next; what is left at the end of
    `Model.train` is applied there, before its callbacks, as `flush` does it in a loop of one's own.

    At the end of a window, in this order: the mean; in data-parallel training the mean over the devices; with
    `loss_scaler` unscaling, and nothing but a smaller scale where a gradient is not finite; clipping with
    `mindpet_lite.clip_global_norm`; the optimizer; `ema`. With `steps` 1 it is the plain step with the same
    order, and has no sums.

    Args:
        network: a cell that gives a scalar loss.
        optimizer: of `mindspore.nn`, or a `mindpet_lite.RankAllocation` around one; its parameters train.
        steps: n, positive. Learning rates and weight decays count updates, not calls.
        max_norm: largest norm of all gradients together, positive; None for no clipping. Default: None.
        loss_scaler: a `mindspore.amp.StaticLossScaler` or `DynamicLossScaler`; it is adjusted once a window.
            Default: None.
        ema: averages to update after each update of the weights. Default: None.

    Inputs:
        - **\*batch** (Tensor): what `network` takes.

    Outputs:
        Tensor (), the loss of this call's micro-batch.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: `steps` or `max_norm` is not positive, or `max_norm` is given and layers are split over processes
            (`mindpet_lite.split_linear`).

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> optimizer = nn.Adam(net.trainable_params(), 1e-3)
        >>> step = mp.GradientAccumulation(nn.WithLossCell(net, nn.MSELoss()), optimizer, steps=4, max_norm=1.0)
        >>> x = Tensor(np.ones((3, 4), np.float32))
        >>> for _ in range(4):                     # or Model(step).train(epochs, dataset)
        ...     loss = step(x, Tensor(np.zeros((3, 2), np.float32)))
        >>> int(optimizer.global_step)             # the weights changed once
        1
    """

    def __init__(self, network: nn.Cell, optimizer: nn.Optimizer | RankAllocation, steps: int,
                 max_norm: float | None = None, loss_scaler: mindspore.amp.LossScaler | None = None,
                 ema: DeltaEMA | None = None) -> None:
        super().__init__(auto_prefix=False)
        check_int("steps", steps)
        if max_norm is not None:
            check_positive("max_norm", max_norm)
        for name, value, kind, needed in (
                ("network", network, nn.Cell, True),
                ("optimizer", optimizer.optimizer if isinstance(optimizer, RankAllocation) else optimizer,
                 nn.Optimizer, True),
                ("loss_scaler", loss_scaler, mindspore.amp.LossScaler, False), ("ema", ema, DeltaEMA, False)):
            if not isinstance(value, kind) and (needed or value is not None):
                raise TypeError(f"{name} must be a {kind.__name__}{'' if needed else ' or None'}, but got "
                                f"{type(value).__name__}.")
        if max_norm is not None and any(is_split(cell) for _, cell in network.cells_and_names()):
            raise ValueError("max_norm does not go with layers that are split over processes: each process would "
                             "measure the norm of its own part, and clip by another number. Leave it out.")
        self.network, self.optimizer, self.ema, self.loss_scaler = network, optimizer, ema, loss_scaler
        self.steps = steps
        self.update = _Update(optimizer, max_norm, loss_scaler, ema)
        parameters = optimizer.parameters
        self.gradients = mindspore.value_and_grad(self._scaled_loss, None, parameters)
        self.each = ops.HyperMap()
        if steps > 1:
            self.count = Parameter(Tensor(0, mstype.int32), name="accumulated_count", requires_grad=False)
            self.sums = ParameterTuple([
                Parameter(Tensor(np.zeros(item.shape, np.float32)), name=f"accumulated.{item.name}",
                          requires_grad=False) for item in parameters])

    def construct(self, *batch: Tensor) -> Tensor:
        """Return the loss of a micro-batch; train with it."""
        loss, gradients = self.gradients(*batch)
        if self.loss_scaler is not None:
            loss = self.loss_scaler.unscale(loss)
        if self.steps == 1:
            return ops.depend(loss, self.update(gradients))
        self.each(_add, self.sums, gradients)
        ops.assign(self.count, (self.count + 1) % self.steps)
        if self.count == 0:
            self.update(self.each(ops.partial(_times, 1 / self.steps), self.sums))
            self.each(_clear, self.sums)
        return loss

    @property
    def updates(self) -> int:
        """The number of updates of the weights so far. A window with an overflow is none."""
        return int(self.update.updates.asnumpy())

    @property
    def norm(self) -> float:
        """The norm of all gradients of the last update together, before clipping; 0 without `max_norm`."""
        return float(self.update.norm.asnumpy())

    def flush(self) -> None:
        """Update the weights from the mean of the micro-batches of a window that is not full; do nothing without any.

        It does all that is due at the end of a window. The next call begins a new one.
        """
        count = int(self.count.asnumpy()) if self.steps > 1 else 0
        if count:
            self.update(tuple(total * (1 / count) for total in self.sums))
            for item in (self.count, *self.sums):
                put(item, ops.zeros_like(item))

    def add_flags_recursive(self, **flags: Any) -> GradientAccumulation:
        """Set flags as nn.Cell does; where they say that `Model.train` begins, have it flush at its end."""
        if flags.get("training"):
            call_at_train_end(self.flush)
        return super().add_flags_recursive(**flags)

    def _scaled_loss(self, *batch: Tensor) -> Tensor:
        loss = self.network(*batch)
        return loss if self.loss_scaler is None else self.loss_scaler.scale(loss)


class _Update(nn.Cell):
    """What is due at the end of a window, with the mean of its gradients."""

    def __init__(self, optimizer: nn.Optimizer | RankAllocation, max_norm: float | None,
                 loss_scaler: mindspore.amp.LossScaler | None, ema: DeltaEMA | None) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer, self.max_norm, self.loss_scaler, self.ema = optimizer, max_norm, loss_scaler, ema
        self.types = tuple(item.dtype for item in optimizer.parameters)
        self.each = ops.HyperMap()
        self.reducer = nn.DistributedGradReducer(optimizer.parameters) \
            if mindspore.get_auto_parallel_context("parallel_mode") in _SPLIT else nn.Identity()
        self.updates = Parameter(Tensor(0, mstype.int32), name="weight_updates", requires_grad=False)
        self.norm = Parameter(Tensor(0, mstype.float32), name="gradient_norm", requires_grad=False)

    def construct(self, gradients: tuple[Tensor, ...]) -> bool:
        """Average over devices, unscale, clip, update."""
        gradients = self.reducer(gradients)
        if self.loss_scaler is None:
            return self._apply(gradients)
        finite = mindspore.amp.all_finite(gradients)
        gradients = self.loss_scaler.unscale(gradients)
        self.loss_scaler.adjust(finite)
        if finite:
            self._apply(gradients)
        return True

    def _apply(self, gradients: tuple[Tensor, ...]) -> bool:
        if self.max_norm is not None:
            gradients, norm = clip_global_norm(gradients, self.max_norm)
            ops.assign(self.norm, norm)
        self.optimizer(self.each(as_type, gradients, self.types))
        ops.assign_add(self.updates, 1)
        if self.ema is not None:
            self.ema()
        return True


def _add(total: Parameter, gradient: Tensor) -> Tensor:
    return ops.assign_add(total, as_type(gradient, mstype.float32))


def _times(factor: float, total: Parameter) -> Tensor:
    return total * factor


def _clear(total: Parameter) -> Tensor:
    return ops.assign(total, ops.zeros_like(total))
