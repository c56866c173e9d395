"""Moving averages of the deltas."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import mindspore
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet_lite.arguments import check_bool, check_number
from mindpet_lite.delta.parts import as_type, put
from mindpet_lite.graph.adapters import deltas
from mindpet_lite.graph.parameters import net_parameters
from mindpet_lite.graph.save import save_adapter
from mindpet_lite.graph.tree import require_cell


class DeltaEMA(nn.Cell):
    r"""Exponential moving averages of what an adapter holds: smoother weights to evaluate and to keep.

    $$
    \bar\theta_{n+1} = \bar\theta_n + (1 - d_n)(\theta - \bar\theta_n), \quad \bar\theta_0 = \theta_0
    $$

    with d = `decay` for every update n = 0, 1, ..., or with `warm_up` d = min(`decay`, (1 + n) / (10 + n)), so that the
    first averages do not hang on to the start.

    Averaged is what trains of the deltas and, where the rest is frozen, what trains beside them: what `save_adapter`
    writes. The averages are float32, whatever the type of the deltas. Call the cell once after each step of the
    optimizer, alone or inside a training step; it updates in place, so a compiled graph needs no host for it.

    Source: Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992, in its exponential form;
    the warm-up is that of TensorFlow's ExponentialMovingAverage.

    Args:
        net: a net with adapted layers, frozen as it is to be trained.
        decay: d, in [0, 1). Default: 0.999.
        warm_up: start with smaller decays. Default: False.

    Raises:
        TypeError: `net` is no Cell, `decay` no number, or `warm_up` no bool.
        ValueError: `decay` is outside [0, 1); the net has no adapted layer, or nothing in it trains.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> x = Tensor(np.ones((3, 4), np.float32))
        >>> ema = mp.DeltaEMA(net, decay=0.999)
        >>> for _ in range(2):
        ...     _ = ema()                          # after each step of the optimizer
        >>> with ema.applied():
        ...     y = net(x)                         # computes with the averages
        >>> ema.save("averages")                   # load_adapter(net, "averages/ema") reads it
        PosixPath('averages/ema')
    """

    def __init__(self, net: nn.Cell, decay: float = 0.999, warm_up: bool = False) -> None:
        super().__init__(auto_prefix=False)
        check_bool("warm_up", warm_up)
        self.decay, self.warm_up = check_number("decay", decay), warm_up
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), but got {decay}.")
        trained = _trained(require_cell(net))
        # In a tuple, so that the net is no child: it would be listed, and saved, below this cell.
        self._net = (net,)
        self.trained = ParameterTuple(trained)
        self.averages = ParameterTuple([
            Parameter(Tensor(item.astype(mstype.float32).asnumpy().copy()), name=f"ema.{item.name}",
                      requires_grad=False) for item in trained])
        self.updates = Parameter(Tensor(0, mstype.int32), name="ema_updates", requires_grad=False)
        self.each = ops.HyperMap()

    def construct(self) -> Tensor:
        """Take the present values into the averages; return the number of updates so far."""
        rest = 1 - self.decay
        if self.warm_up:
            updates = ops.cast(self.updates, mstype.float32)
            rest = ops.maximum(9 / (10 + updates), rest)
        self.each(ops.partial(_move, rest), self.averages, self.trained)
        return ops.assign_add(self.updates, 1)

    @contextlib.contextmanager
    def applied(self) -> Iterator[nn.Cell]:
        """Inside the block the net has the averages in place of the trained values; afterwards these, bit for bit.

        Compiled graphs see both changes. Do not train inside the block.
        """
        kept = [_copy(item) for item in self.trained]
        try:
            for parameter, average in zip(self.trained, self.averages):
                put(parameter, _copy(average).astype(parameter.dtype))
            yield self._net[0]
        finally:
            for parameter, value in zip(self.trained, kept):
                put(parameter, value)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the averages as an adapter to ``<directory>/ema``, beside the one that `save_adapter` writes.

        `mindpet_lite.load_adapter` reads it like any other.

        Args:
            directory: that of the adapter; made if missing.

        Returns:
            The path of the averages.

        Raises:
            ValueError, OSError: as `mindpet_lite.save_adapter`.
        """
        if not os.fspath(directory):
            raise ValueError("directory must name that of an adapter, but got an empty string.")
        with self.applied() as net:
            return save_adapter(net, Path(directory) / "ema")


def _trained(net: nn.Cell) -> list[Parameter]:
    """Return what trains of the deltas and, unless nothing is frozen, beside them; raise ValueError if nothing."""
    own = {id(item) for delta in deltas(net).values() for item in delta.delta_parameters().values()}
    parameters = [item for item, _ in net_parameters(net)]
    frozen = any(id(item) not in own and not item.requires_grad for item in parameters)
    found = [item for item in parameters if item.requires_grad and (frozen or id(item) in own)]
    if not found:
        raise ValueError("Nothing in the net trains, so there is nothing to average: call freeze_delta() or "
                         "get_pet_model() first.")
    return found


def _move(rest: Tensor, average: Parameter, value: Parameter) -> Tensor:
    return ops.assign_add(average, (as_type(value, mstype.float32) - average) * rest)


def _copy(parameter: Parameter) -> Tensor:
    """Return the value in memory of its own, bit for bit; numpy has no bfloat16."""
    if parameter.dtype == mindspore.bfloat16:
        return Tensor(parameter.astype(mstype.float32).asnumpy()).astype(mindspore.bfloat16)
    return Tensor(parameter.asnumpy().copy())
