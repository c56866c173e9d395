"""The two abstractions every method is made of: an adapted cell (`Delta`) and its typed settings (`DeltaConfig`)."""
from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore import dtype as mstype

from mindpet_lite.arguments import check_bool, did_you_mean
from mindpet_lite.delta.inherited_docs import inherit_args
from mindpet_lite.delta.parts import put
from mindpet_lite.delta.spelling import TASK_TYPES, Spelled
from mindpet_lite.delta.values import Start
from mindpet_lite.formats.peft_method import PeftMethod
from mindpet_lite.names.default_targets import Family
from mindpet_lite.names.expressions import compile_end

FLOAT_TYPES = (mstype.float16, mstype.bfloat16, mstype.float32)
# The types of Parameters that can train.
FLOATS = (*FLOAT_TYPES, mstype.float64)
# From here on rounding gives infinity: half a step above the largest number.
_LIMITS = {mstype.float16: 65520.0, mstype.bfloat16: 2.0 ** 128 - 2.0 ** 119, mstype.float32: 2.0 ** 128 - 2.0 ** 103}


def check_float_type(name: str, value: object) -> None:
    """Raise TypeError unless `value` is mindspore.float16, bfloat16 or float32."""
    if not any(value is item or value == item for item in FLOAT_TYPES):
        raise TypeError(f"{name} must be mindspore.float16, bfloat16 or float32, but got {value!r:.100}.")


def overflow(what: str, number: float, types: Iterable[Any]) -> str:
    """Return in which of the types this number is not finite, as a sentence, or nothing."""
    small = [dtype for dtype in types if not abs(number) < _LIMITS.get(dtype, math.inf)]
    return f"{what} is {number:g}, which {small[0]} cannot hold." if small else ""


def type_refusal(parameter: Parameter, method: str) -> str | None:
    """Return why the layer of this Parameter cannot be adapted, where it is not of a float type; else None."""
    if parameter.dtype in FLOATS:
        return None
    return (f"its {parameter.name.rpartition('.')[2]} is of the type {parameter.dtype}, in which the input and the "
            f"deltas would be cut down to whole numbers: {method} adapts layers of a float type. Give the layer its "
            f"weight in float16 or float32 first, or leave it out with exclude_modules.")


