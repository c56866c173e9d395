"""Dropout in blocks that are recomputed: the backward pass must see the mask of the forward pass."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from mindspore import Tensor, nn, ops

# The masks of the block that runs now, in PyNative mode: to be filled, or to be used once more.
_recorded: list[Tensor] | None = None
_replayed: Iterator[Tensor] | None = None


class Dropout(ops.Dropout):
    """The operator of this name, whose result is kept where everything around it is computed again.

    A graph keeps what the operator gave. In PyNative mode, which has no such switch, `KeepsMasks` keeps the
    masks.
    """

    def __init__(self, keep_prob: float = 0.5, Seed0: int = 0, Seed1: int = 0) -> None:
        super().__init__(keep_prob, Seed0, Seed1)
        self.recompute(False)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x` after dropout, and the mask."""
        if _replayed is not None:
            mask = next(_replayed)
        elif _recorded is not None:
            mask = super().__call__(ops.ones_like(x))[0]
            _recorded.append(mask)
        else:
            return super().__call__(x)
        return x * mask, mask


class DeltaDropout(Dropout):
    """The one of a delta, which is true or refused in blocks of MindSpore's own `Cell.recompute()` too."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x` after dropout, and the mask.

        Raises:
            RuntimeError: a block around it was set by `Cell.recompute()` alone, and PyNative mode would draw another
                mask in the backward pass.
        """
        if _replayed is None and _recorded is None and _is_recomputed():
            raise RuntimeError("An adapter with dropout is in a block set by MindSpore's own recompute(), whose "
                               "backward pass has other masks than its forward pass in PyNative mode. Set the block "
                               "with net_recompute(net, pattern) instead, which keeps the masks, or train without "
                               "dropout.")
        return super().__call__(x)


# A compiler finds an operator by the name of its class.
DeltaDropout.__name__ = "Dropout"


def delta_dropout(rate: float) -> nn.Dropout:
    """Return the dropout of a delta."""
    cell = nn.Dropout(p=rate)
    cell.dropout = DeltaDropout(**cell.dropout.init_attrs)
    return cell


def _is_recomputed() -> bool:
    """Tell whether this call is inside of a block that MindSpore computes again in PyNative mode."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if type(frame.f_locals.get("self")).__name__ == "_RecomputeCell":
            return True
        frame = frame.f_back
    return False


class KeepsMasks:
    """Run a block in PyNative mode; the second run of a call has the dropout masks of the first.

    Args:
        run: the block.
        waiting: the inputs of the calls that wait for their backward pass. MindSpore adds one before the first run,
            and takes the last one off before the second.
    """

    def __init__(self, run: Callable[..., Any], waiting: list[Any]) -> None:
        self.run, self.waiting = run, waiting
        self.masks: list[list[Tensor]] = [[] for _ in waiting]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the block returns."""
        global _recorded, _replayed
        before = _recorded, _replayed
        if len(self.waiting) > len(self.masks):
            self.masks.append([])
            _recorded, _replayed = self.masks[-1], None
        else:
            _recorded, _replayed = None, iter(self.masks.pop())
        try:
            return self.run(*args, **kwargs)
        finally:
            _recorded, _replayed = before
