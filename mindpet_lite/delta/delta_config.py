"""Which layers a method adapts, and how: the base of every method's config (`DeltaConfig`)."""
from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from mindspore import Parameter, nn

from mindpet_lite.arguments import check_bool, did_you_mean
from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.hosts import is_linear
from mindpet_lite.delta.inherited_docs import inherit_args
from mindpet_lite.delta.spelling import TASK_TYPES, Spelled
from mindpet_lite.formats.peft_method import PeftMethod
from mindpet_lite.names.default_targets import Family
from mindpet_lite.names.expressions import compile_end


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaConfig(metaclass=Spelled):
    """Which layers a method adapts and how; the base of every method's config.

    PEFT's spellings are understood too: ``LoraConfig(r=8, task_type="CAUSAL_LM", inference_mode=False)``.

    Args:
        target_modules: a regular expression that must match a layer's whole path, a list of names (each equal to a
            path or to its last parts), or ``"all-linear"``. An expression that matches no whole path, but some layer's
            own name (the last part of its path), is matched from the start of the own names, as MindFormers does.
            Default: None.
        exclude_modules: layers left alone among those, spelt likewise. A name in a list stands for all layers below it
            too, and an entry that is no name for own names, as MindFormers' `exclude_layers`. Default: None.
        modules_to_save: names of modules, spelt as a list in `target_modules`, that train whole and are written to
            adapter files with the deltas, such as a new head. Default: None.
        layers_to_transform: numbers of the blocks, from 0, whose layers are adapted, where `target_modules` is a list;
            all without it. An entry that equals a layer's whole path is adapted whatever its number. Default: None.
        layers_pattern: the names of the lists of blocks, such as ``"layers"``, whose numbers are meant; without it the
            first number after a name in a path (as PEFT). Default: None.
        freeze_include: patterns (`*` matches anything) of parameters to freeze. Everything but the deltas is frozen
            without it; what both lists name is left alone, as in `freeze_delta`. Default: None.
        freeze_exclude: patterns of parameters that train together with the deltas. Default: None.
        task_type: PEFT's name of the task, which is written to adapter files: SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM,
            TOKEN_CLS, QUESTION_ANS or FEATURE_EXTRACTION. PEFT picks the class of the model by it. (PEFT saves a
            classifier by it as well; here `modules_to_save` names one.) Default: None.
        base_model_name_or_path: the name or path of the base model, likewise: PEFT's `AutoPeftModel` loads it.
            Default: None.
        inference_mode: True: nothing trains: the deltas are frozen too. Default: False.
    """

    pet_type: ClassVar[str]
    # What else `freeze_delta` may call it.
    other_names: ClassVar[tuple[str, ...]] = ()
    # How PEFT's files hold it; None where they cannot, or (LoRA) where the formats know it themselves.
    peft: ClassVar[PeftMethod | None] = None
    # Without target_modules every layer that the method can adapt is meant.
    all_by_default: ClassVar[bool] = False
    # Several adapters of the method can stand side by side on one layer, see `bank`.
    holds_several: ClassVar[bool] = False
    # The method trains Parameters that the net has; `adapt` gives a delta that is no cell.
    adds_nothing: ClassVar[bool] = False
    # Fields for the one layer that settings are made for: private, without the ``_`` in files. `for_layer` sets them.
    of_one_layer: ClassVar[tuple[str, ...]] = ()

    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    freeze_include: tuple[str, ...] | None = None
    freeze_exclude: tuple[str, ...] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        inherit_args(cls)

    def __post_init__(self) -> None:
        if self.task_type is not None:
            # PEFT's TaskType is a text as well.
            task = str(getattr(self.task_type, "value", self.task_type))
            if task not in TASK_TYPES:
                raise ValueError(f"task_type must be one of {', '.join(TASK_TYPES)}, but got {task!r:.100}."
                                 f"{did_you_mean(task, TASK_TYPES)}")
            object.__setattr__(self, "task_type", task)
        name = self.base_model_name_or_path
        if name is not None and not isinstance(name, (str, os.PathLike)):
            raise TypeError(f"base_model_name_or_path must be a name or a path, but got {name!r:.100}.")
        object.__setattr__(self, "base_model_name_or_path", name if name is None else os.fspath(name))
        check_bool("inference_mode", self.inference_mode)
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, names_of(name, getattr(self, name), allow_text=True))
        for name in ("modules_to_save", "freeze_include", "freeze_exclude"):
            object.__setattr__(self, name, names_of(name, getattr(self, name), allow_text=False))
        object.__setattr__(self, "layers_to_transform", _numbers("layers_to_transform", self.layers_to_transform))
        pattern = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        object.__setattr__(self, "layers_pattern", names_of("layers_pattern", pattern or None, allow_text=False))
        for name in self.layers_pattern or ():
            end_expression("layers_pattern", name)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where block numbers stand, but layers_to_transform gives none.")
        if self.layers_to_transform is not None and not isinstance(self.target_modules, tuple):
            raise ValueError("layers_to_transform needs target_modules as a list of names; a regular expression can "
                             "name the blocks itself.")

    @classmethod
    def of_layer(cls, settings: Mapping[str, Any], **more: Any) -> Any:
        """Return the config of one layer with what `Delta.settings` said of it, as files hold it, and more fields."""
        return cls(**{f"_{name}" if name in cls.of_one_layer else name: item for name, item in settings.items()},
                   **more)

    def told(self) -> dict[str, str]:
        """Return what the user said of the adapter for other tools, by PEFT's names of the fields."""
        return {name: value for name in ("task_type", "base_model_name_or_path")
                if (value := getattr(self, name)) is not None}

    def trains_base(self, name: str, of_adapted_layer: bool) -> bool:
        """Tell whether a base Parameter of this attribute name trains together with the deltas."""
        return False

    @classmethod
    def default_paths(cls, cells: Mapping[str, nn.Cell]) -> list[str]:
        """Return the paths of the layers that are meant where `target_modules` names none.

        Args:
            cells: of the net, by path.

        Raises:
            ValueError: the method needs `target_modules`, or the net does not tell.
        """
        if not cls.all_by_default:
            raise ValueError("target_modules is missing: give a regular expression, a list of names or 'all-linear'.")
        return [path for path, cell in cells.items() if cls.is_meant(cell)]

    @classmethod
    def default_fields(cls, family: Family) -> dict[str, tuple[str, ...]]:
        """Return the fields that name the layers PEFT adapts in a family of models; none where it has no default."""
        return {}

    def more_targets(self, cells: Mapping[str, nn.Cell]) -> dict[str, nn.Cell]:
        """Return the layers that are adapted besides those that `target_modules` names; raise ValueError for none."""
        return {}

    @classmethod
    def split_axes(cls, cell: nn.Cell) -> Mapping[str, int]:
        """Return, by the names of what trains on `cell`, of what each process has a part: along which axis."""
        return {}

    def unhit(self, adapted: Iterable[str]) -> list[str]:
        """Return a sentence for each part of the settings that means none of the layers at these paths, one at least.

        Args:
            adapted: the paths.
        """
        return []

    def for_layer(self, path: str) -> DeltaConfig:
        """Return the settings for the layer at `path`, where they are not the same for all layers."""
        return self

    @classmethod
    def trained_pattern(cls) -> str:
        """Return the pattern (`*` is any text) of the parameters that `freeze_delta` leaves trainable."""
        return f"*mindpet_delta_{cls.pet_type}*"

    @classmethod
    def refusal(cls, cell: nn.Cell) -> str | None:
        """Return why `cell` cannot be adapted by this method, or None if it can."""
        raise NotImplementedError(f"{cls.__name__} adapts no layer.")

    def refuses(self, cell: nn.Cell) -> str | None:
        """Return why these settings of a layer cannot be those of `cell`, or None if they can."""
        return self.refusal(cell)

    @property
    def replication(self) -> list[list[int]]:
        """Return the ranges of layers that the net is to have, see `graph.replicate`; none where it stays as it is."""
        return []

    @property
    def keeps_ties(self) -> bool:
        """Tell whether a weight that several layers use stays one where modules_to_save names one of them alone."""
        return False

    @property
    def has_other_targets(self) -> bool:
        """Tell whether `more_targets` names layers, so that `target_modules` need not."""
        return False

    @classmethod
    def is_meant(cls, cell: nn.Cell) -> bool:
        """Tell whether `cell` is meant where there are no target_modules and `all_by_default` says that all are."""
        return cls.refusal(cell) is None

    @classmethod
    def refusal_in(cls, path: str, cells: Mapping[str, nn.Cell]) -> str | None:
        """Return why the layer at `path` cannot be adapted in a net of these cells, or None if it can."""
        return None

    @classmethod
    def share(cls, layers: Mapping[str, tuple[nn.Cell, Any]], given: Mapping[str, np.ndarray]) -> dict[str, Parameter]:
        """Return the Parameters that the layers of one adapter share, by name; nothing where they share none.

        Args:
            layers: by path each layer, plain or adapted, with its own settings.
            given: the values that a file, or the net's layers of the method, have for them already, by name.

        Raises:
            ValueError: the layers cannot share them, or what is given does not fit.
        """
        return {}

    def beside(self, present: Iterable[Delta]) -> list[str]:
        """Return a sentence for each reason why layers of these settings cannot share what present ones share.

        Args:
            present: the layers of the method that the net has already.
        """
        return []

    def holding(self, shared: Mapping[str, Parameter]) -> DeltaConfig:
        """Return the settings with what `share` made, for `adapt`."""
        return self

    def adapt(self, cell: nn.Cell) -> Delta:
        """Return the adapted cell built on the Parameter objects of `cell`, which stays as it is."""
        raise NotImplementedError(f"{type(self).__name__} adapts no layer.")

    def adds_up(self) -> bool:
        """Tell whether adapters with these settings add up with others of the method."""
        return self.holds_several and not self.modules_to_save

    @classmethod
    def bank(cls, layer: nn.Cell, name: str) -> Any:
        """Return a layer that can hold several adapters, in the place of a plain one or one with the adapter `name`.

        Raises:
            ValueError: adapters of the method, or with these settings, do not add up; they take turns.
        """
        raise ValueError(f"adapters of the method {cls.pet_type} do not add up.")

    def shapes(self, cell: nn.Cell) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what these settings train on `cell`, by the names of `Delta.delta_parameters`.

        Nothing is made, so that a file's settings can be compared with its tensors before memory is taken for them.
        What no setting has a say in may be left out.
        """
        return {}

    @classmethod
    def is_linear(cls, cell: nn.Cell) -> bool:
        """Tell whether ``"all-linear"`` means this cell: a linear layer that is not adapted."""
        return is_linear(cell)


def end_expression(field: str, pattern: str) -> re.Pattern[str]:
    """Return the expression that matches the paths which end as `pattern` says.

    Raises:
        ValueError: it is no regular expression, or could take too long.
    """
    try:
        return compile_end(pattern)
    except ValueError as error:
        raise ValueError(f"{field}: {pattern!r:.100} {error}") from error


def _numbers(field: str, value: object) -> tuple[int, ...] | None:
    """Return block numbers as a tuple of ints after checking them."""
    if value is None:
        return None
    items: list[Any] = list(value) if isinstance(value, (list, tuple, set, range)) else [value]
    if not items or not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items):
        raise TypeError(f"{field} must be a block number or a non-empty list of block numbers, but got {value!r:.100}.")
    return tuple(items)


def names_of(field: str, value: object, allow_text: bool) -> str | tuple[str, ...] | None:
    """Return a list of names as a tuple of strings after checking it; a text as it is, where that is allowed."""
    if value is None or (allow_text and isinstance(value, str) and value):
        return value
    expected = "a non-empty string or a non-empty list of strings" if allow_text else "a non-empty list of strings"
    if not isinstance(value, (list, tuple, set, frozenset)) or not value:
        raise TypeError(f"{field} must be {expected}, but got {value!r:.100}.")
    for item in value:
        if not isinstance(item, str) or not item:
            raise TypeError(f"{field} must be {expected}, but it holds {item!r:.100}.")
    return tuple(value)
