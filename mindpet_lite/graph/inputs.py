"""What the layers of a net are given when it runs on some data."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mindspore
import numpy as np
from mindspore import Tensor, nn

from mindpet_lite.formats.problems import listed
from mindpet_lite.graph.tree import cells_by_path


def call(net: nn.Cell, batch: Any) -> Any:
    """Run the net on a batch: a tuple or list of its arguments, a mapping of them by name, or one argument."""
    if isinstance(batch, Mapping):
        return net(**batch)
    return net(*batch) if isinstance(batch, (tuple, list)) else net(batch)


def rows_of(path: str, value: Any, places: np.ndarray | None) -> np.ndarray:
    """Return what a layer is given as rows (n, inputs), those that count.

    Args:
        path: of the layer.
        value: what it is given.
        places: which places count, in the shape before the last axis or flat, where the net has made rows of them.
            None: all.

    Raises:
        ValueError: `value` is no Tensor, the places do not fit, or a number is NaN or infinite.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{path}: it is given a {type(value).__name__}, but only a Tensor has rows to start from.")
    found = value.astype(mindspore.float32).asnumpy().astype(np.float64)
    if places is not None and found.shape[:-1] not in (places.shape, (places.size,)):
        raise ValueError(f"{path}: the mask of the batch has the shape {places.shape}, but its input {found.shape}: "
                         f"give batches without attention_mask and labels.")
    rows = found.reshape(-1, found.shape[-1])
    if places is not None:
        rows = rows[places.reshape(-1)]
    if not np.isfinite(rows).all():
        raise ValueError(f"{path}: it is given NaN or infinite values: look at the batch, and at the base.")
    return rows


@contextmanager
def running(net: nn.Cell) -> Iterator[None]:
    """Let the net run in PyNative mode and in evaluation; put both back."""
    mode, flags = mindspore.get_context("mode"), {cell: cell.training for cell in cells_by_path(net).values()}
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    net.set_train(False)
    try:
        yield
    finally:
        for cell, flag in flags.items():
            cell.add_flags(training=flag)
        mindspore.set_context(mode=mode)


@contextmanager
def heard(layers: Mapping[str, nn.Cell], take: Callable[[str, Any], None]) -> Iterator[None]:
    """Call `take` with a layer's path and what it is given, whenever one of them is called."""
    def listen(path: str, layer: Any) -> Any:
        def hear(cell: nn.Cell, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            take(path, next(iter([*inputs, *named.values()]), None))

        return layer.register_forward_pre_hook(hear, with_kwargs=True)

    handles = [listen(path, layer) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_given(batches: int, rows: Mapping[str, int]) -> None:
    """Check that there was a batch, and that each layer was given rows.

    Raises:
        ValueError: there was none, or a layer got nothing.
    """
    if not batches:
        raise ValueError("There is no batch to start from: give some. (A generator that was used up gives none.)")
    silent = [path for path, count in rows.items() if not count]
    if silent:
        raise ValueError(listed([f"{path}: no batch gave it anything. The net does not call it, or calls it inside a "
                                 f"compiled function (jit), or a mask left nothing." for path in silent]))
