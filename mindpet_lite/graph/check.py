"""Prove that the adapters of a net run: a layer whose parent reads its weight is never called."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mindpet_lite.arguments import some_of
from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.parts import put
from mindpet_lite.graph.adapters import deltas
from mindpet_lite.graph.saved_parameter import copy_of
from mindpet_lite.graph.strength import adapters_are_disabled

_SHOWN = 10


def check_adapters(net: nn.Cell, *inputs: Any) -> list[str]:
    """Prove of each adapted layer of `net` that it runs and that its delta reaches the output; return their paths.

    A layer does not run where the cell around it reads its weight instead of calling it, as an output head on the table
    of an embedding does; its delta trains nothing then, and `mindpet_lite.merge` would change the output. So it
    would where a layer runs and another cell reads its weight besides. Call it once after adapting, in the mode in
    which the net will train, with a batch that holds all tokens that train. It takes the gradient, by each delta, of a
    weighted sum of the net's outputs, with random numbers added to all deltas; then it compares the output with the one
    on merged weights, unless the net gives another output each time, by dropout. Afterwards all values are as before,
    and the training flags and the random state of the process are never touched.

    Args:
        net: with adapted layers.
        *inputs: one batch, as the net takes it.

    Returns:
        The paths of the adapted layers.

    Raises:
        TypeError: `net` is no Cell.
        ValueError: layers of which no delta reaches the output, or whose weight another cell reads besides: the message
            names them. Or the net has no adapted layer, its adapters are switched off, or its output holds no float
            Tensor.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> x = Tensor(np.ones((3, 4), np.float32))
        >>> mp.check_adapters(net, x)
        ['0']
    """
    found = deltas(net)
    if adapters_are_disabled(net):
        raise ValueError("The adapters are switched off by adapters_disabled(): leave the block before you check them.")
    if all(delta.strength == 0 for delta in found.values()):
        raise ValueError("The strength of the adapters is 0: call set_lora_scale(net, 1) before you check them.")
    owned = [(path, item) for path, delta in found.items() for item in delta.delta_parameters().values()]
    parameters = list({id(item): item for _, item in owned}.values())
    with _moved(parameters):
        outputs = net(*inputs)
        weights = _weights_for(outputs)

        def projection(*batch: Any) -> Tensor:
            outputs = net(*batch)
            parts = (outputs,) if isinstance(outputs, Tensor) else outputs
            total = ops.zeros((), mindspore.float32)
            for place, weight in weights:
                total = total + (ops.cast(parts[place], mindspore.float32) * weight).sum()
            return total

        _, gradients = mindspore.value_and_grad(projection, None, parameters)(*inputs)
        read = _read_besides(net, found, inputs, _numbers(outputs))
    reached = {id(item) for item, gradient in zip(parameters, gradients)
               if np.any(gradient.astype(mindspore.float32).asnumpy())}
    silent = [path or "the net itself" for path in found if not any(
        id(item) in reached for own, item in owned if own == path)]
    if silent:
        more = f" and {len(silent) - _SHOWN} more" if len(silent) > _SHOWN else ""
        raise ValueError(f"The deltas of {', '.join(silent[:_SHOWN])}{more} do not reach the output: the cell around "
                         f"such a layer reads its weight instead of calling it, nothing uses what it returns, or the "
                         f"batch holds none of the tokens that train. Leave it out of target_modules, change the cell "
                         f"around it, or take a batch with those tokens.")
    if read:
        raise ValueError(f"The weights of {some_of(read)} are read by another cell too, which computes without the "
                         f"delta: merge() would change the output. Leave the layers out of target_modules, or let the "
                         f"other cell call the layer, or have a weight of its own.")
    return list(found)


def _read_besides(net: nn.Cell, found: Mapping[str, Delta], inputs: tuple[Any, ...], outputs: list[np.ndarray]
                  ) -> list[str]:
    """Return the layers on whose merged weights, with their deltas off, the net has not the outputs that it has now."""
    def differ(chosen: Mapping[str, Delta]) -> bool:
        with _merged(chosen.values()):
            return not _are_close(_numbers(net(*inputs)), outputs)

    able = {path: delta for path, delta in found.items() if not delta.unmergeable and delta.setting_names}
    if not able or not _are_close(_numbers(net(*inputs)), outputs) or not differ(able):
        return []
    return [path for path, delta in able.items() if differ({path: delta})]


@contextmanager
def _merged(chosen: Iterable[Delta]) -> Iterator[None]:
    """Have merged weights, and no deltas, inside the block."""
    chosen = list(chosen)
    merged = {parameter: value for delta in chosen for parameter, value in delta.merged_value().items()}
    before = {parameter: copy_of(parameter) for parameter in merged}
    try:
        for parameter, value in merged.items():
            put(parameter, value)
        for delta in chosen:
            delta.enabled = False
            delta.refresh()
        yield
    finally:
        for parameter, value in before.items():
            put(parameter, value)
        for delta in chosen:
            delta.enabled = True
            delta.refresh()


def _numbers(outputs: Any) -> list[np.ndarray]:
    """Return the float Tensors among the outputs of a net, in float32."""
    parts = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [part.astype(mindspore.float32).asnumpy() for part in parts
            if isinstance(part, Tensor) and part.dtype in mstype.float_type]


def _are_close(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """Tell whether outputs are the same but for roundings of half precision."""
    return all(np.abs(ours - theirs).max(initial=0) <= 2e-2 * np.abs(theirs).max(initial=0)
               for ours, theirs in zip(one, other))


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
