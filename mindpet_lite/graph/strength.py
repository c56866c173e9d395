"""Change the strength of adapters while compiled graphs run: values, not structure, so nothing compiles again."""
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import numpy as np
from mindspore import dtype as mstype
from mindspore import nn

from mindpet_lite.arguments import check_number
from mindpet_lite.delta.base import Delta
from mindpet_lite.formats.problems import listed
from mindpet_lite.graph.adapters import deltas, deltas_in, saved_of
from mindpet_lite.graph.tree import cells_by_path


def set_lora_scale(net: nn.Cell, scale: float) -> None:
    """Multiply every delta of `net` by `scale` from the next call on, without a new compile.

    1 is the adapter as trained, 0 the base exactly, 0.5 half of the update; negative values subtract it. Base
    parameters that trained beside (modules_to_save, biases) are no delta and keep their values. The scale is a state
    of the running net: it is merged by `merge`, but not written to adapter files.

    Args:
        net: a net with adapted layers.
        scale: a finite number.

    Raises:
        TypeError: `scale` is no number, or `net` no Cell.
        ValueError: `scale` is not finite, or would not be in the type that a layer computes in; the net has no adapted
            layer, one of a method without a strength, or its adapters are switched off; or `scale` is 0 and a delta
            holds NaN or infinite values, which 0 does not cancel.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> x = Tensor(np.ones((3, 4), np.float32))
        >>> mp.set_lora_scale(net, 0.5)            # half of the update
        >>> y = net(x)
        >>> mp.set_lora_scale(net, 1)              # as trained
    """
    number = check_number("scale", scale)
    if not math.isfinite(number):
        raise ValueError(f"scale must be finite, but got {scale}.")
    found = deltas(net)
    _require_steerable(found)
    if adapters_are_disabled(net):
        raise ValueError("The adapters are switched off by adapters_disabled(): leave the block before you scale them.")
    if number == 0:
        _require_finite(found)
    overflows = [f"{path or type(cell).__name__}: {reason}" for path, cell in found.items()
                 if (reason := cell.overflows(number))]
    if overflows:
        raise ValueError(f"scale {scale} is too large for this net, whose adapters stay as they are:\n  "
                         + "\n  ".join(overflows[:10])
                         + (f"\n  and {len(overflows) - 10} more" if len(overflows) > 10 else ""))
    for cell in found.values():
        cell.strength = number
        cell.refresh()


@contextlib.contextmanager
def adapters_disabled(net: nn.Cell) -> Iterator[nn.Cell]:
    """Inside the block `net` gives its base's output exactly; afterwards its adapters work as before.

    Base parameters that belong to the adapter (modules_to_save, biases and norms that train) have their base's values
    inside the block, if `mindpet_lite.get_pet_model` or `mindpet_lite.load_adapter` put the adapter in.
    Nothing compiles anew. Blocks may be nested.

    Args:
        net: a net with adapted layers.

    Raises:
        TypeError: `net` is no Cell.
        ValueError: the net has no adapted layer, one of a method that cannot be switched off, or a delta holds NaN or
            infinite values.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> x = Tensor(np.ones((3, 4), np.float32))
        >>> base = net(x)
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> with mp.adapters_disabled(net):
        ...     bool((net(x) == base).all())
        True
    """
    found = deltas(net)
    # What is no cell trains base Parameters: it has no strength, but is switched with them.
    _require_steerable({path: delta for path, delta in found.items() if isinstance(delta, nn.Cell)})
    _require_finite(found)
    changed = [cell for cell in found.values() if cell.enabled]
    _switch(changed, False)
    try:
        yield net
    finally:
        _switch(changed, True)


def adapters_are_disabled(net: nn.Cell) -> bool:
    """Tell whether `net` holds an adapted cell inside an `adapters_disabled` block."""
    return any(not delta.enabled for delta in deltas_in(cells_by_path(net)).values())


def _switch(cells: list[Delta], enabled: bool) -> None:
    for cell in cells:
        cell.enabled = enabled
        cell.refresh()
    for item in saved_of(cells).values():
        item.switch(to_base=not enabled)


def _require_steerable(found: Mapping[str, Delta]) -> None:
    fixed = [f"{path or type(delta).__name__}: {delta.fixed}" for path, delta in found.items() if delta.fixed]
    if fixed:
        raise ValueError("The strength of this adapter cannot change while the net runs:\n  " + listed(fixed))


def _require_finite(found: dict[str, Delta]) -> None:
    broken = [f"{path}.{name}" if path else name for path, cell in found.items()
              for name, parameter in cell.delta_parameters().items()
              if not np.isfinite(parameter.astype(mstype.float32).asnumpy()).all()]
    if broken:
        raise ValueError(f"{', '.join(broken)} holds NaN or infinite values, and 0 times those is not 0: load a "
                         f"sound adapter first.")
