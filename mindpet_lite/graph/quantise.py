"""Hold the weights of linear layers in few bits, and take that back."""
from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from mindspore import Parameter, nn

from mindpet_lite.arguments import did_you_mean, warn_user
from mindpet_lite.delta.base import FLOATS, Delta
from mindpet_lite.delta.delta_config import DeltaConfig, names_of
from mindpet_lite.delta.hosts import QUANTISED, DenseHost, Host, LinearHost, Quantised, host_of, host_refusal
from mindpet_lite.delta.values import FrozenParameter, to_numpy
from mindpet_lite.formats.problems import listed
from mindpet_lite.graph.adapters import deltas_in, saved_of
from mindpet_lite.graph.grams import batch_problems, grams_of
from mindpet_lite.graph.inputs import call
from mindpet_lite.graph.match import targets as named
from mindpet_lite.graph.parameters import STATISTICS
from mindpet_lite.graph.tree import cells_by_path, owners_of_parameters, replace

_PLAIN: tuple[type[Host], ...] = (DenseHost, LinearHost)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Wanted(DeltaConfig):
    """Which layers `quantize_base` means: names as those of `target_modules`, of layers that it can quantise."""

    @classmethod
    def refusal(cls, cell: nn.Cell) -> str | None:
        """Return why `cell` cannot be quantised, or None if it can."""
        if isinstance(cell, Delta):
            return (f"a {type(cell).__name__} has an adapter on it: quantise the base first and adapt it then, or "
                    f"merge() the adapter.")
        if isinstance(cell, Quantised):
            return f"it is {cell.quantised_kind} already: dequantize_base() it first."
        return host_refusal(cell, "quantize_base", _PLAIN)

    @classmethod
    def is_linear(cls, cell: nn.Cell) -> bool:
        """Tell whether ``"all-linear"`` means this cell."""
        return host_of(cell) in _PLAIN and not isinstance(cell, Delta)


def quantize_base(net: nn.Cell, kind: str, targets: str | Sequence[str] = "all-linear",
                  batches: Iterable[Any] | None = None, forward: Callable[[nn.Cell, Any], Any] | None = None
                  ) -> nn.Cell:
    """Hold the weights of linear layers in 8 or 4 bits, in place; methods that need no other weight then train on them.

    ======  =======================================================================  ==============  ==============
    kind    what a weight becomes                                                    bits a weight   layer
    ======  =======================================================================  ==============  ==============
    int8    int8 times one float32 for each output                                   8.02            `Int8Dense`
    q8_0    int8 times one float16 for each 32 inputs, as in GGUF's files            8.5             `Q8Dense`
    nf4     one of 16 numbers times a scale for each 64, which is quantised itself   4.13            `NF4Dense`
    ======  =======================================================================  ==============  ==============

    A quantised layer stands where the plain one stood, with its bias, activation, training mode and `to_float`. Its
    `weight` has the old name and holds codes; the other Parameters stand beside it (`weight_scale`, ...: see
    `mindpet_lite.formats.quantised.parts_of`). None of them trains. MindSpore's `save_checkpoint` saves them, and
    `load_checkpoint` loads them into a net that was quantised so; its numbers do not count, so that it can be made
    under `mindspore.nn.utils.no_init_parameters()`.

    Then call `mindpet_lite.get_pet_model` as ever. `merge` makes quantised layers plain again, in the type that
    they had. While this function works, both forms of the weights are in memory.

    With `batches`, codes are chosen so that what each layer gives changes least on what it is given there (GPTQ,
    Frantar et al., 2022, https://arxiv.org/abs/2210.17323); scales, types and sizes stay the same. A layer needs more
    rows than it has inputs, of the kind that the net will see. The net runs on the batches in evaluation and PyNative
    mode, which is slow with each new shape; for each layer inputs² float32 are in memory then.

    All nets of the process compile again at their next call.

    Args:
        net: it is changed in place and returned.
        kind: one of the table.
        targets: which layers, spelt as `target_modules` of `mindpet_lite.LoraConfig`; they must be nn.Dense or
            mint.nn.Linear. ``"all-linear"`` means all but the output head. Default: "all-linear".
        batches: each a tuple or list of the net's arguments, a mapping of them by name, or one argument. In a mapping,
            places whose "attention_mask" is 0 do not count. Default: None, each number takes the nearest code.
        forward: what runs the net on a batch, `forward(net, batch)`, for batches of another form. Default: None.

    Returns:
        `net`.

    Raises:
        TypeError: `net` is no Cell, `kind` no text, or `targets` no names.
        ValueError: the kind is unknown; a name means no layer; or a layer cannot be quantised: it is another kind of
            layer, quantised or adapted already, its weight trains, is shared with another layer, or holds NaN or
            infinite numbers. All problems stand in one message. Or, with `batches`, there is none, a layer is given
            nothing, or NaN or infinite values, or this is a distributed job, where each process would see other data.
            The net is unchanged.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(64, 64), nn.ReLU(), nn.Dense(64, 2))
        >>> net = mp.quantize_base(net, "nf4", ["0"])
        >>> net = mp.get_pet_model(net, mp.LoraConfig(lora_rank=2, lora_alpha=4, target_modules=["0"]))
        >>> net[0].weight.dtype, net[0].weight.shape
        (mindspore.uint8, (2048,))
    """
    if not isinstance(kind, str):
        raise TypeError(f"kind must be one of {', '.join(QUANTISED)}, but got {kind!r:.100}.")
    if kind not in QUANTISED:
        raise ValueError(f"kind must be one of {', '.join(QUANTISED)}, but got {kind!r:.100}."
                         f"{did_you_mean(kind, QUANTISED)}")
    cells = cells_by_path(net)
    chosen, problems = named(cells, _Wanted(target_modules=_names(targets)))
    problems = [item.replace("target_modules", "targets") for item in problems]
    problems += [f"{path or 'the net itself'}: {reason}" for path, reason in _weight_problems(net, cells, chosen)]
    if "" in chosen:
        problems.append("the net itself is the layer to quantise, and it cannot be replaced in place: put it into a "
                        "cell, such as nn.SequentialCell(net).")
    problems += batch_problems(chosen, batches, forward)
    grams = grams_of(net, chosen, batches, forward or call) if batches is not None and not problems else {}
    swaps: dict[nn.Cell, nn.Cell] = {}
    for path, cell in chosen.items() if not problems else ():
        try:
            swaps[cell] = QUANTISED[kind].of(cell, next(host for host in _PLAIN if host.matches(cell)),
                                             grams.pop(path, None))
        except ValueError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise ValueError("quantize_base does not fit the net, which is unchanged:\n  " + listed(problems))
    replace(net, swaps)
    chosen.clear()
    swaps.clear()
    cells.clear()
    _give_back()
    return net


