"""Fold the deltas into the base weights, and take them out again bit for bit."""
from __future__ import annotations

import dataclasses

import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore import dtype as mstype

from mindpet_lite.arguments import some_of, warn_user
from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.values import set_value
from mindpet_lite.formats.problems import listed
from mindpet_lite.graph.adapters import adapters_of, bring_up_to_date, deltas, deltas_in, select
from mindpet_lite.graph.base_hash import parameter_hash
from mindpet_lite.graph.quantise import let_go, quantised_in, tell_of_merge
from mindpet_lite.graph.saved_parameter import copy_of
from mindpet_lite.graph.strength import adapters_are_disabled
from mindpet_lite.graph.tree import cells_by_path, owners_of_parameters, replace

# Where a merged layer keeps what `unmerge` puts back: an attribute, so that it lives and is copied with the layer.
_KEPT = "mindpet_kept_for_unmerge"


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A layer from before the merge: its cell, the base values (subtracting would change some), and what trained.

    `selected` is the delta of a method that adds nothing to the cell. `merged` are the hashes of the merged values.
    """

    cell: nn.Cell
    selected: Delta | None
    values: tuple[tuple[Parameter, Tensor], ...]
    trained: tuple[Parameter, ...]
    merged: tuple[str, ...] = ()


def merge(net: nn.Cell) -> nn.Cell:
    """Replace every adapted layer by a plain one whose weight holds the delta, in place.

    The merged net has the base's layers and parameter names and needs this package no more, except where a layer had a
    `compute_dtype` of its own: there stands a subclass of the plain layer, which computes in it too. The strength set
    by `set_lora_scale` goes in. What was there before is kept on the layers for `unmerge`; to free that memory,
    save the merged net and load it into a fresh one.

    A quantised layer (`mindpet_lite.quantize_base`) becomes a plain one in the type that its weight had. A
    warning says how much rounding had changed the weights.

    All nets of the process compile again at their next call.

    Args:
        net: a net with adapted layers. If it is an adapted layer itself, the plain layer is returned.

    Returns:
        `net`, or the plain layer that takes its place.

    Raises:
        TypeError: `net` is no Cell.
        ValueError: there is nothing to merge, a method cannot be merged, the adapters are switched off, or a merged
            weight would not be finite. So are tied weights: a weight that another layer of the net uses too, which
            merged would change that layer; and one of which the adapter saves one place alone, because a fresh net,
            where both are one, would read the merged net's checkpoint wrongly. The net is unchanged.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> net = mp.merge(net)
        >>> type(net[0]).__name__, [item.name for item in net.get_parameters()]
        ('Dense', ['0.weight', '0.bias', '2.weight', '2.bias'])
    """
    try:
        return _merge(net)
    except ValueError:
        # What quantised layers had made for it.
        for cell in quantised_in(cells_by_path(net)).values():
            let_go(cell)
        raise


def _merge(net: nn.Cell) -> nn.Cell:
    """Merge as :func:`merge` says; after an error quantised layers may hold merged weights."""
    found = deltas(net)
    fixed = [f"{path or type(delta).__name__}: {delta.unmergeable}" for path, delta in found.items()
             if delta.unmergeable]
    if fixed:
        raise ValueError("This adapter cannot be merged. The net is unchanged:\n  " + listed(fixed))
    if adapters_are_disabled(net):
        raise ValueError("merge() inside adapters_disabled() would merge nothing: leave the block first.")
    merged = {path: delta.merged_value() for path, delta in found.items()}
    broken = [path or parameter.name for path, values in merged.items() for parameter, value in values.items()
              if not np.isfinite(value.astype(mstype.float32).asnumpy()).all()]
    if broken:
        raise ValueError(f"Merging would put NaN or infinite values into {', '.join(broken)}: a delta or base weight "
                         f"is not finite, or does not fit the weight's type. The net is unchanged.")
    owners = {id(parameter): places for parameter, places in owners_of_parameters(net)}
    tied = [f"{path}: {parameter.name} is used at {place} too." for path, values in merged.items()
            for parameter in values for place, cell in owners.get(id(parameter), ())
            if cell is not found[path] and not _follows(cell)]
    if tied:
        raise ValueError("Merging would change other layers that use the same weight. The net is unchanged: use it "
                         "unmerged, or give each layer a weight of its own first.\n  " + listed(tied))
    records = adapters_of(found.values())
    parted = [f"{path} was one weight with {other}." for record in records for path, other in record.untied.items()]
    if parted:
        raise ValueError("The adapter has values for one of several layers with one weight (tied weights), which each "
                         "have a weight of their own in this net. A checkpoint of the merged net would be read wrongly "
                         "by a net in which they are one. The net is unchanged: use it unmerged and save_adapter(net), "
                         "which a tied net loads rightly; or name all the layers in modules_to_save; or adapt a net "
                         "in which they are not tied.\n  " + listed(parted))
    for delta in found.values():
        if delta.start is not None:
            delta.start.unwatch()
    for record in records:
        record.unwatch(delta for delta in found.values() if delta.adapter is record)
    cells = cells_by_path(net)
    swaps = {}
    followers = {path: cell for path, cell in cells.items() if isinstance(cell, Delta) and cell.follows}
    for path, delta in {**found, **followers}.items():
        kept = _Kept(cells[path], None if isinstance(delta, nn.Cell) else delta,
                     # The weight that takes a quantised one's place is new.
                     tuple((parameter, copy_of(parameter)) for parameter in merged.get(path, {})
                           if id(parameter) in owners),
                     tuple(item for item in delta.delta_parameters().values() if item.requires_grad))
        for parameter, value in merged.get(path, {}).items():
            set_value(parameter, value)
        kept = dataclasses.replace(kept, merged=tuple(parameter_hash(parameter) for parameter, _ in kept.values))
        for parameter in kept.trained:
            parameter.requires_grad = False
        select(cells[path], None)
        swaps[cells[path]] = delta.merged_cell()
        setattr(swaps[cells[path]], _KEPT, kept)
    tell_of_merge({path: cell for path, cell in quantised_in(cells).items() if cell in swaps})
    return _swap(net, swaps)


def unmerge(net: nn.Cell) -> nn.Cell:
    """Undo `merge`: put back the adapted layers and the base weights, bit for bit, in place.

    Training mode, precision, recomputation and hooks are those that the net has now. Weights that changed since the
    merge are put back too, with a warning. All nets of the process compile again at their next call.

    Args:
        net: a net that `merge` changed, or the plain layer it returned.

    Returns:
        `net`, or the adapted layer that takes its place.

    Raises:
        TypeError: `net` is no Cell.
        ValueError: nothing in the net was merged.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> net = mp.unmerge(mp.merge(net))
        >>> type(net[0]).__name__
        'LoRADense'
    """
    merged = {cell: vars(cell)[_KEPT] for cell in cells_by_path(net).values() if _KEPT in vars(cell)}
    if not merged:
        raise ValueError("There is nothing to unmerge: no layer of this net was merged by merge().")
    others = [parameter.name for kept in merged.values() for (parameter, _), value in zip(kept.values, kept.merged)
              if parameter_hash(parameter) != value]
    if others:
        warn_user(f"{some_of(others, 3)} changed since merge(), by training or because another base was loaded: "
                  f"unmerge() puts back the values from before. To have the adapter on another base, load the base "
                  f"after unmerge().")
    for cell, kept in merged.items():
        for parameter, value in kept.values:
            set_value(parameter, value)
        for parameter in kept.trained:
            parameter.requires_grad = True
        delattr(cell, _KEPT)
        select(kept.cell, kept.selected)
        let_go(kept.cell)
        _hand_over(cell, kept.cell)
    net = _swap(net, {cell: kept.cell for cell, kept in merged.items()})
    bring_up_to_date(deltas_in(cells_by_path(net)))
    return net


def _follows(cell: nn.Cell) -> bool:
    """Tell whether a layer follows the delta of another, whose weight it has: merged, that changes both rightly."""
    return isinstance(cell, Delta) and cell.follows


def _hand_over(plain: nn.Cell, adapted: nn.Cell) -> None:
    """Give an adapted layer the mode and flags that were set on its plain layer, such as those of `to_float`."""
    if plain is not adapted:
        adapted.set_train(plain.training)
        adapted.set_grad(plain.requires_grad)
        adapted.add_flags_recursive(**plain.get_flags())
        # A plain layer with types of its own keeps the one of to_float() so.
        if getattr(plain, "float_type", None) is not None:
            adapted.to_float(plain.float_type)


def _swap(net: nn.Cell, swaps: dict[nn.Cell, nn.Cell]) -> nn.Cell:
    replace(net, {old: new for old, new in swaps.items() if new is not old})
    return swaps.get(net, net)