class Delta:
    """What a method tells the rest of the package about one layer; mixed into the cell class of most methods.

    `delta_names` names the attributes that hold what it trains: Parameters, or cells of them. `setting_names` names
    Parameters that are never trained, counted or written to a file: those that hold what the settings say, which a
    compiled graph reads, and constants. `shared_names` names the Parameters that it holds together with the adapter's
    other layers. `output_names` names those of `delta_parameters()` on the side of the layer's
    output, as LoRA's B. `strength` multiplies the delta (1 is the trained adapter, 0 the base), `enabled`
    switches it; `refresh` puts both into effect. `fixed` and `unmergeable` say why a method cannot be steered
    or merged. `foldable` says that some of what trains can be left out for inference, by `fold`.
    """

    method: ClassVar[str]
    delta_names: tuple[str, ...]
    setting_names: tuple[str, ...] = ()
    shared_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()

    strength: float = 1.0
    enabled: bool = True
    # The record of the adapter that this delta is a part of (`graph.adapters.Adapter`); a layer built by hand has none.
    adapter: Any = None
    # What the start took from the base; a layer whose start takes nothing has none.
    start: Start | None = None
    # The types in which the file that this delta was loaded from holds its tensors, by parameter path.
    file_types: Mapping[str, np.dtype] = {}
    fixed: str = ""
    # Its start took a part out of the base's weights that no file of the adapter tells: it belongs to what was left.
    base_is_lost: bool = False
    # What is to make its start from data before it trains (a `data_start.DataStart`); None where nothing is, or has.
    data_start: Any = None
    unmergeable: str = ""
    foldable: bool = False
    # The layer computes with another delta's Parameters, because it has that layer's weight (tied weights): it trains
    # nothing of its own, and stands in no file.
    follows: bool = False
    # Other layers with the same weight are changed with it, by `followers`.
    follows_ties: bool = False
    # By the names of its Parameters of which each process of a job has a part: along which axis.
    split_axes: Mapping[str, int] = {}

    @property
    def base_layer(self) -> Any:
        """The cell that the base's Parameters are in: the adapted layer itself, where the delta is a cell."""
        return self

    def delta_parameters(self) -> dict[str, Parameter]:
        """Return the trained Parameters of this layer by their path below it."""
        found: dict[str, Parameter] = {}
        for name in self.delta_names:
            part = getattr(self, name)
            if isinstance(part, nn.Cell):
                found.update({f"{name}.{path}": item for path, item in part.parameters_and_names()})
            else:
                found[name] = part
        return found

    def setting_parameters(self) -> dict[str, Parameter]:
        """Return the Parameters that are never trained, by attribute name."""
        return {name: getattr(self, name) for name in self.setting_names}

    def delta_norm(self) -> float:
        """Return how large the delta is: the root of the sum of the squares of all it trains."""
        return math.sqrt(sum(float(np.square(float64(item)).sum()) for item in self.delta_parameters().values()))

    def setting_values(self) -> dict[str, Any]:
        """Return what the Parameters of `setting_names` are to hold by the settings, `strength` and `enabled`."""
        raise NotImplementedError(f"{type(self).__name__}.setting_values() is missing: {self.fixed or 'write it'}")

    def refresh(self) -> None:
        """Write `strength` and `enabled` into those Parameters; a running graph sees it at its next call."""
        for name, value in self.setting_values().items():
            put(getattr(self, name), Tensor(value, getattr(self, name).dtype))

    def base_parameter(self) -> Parameter | None:
        """Return the base Parameter that the start is made from, or None where the start takes nothing from it."""
        return None

    def followers(self, cells: Mapping[str, nn.Cell]) -> dict[str, Delta]:
        """Return the other layers of a net that this delta changes with its own, as they are then, by path.

        Args:
            cells: of the net, by path, without this delta.

        Raises:
            ValueError: one of them cannot follow.
        """
        return {}

    def watch_start(self) -> None:
        """Let the start be made again where the base is loaded later, while nothing has trained."""
        if self.base_parameter() is not None:
            self.start = self.start or Start(self)
            self.start.watch()

    def start_again(self) -> None:
        """Make what the start takes from the base again, in place, from the base's values now."""
        raise NotImplementedError(f"{type(self).__name__}.start_again() is missing: write it")

    def overflows(self, strength: float) -> str:
        """Return why this strength is none for the layer, because it would not be finite in there, or nothing."""
        return ""

    def merged_value(self) -> dict[Parameter, Tensor]:
        """Return the new value of every base Parameter that absorbs this delta; change nothing."""
        raise NotImplementedError(f"{type(self).__name__}.merged_value() is missing: {self.unmergeable or 'write it'}")

    def plain_cell(self) -> nn.Cell:
        """Return the layer without the delta, on the same base Parameter objects; change nothing."""
        raise NotImplementedError(f"{type(self).__name__}.plain_cell() is missing: {self.unmergeable or 'write it'}")

    def merged_cell(self) -> nn.Cell:
        """Return the layer that stands here after a merge, whose Parameters are those of `merged_value`."""
        found: nn.Cell = self.plain_cell()
        return found

    def fold(self) -> None:
        """Leave out, in place, what only training needs; the output in evaluation stays the same bit for bit."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to fold.")

    def base_values(self) -> dict[Parameter, Tensor]:
        """Return the base Parameters that this delta's start changes, with their new values, for when it is put in."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return what a file must hold besides the tensors to rebuild this layer, by config field name."""
        return {}

    def cost(self) -> str:
        """Return in a few words what this layer's settings cost at run time beyond the method itself, or nothing."""
        return ""

    def unlike(self, settings: Mapping[str, Any]) -> list[str]:
        """Return, a sentence each, which settings of a file are not this layer's and cannot be taken over."""
        return [f"{name} is {value!r} in the net, {settings[name]!r} in the file." for name, value in
                self.settings().items() if name in settings and settings[name] != value]

    def adopt_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over from a file the settings that are values of this layer, such as a scale."""


def float64(value: Tensor) -> np.ndarray:
    """Return a Tensor or Parameter of any float type; numpy has no bfloat16."""
    return value.astype(mstype.float32).asnumpy().astype(np.float64)


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
        """Tell whether ``"all-linear"`` means this cell."""
        return isinstance(cell, nn.Dense) and not isinstance(cell, Delta)


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