def dequantize_base(net: nn.Cell, targets: str | Sequence[str] | None = None) -> nn.Cell:
    """Undo `quantize_base` in place: plain layers, in the type they had, with the numbers that the codes mean.

    What rounding lost does not come back: load the base's checkpoint for that, by the names that the weights have
    again. All nets of the process compile again at their next call.

    Args:
        net: it is changed in place and returned.
        targets: which layers, as in `quantize_base`; all quantised ones without it. Default: None.

    Returns:
        `net`.

    Raises:
        TypeError: `net` is no Cell, or `targets` no names.
        ValueError: there is nothing quantised; a name means no quantised layer; or a layer has an adapter on it, which
            `merge` takes along. The net is unchanged.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(64, 64), nn.ReLU(), nn.Dense(64, 2))
        >>> net = mp.quantize_base(net, "int8", ["0"])
        >>> net = mp.dequantize_base(net)
        >>> net[0].weight.dtype, net[0].weight.shape
        (mindspore.float32, (64, 64))
    """
    cells = cells_by_path(net)
    if targets is None:
        chosen, problems = {path: cell for path, cell in cells.items() if isinstance(cell, Quantised)}, []
        problems = [f"{path}: {_Quantised.refusal(cell)}" for path, cell in chosen.items() if isinstance(cell, Delta)]
        if not chosen:
            raise ValueError("There is nothing to dequantise: no layer of this net is quantised.")
    else:
        chosen, problems = named(cells, _Quantised(target_modules=_names(targets)))
        problems = [item.replace("target_modules", "targets") for item in problems]
    if "" in chosen:
        problems.append("the net itself is the quantised layer, and it cannot be replaced in place: put it into a "
                        "cell, such as nn.SequentialCell(net).")
    if problems:
        raise ValueError("dequantize_base does not fit the net, which is unchanged:\n  " + listed(problems))
    replace(net, {cell: cell.full(cell.full_parameter(cell.weight_numbers())) for cell in chosen.values()})
    return net


