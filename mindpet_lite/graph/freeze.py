"""Which parameters train: MindPet's `freeze_delta`, `freeze_modules` and `freeze_from_config`, made dependable."""
from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

from mindspore import Parameter, nn

from mindpet_lite.arguments import WrongArgumentError, did_you_mean
from mindpet_lite.delta import METHODS
from mindpet_lite.delta.base import FLOATS, Delta
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.graph.match import check_patterns, selector, wildcard
from mindpet_lite.graph.parameters import apply_trains, net_parameters
from mindpet_lite.graph.put_in import put_in
from mindpet_lite.graph.tree import cells_by_path, require_cell, without_inner
from mindpet_lite.yaml_files import read_freeze

# The method of each mode of freeze_delta.
FREEZE_MODES = {mode: kind for name, kind in METHODS.items() for mode in (name, *kind.other_names)}


@dataclasses.dataclass(frozen=True)
class TrainableReport:
    """How many elements of a net train; `print` gives one line in PEFT's form.

    Args:
        trainable: elements that train.
        total: all elements of the net.

    Examples:
        >>> import mindpet_lite as mp
        >>> report = mp.TrainableReport(trainable=8, total=50)
        >>> print(report)
        trainable params: 8 || all params: 50 || trainable%: 16.0000
    """

    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Trainable elements in percent of all."""
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return (f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
                f"trainable%: {self.share:.4f}")


def count(net: nn.Cell) -> TrainableReport:
    """Count the elements of a net: those that train, and all."""
    sizes = [(math.prod(parameter.shape), parameter.requires_grad) for parameter, _ in net_parameters(net)]
    return TrainableReport(sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes))


def freeze_modules(model: nn.Cell, include: Sequence[str] | None = None,
                   exclude: Sequence[str] | None = None) -> TrainableReport:
    """Freeze the parameters that `include` names and thaw those that `exclude` names; leave the rest as they are.

    A parameter that both name is left as it is.

    Args:
        model: any Cell.
        include: patterns of parameters to freeze. `*` stands for any text, every other character for itself; a
            pattern must match the whole path of a parameter, or its `Parameter.name` where that differs. Default: None.
        exclude: patterns of parameters to make trainable. Default: None.

    Returns:
        How many elements train now.

    Raises:
        TypeError: `model` is no Cell, or a list is no list of strings.
        ValueError: neither list is given, a list is empty, or a pattern matches nothing. The net is unchanged.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> mp.freeze_modules(net, include=["0.*"]).trainable
        18
        >>> [item.name for item in net.trainable_params()]
        ['2.weight', '2.bias']
    """
    require_cell(model)
    if include is None and exclude is None:
        raise ValueError("freeze_modules needs include, exclude or both: lists of patterns such as ['*embedding*'].")
    parameters = net_parameters(model)
    apply_trains(model, parameters, with_lists(parameters, [p.requires_grad for p, _ in parameters],
                                             ("include", include), ("exclude", exclude)))
    return count(model)


def freeze_delta(model: nn.Cell, mode: str, include: Sequence[str] | None = None,
                 exclude: Sequence[str] | None = None) -> TrainableReport:
    """Freeze everything but the parameters of one method; then apply the two lists as `freeze_modules` does.

    The result does not depend on what was frozen before. Call it before the optimizer is made.

    Args:
        model: any Cell.
        mode: 'lora', 'prefixtuning' (or 'prefix'), 'adapter', 'low_rank_adapter', 'ptuning2' or 'bitfit', in any case.
        include: patterns of parameters to freeze besides. Default: None.
        exclude: patterns of parameters to train besides, such as ``['*classifier*']``. Default: None.

    Returns:
        How many elements train now.

    Raises:
        TypeError: `model` is no Cell, `mode` is no string, or a list is no list of strings.
        ValueError: the mode is unknown or leaves nothing trainable; a list is empty; a pattern matches nothing. The
            net is unchanged.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(mp.LoRADense(4, 8, 2, 4), nn.Dense(8, 2))
        >>> print(mp.freeze_delta(net, "lora", exclude=["1.*"]))        # the head trains too
        trainable params: 42 || all params: 82 || trainable%: 51.2195
    """
    require_cell(model)
    if not isinstance(mode, str):
        raise WrongArgumentError(f"mode must be one of {', '.join(FREEZE_MODES)}, but got {mode!r:.100}.")
    if mode.lower() not in FREEZE_MODES:
        raise ValueError(f"mode must be one of {', '.join(FREEZE_MODES)}, but got {mode!r:.100}."
                         f"{did_you_mean(mode, FREEZE_MODES)}")
    kind = FREEZE_MODES[mode.lower()]
    cells, parameters = cells_by_path(model), net_parameters(model)
    trains = _trained_by(kind, cells, parameters)
    if not any(trains):
        present = [name for name, other in FREEZE_MODES.items() if any(_trained_by(other, cells, parameters))]
        raise ValueError(f"mode {mode!r} leaves nothing trainable: the net has no parameter "
                         f"{kind.trained_pattern()!r}. " + (
            f"Modes that fit this net: {', '.join(present)}." if present else
            "Adapt the net first, with get_pet_model() or layers such as LoRADense."))
    trains = with_lists(parameters, trains, ("include", include), ("exclude", exclude))
    if not any(trains):
        raise ValueError(f"mode {mode!r} with include {include!r} leaves nothing trainable: narrow the include list.")
    apply_trains(model, parameters, trains)
    if kind.adds_nothing:
        put_in(model, cells, {path: delta for path, delta in _selected_by(kind, cells).items()
                              if any(item.requires_grad for item in delta.delta_parameters().values())}, {}, (), {}, {})
    return count(model)


def _trained_by(kind: type[DeltaConfig], cells: Mapping[str, nn.Cell],
                parameters: list[tuple[Parameter, list[str]]]) -> list[bool]:
    """Return for each Parameter whether it is one that a method trains."""
    if kind.adds_nothing:
        own = {id(item) for delta in _selected_by(kind, cells).values() for item in delta.delta_parameters().values()}
        return [id(item) in own for item, _ in parameters]
    expression = wildcard(kind.trained_pattern())
    return [any(expression.fullmatch(name) for name in names) for _, names in parameters]


def _selected_by(kind: type[DeltaConfig], cells: Mapping[str, nn.Cell]) -> dict[str, Delta]:
    """Return what a method that adds nothing can train in a net, by the first path of each layer."""
    first = {id(cell): path for path, cell in reversed(without_inner(cells).items())}
    return {path: kind().adapt(cells[path]) for path in cells if first.get(id(cells[path])) == path
            and kind.is_meant(cells[path])}


def freeze_from_config(model: nn.Cell, config_path: str | os.PathLike[str]) -> TrainableReport:
    """Apply the `freeze` block of a YAML file as `freeze_modules` does.

    ```yaml
    freeze:
      include: ['*embedding*']     # either list may be left out
      exclude: ['*lora*']
    ```

    Args:
        model: any Cell.
        config_path: a YAML file with a `freeze` block; other blocks do not matter.

    Raises:
        FileNotFoundError, ValueError, TypeError: the file is missing, is no YAML, has no such block or an unknown key
            in it; or as `freeze_modules`. The net is unchanged.

    Examples:
        >>> from pathlib import Path
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> _ = Path("freeze.yaml").write_text("freeze: {include: ['*weight'], exclude: ['*bias']}")
        >>> print(mp.freeze_from_config(net, "freeze.yaml"))
        trainable params: 10 || all params: 58 || trainable%: 17.2414
    """
    require_cell(model)
    if not config_path:
        raise WrongArgumentError(f"config_path must be the path of a YAML file, but got {config_path!r:.100}.")
    include, exclude = read_freeze(config_path)
    return freeze_modules(model, include, exclude)


def with_lists(parameters: list[tuple[Parameter, list[str]]], trains: list[bool],
               include: tuple[str, Sequence[str] | None], exclude: tuple[str, Sequence[str] | None]) -> list[bool]:
    """Return `trains` after the two lists: named by one of them changes it, named by both or none does not.

    Args:
        parameters: as `net_parameters` lists them.
        trains: for each of them whether it trains.
        include: the name of the argument, for messages, and the patterns of what to freeze.
        exclude: the same for what to train.
    """
    for field, patterns in (include, exclude):
        if patterns is not None and not check_patterns(field, patterns):
            raise WrongArgumentError(f"{field} is an empty list: leave it out, or name parameters such as "
                                     f"['*embedding*'].")
    names = [spellings for _, spellings in parameters]
    frozen, unfrozen = selector(*include, names), selector(*exclude, names)
    can_train = [item.dtype in FLOATS for item, _ in parameters]
    for pattern in exclude[1] or ():
        hits = selector(exclude[0], [pattern], names)
        if not any(can_train[index] for index in range(len(names)) if hits(index)):
            first = next(item for index, (item, _) in enumerate(parameters) if hits(index))
            raise ValueError(f"{exclude[0]} pattern {pattern!r:.100} names {first.name}, whose type {first.dtype} "
                             f"cannot train.")
    return [unfrozen(index) and can_train[index] if frozen(index) != unfrozen(index) else old
            for index, old in enumerate(trains)]
