"""Prove that the adapters of a net run: a layer whose parent reads its weight is never called."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet_lite.delta.parts import put
from mindpet_lite.graph.adapters import deltas
from mindpet_lite.graph.saved_parameter import copy_of
from mindpet_lite.graph.strength import adapters_are_disabled

_SHOWN = 10


def check_adapters(net: nn.Cell, *inputs: Any) -> list[str]:
    """Prove of each adapted layer of `net` that it runs and that its delta reaches the output; return their paths.

    A layer does not run where the cell around it reads its weight instead of calling it, as an output head on the table
    of an embedding does; its delta trains nothing then, and :func:`mindpet_lite.merge` would change the output. Call it
    once after adapting, in the mode in which the net will train. It takes the gradient, by each delta, of a weighted
    sum of the net's outputs, with random numbers added to all deltas. Afterwards their values are as before, and the
    weights, the training flags and the random state of the process are never touched.

    Args:
        net: with adapted layers.
        *inputs: one batch, as the net takes it.

    Returns:
        The paths of the adapted layers.

    Raises:
        TypeError: `net` is no Cell.
        ValueError: layers of which no delta reaches the output: the message names them. Or the net has no adapted
            layer, its adapters are switched off, or its output holds no float Tensor.
    """
    found = deltas(net)
    if adapters_are_disabled(net):
        raise ValueError("The adapters are switched off by adapters_disabled(): leave the block before you check them.")
    if all(delta.strength == 0 for delta in found.values()):
        raise ValueError("The strength of the adapters is 0: call set_lora_scale(net, 1) before you check them.")
    owned = [(path, item) for path, delta in found.items() for item in delta.delta_parameters().values()]
    parameters = list({id(item): item for _, item in owned}.values())
    with _moved(parameters):
        weights = _weights_for(net(*inputs))

        def projection(*batch: Any) -> Tensor:
            outputs = net(*batch)
            parts = (outputs,) if isinstance(outputs, Tensor) else outputs
            total = ops.zeros((), mindspore.float32)
            for place, weight in weights:
                total = total + (ops.cast(parts[place], mindspore.float32) * weight).sum()
            return total

        _, gradients = mindspore.value_and_grad(projection, None, parameters)(*inputs)
    reached = {id(item) for item, gradient in zip(parameters, gradients)
               if np.any(gradient.astype(mindspore.float32).asnumpy())}
    silent = [path or "the net itself" for path in found if not any(
        id(item) in reached for own, item in owned if own == path)]
    if silent:
        more = f" and {len(silent) - _SHOWN} more" if len(silent) > _SHOWN else ""
        raise ValueError(f"The deltas of {', '.join(silent[:_SHOWN])}{more} do not reach the output: the cell around "
                         f"such a layer reads its weight instead of calling it, or nothing uses what it returns. Leave "
                         f"it out of target_modules, or change the cell around it.")
    return list(found)


@contextmanager
def _moved(parameters: list[Parameter]) -> Iterator[None]:
    """Add random numbers to Parameters inside the block: factors that start from zero let no gradient through."""
    rng, values = np.random.default_rng(0), [copy_of(item) for item in parameters]
    try:
        for item, value in zip(parameters, values):
            noise = 0.1 * rng.standard_normal(item.shape).astype(np.float32)
            put(item, Tensor(value.astype(mindspore.float32).asnumpy() + noise).astype(item.dtype))
        yield
    finally:
        for item, value in zip(parameters, values):
            put(item, value)


def _weights_for(outputs: Any) -> list[tuple[int, Tensor]]:
    """Return random weights for the float Tensors among the outputs of a net, by their place."""
    rng = np.random.default_rng(1)
    parts = (outputs,) if isinstance(outputs, Tensor) else outputs if isinstance(outputs, (tuple, list)) else ()
    weights = [(place, Tensor(rng.standard_normal(part.shape).astype(np.float32))) for place, part in enumerate(parts)
               if isinstance(part, Tensor) and part.dtype in mstype.float_type]
    if not weights:
        raise ValueError(f"check_adapters() needs a net whose output is a float Tensor, or a tuple or list with one, "
                         f"but got {type(outputs).__name__}.")
    return weights