class _Quantised(_Wanted):
    """Which layers `dequantize_base` means."""

    @classmethod
    def refusal(cls, cell: nn.Cell) -> str | None:
        """Return why `cell` cannot be dequantised, or None if it can."""
        if isinstance(cell, Delta):
            return f"a {type(cell).__name__} has an adapter on it: merge() makes the layer plain with it."
        return None if isinstance(cell, Quantised) else f"a {type(cell).__name__} is not quantised."

    @classmethod
    def is_linear(cls, cell: nn.Cell) -> bool:
        """Tell whether ``"all-linear"`` means this cell."""
        return isinstance(cell, Quantised) and not isinstance(cell, Delta)


def _give_back() -> None:
    """Let go of the old weights, and give their memory back to the system."""
    # Cells refer to each other in circles, so that they would stay until the collector's next turn.
    gc.collect()
    # What was freed between Parameters that stay would be kept by the process; only glibc has such a call.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _names(targets: str | Sequence[str]) -> str | tuple[str, ...] | None:
    """Return `targets` as a config takes them.

    Raises:
        TypeError: they are no names.
    """
    found = names_of("targets", targets, allow_text=True)
    if found is None:
        raise TypeError("targets must be a non-empty string or a non-empty list of strings, but got None.")
    return found


def _weight_problems(net: nn.Cell, cells: Mapping[str, nn.Cell], chosen: Mapping[str, nn.Cell]
                     ) -> Iterable[tuple[str, str]]:
    """Yield each layer whose weight cannot be quantised, and why."""
    owners = {id(item): places for item, places in owners_of_parameters(net)}
    saved = saved_of(deltas_in(cells).values())
    is_partly_frozen = any(not item.requires_grad and item.dtype in FLOATS and not isinstance(item, FrozenParameter)
                           and not places[0][0].endswith(STATISTICS) for item, places in owners_of_parameters(net))
    for path, cell in chosen.items():
        weight = cell.weight
        others = [place for place, owner in owners[id(weight)] if owner is not cell]
        if others:
            yield path, f"its weight is that of {others[0]} too (tied weights): give each a weight of its own, or " \
                        f"leave it out."
        elif id(weight) in saved or weight.requires_grad and is_partly_frozen:
            yield path, f"{weight.name} trains, which a quantised weight cannot: freeze it first " \
                        f"({weight.name}.requires_grad = False), or leave it out."
        elif not weight.has_init and not _is_finite(weight):
            yield path, f"{weight.name} holds NaN or infinite numbers, which have no place on a scale."


def _is_finite(weight: Parameter) -> bool:
    values = to_numpy(weight)
    # Infinity and NaN stay what they are in extremes, which take no memory of the weight's size.
    return bool(np.isfinite(values.max(initial=0)) and np.isfinite(values.min(initial=0)))


def quantised_in(cells: Mapping[str, nn.Cell]) -> dict[str, Quantised]:
    """Return the quantised layers of a net of these cells, adapted or not, by path."""
    return {path: cell for path, cell in cells.items() if isinstance(cell, Quantised)}


def let_go(cell: nn.Cell) -> None:
    """Let a quantised layer that takes its place again after a merge let go of the merged weight."""
    if isinstance(cell, Quantised):
        cell.let_go()


def described(layers: Mapping[str, Quantised]) -> str:
    """Return how many layers are of which kind, what they take in memory, and what rounding changed."""
    kinds = [cell.quantised_kind for cell in layers.values()]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    own = {id(cell): cell for cell in layers.values()}
    size = sum(getattr(cell, name).nbytes for cell in own.values() for name in cell.base_names if name != "bias")
    before = sum(cell.out_channels * cell.in_channels * np.dtype(np.float32).itemsize for cell in own.values())
    return (f"{counts}: {size / 1e6:.1f} MB of weights, {size / before:.3f} of float32; "
            f"rounding changed {worst(layers)}")


def worst(layers: Mapping[str, Quantised]) -> str:
    """Return the largest error among quantised layers, as a share of its weight's norm, and where it is."""
    errors = {path: float(cell.weight_error.asnumpy()) for path, cell in layers.items()}
    path = max(errors, key=lambda item: errors[item])
    return f"{errors[path]:.2%} of a weight at most, at {path}"


def tell_of_merge(layers: Mapping[str, Quantised]) -> None:
    """Say what a merge of adapters on quantised layers means."""
    if layers:
        warn_user(f"merge() makes {len(layers)} quantised layers plain. With the adapter they compute as before, but "
                  f"not as the base before quantize_base() would with it: rounding changed {worst(layers)}. To merge "
                  f"into that base, load the adapter into it.")
