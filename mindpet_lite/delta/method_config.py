"""The config of a method that is written on hosts: which layers it fits, and the settings of each."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import mindspore
from mindspore import Parameter, nn

from mindpet_lite.arguments import did_you_mean
from mindpet_lite.delta.adapted import Adapted, Method, adapted_class
from mindpet_lite.delta.base import Delta, check_float_type
from mindpet_lite.delta.delta_config import DeltaConfig, end_expression
from mindpet_lite.delta.hosts import HOSTS, Host, host_of, host_refusal
from mindpet_lite.formats.peft_method import PeftMethod
from mindpet_lite.names.default_targets import Family


class HostedConfig(DeltaConfig):
    """Which layers a method that is written on hosts adapts.

    Class attributes:
        layer: the class of its layers, put before a host.
        title: its name in sentences.
        fits: the kinds of hosts that it goes with.
        by_hand: its layers that can be built by hand too, by the kind of host; the others are made of `layer`.
    """

    layer: ClassVar[type[Adapted]]
    title: ClassVar[str]
    fits: ClassVar[tuple[type[Host], ...]] = HOSTS
    by_hand: ClassVar[Mapping[type[Host] | None, type[Adapted]]] = {}

    @classmethod
    def refusal(cls, cell: nn.Cell) -> str | None:
        """Return why `cell` cannot be adapted, or None if it can."""
        return host_refusal(cell, cls.title, cls.fits)

    @classmethod
    def class_for(cls, cell: nn.Cell) -> Any:
        """Return the class of the adapted layer for a plain one."""
        host = host_of(cell)
        return cls.by_hand.get(host) or adapted_class(cls.layer, host)

    def adapt(self, cell: nn.Cell) -> Delta:
        """Return the adapted layer on the Parameter objects of `cell`, which stays as it is."""
        layer: Delta = self.class_for(cell)._on(cell, self)
        return layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig(HostedConfig):
    """Settings that every method on hosts has; its own have PEFT's names, and stand in `peft.fields`.

    Args:
        param_init_type: type of what trains: float16, bfloat16 or float32. Default: float32.
        compute_dtype: type that the layers compute in: float16, bfloat16 or float32. None: the type of `to_float()`,
            else that of the weight; see the dtype rule of `LoRADense`. Default: None.

    Raises:
        TypeError: a type is not float16, bfloat16 or float32; a pattern is no mapping.
    """

    layer: ClassVar[type[Method]]
    peft: ClassVar[PeftMethod]

    param_init_type: mindspore.dtype = mindspore.float32
    compute_dtype: mindspore.dtype | None = None
    _shared: Mapping[str, Parameter] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_float_type("param_init_type", self.param_init_type)
        if self.compute_dtype is not None:
            check_float_type("compute_dtype", self.compute_dtype)
        biases = ("none", "all", self.peft.bias)
        if self.peft.bias and getattr(self, "bias", None) not in biases:
            raise ValueError(f"bias must be one of {', '.join(biases)}, but got {getattr(self, 'bias', None)!r:.100}.")
        for field in self.peft.patterns.values():
            by_pattern = getattr(self, field)
            if not isinstance(by_pattern, Mapping):
                raise TypeError(f"{field} must be a mapping from patterns of paths to values, but got "
                                f"{by_pattern!r:.100}.")
            for pattern in by_pattern:
                end_expression(field, pattern)
        without: dict[str, Any] = dict.fromkeys(self.peft.patterns.values(), {})
        for field, patterns in self.peft.patterns.items():
            # Each value is checked as the field itself is.
            for value in getattr(self, patterns).values():
                dataclasses.replace(self, **{**without, field: value})

    def trains_base(self, name: str, of_adapted_layer: bool) -> bool:
        """Tell whether a base Parameter is a bias that the field `bias` says to train, where the method has it."""
        bias = getattr(self, "bias", "none")
        return name.endswith("bias") and (bias == "all" or bias == self.peft.bias and of_adapted_layer)

    @classmethod
    def layer_fields(cls) -> tuple[str, ...]:
        """Return the names of the fields that say how a layer computes."""
        return tuple(cls.peft.fields)

    def for_layer(self, path: str) -> MethodConfig:
        """Return the settings for the layer at `path`: the value of the first pattern that fits its end."""
        changed: dict[str, Any] = {}
        for field, patterns in self.peft.patterns.items():
            fitting = [value for pattern, value in getattr(self, patterns).items()
                       if end_expression(patterns, pattern).fullmatch(path)]
            if fitting:
                changed[field] = fitting[0]
        return dataclasses.replace(self, **changed) if changed else self

    def unhit(self, adapted: Iterable[str]) -> list[str]:
        """Return a sentence for each pattern that fits the end of no adapted layer's path."""
        paths = list(adapted)
        names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
        return [f"{field} {pattern!r} hits no adapted layer; a pattern must fit the end of a layer's path, such as "
                f"{paths[0]!r}.{did_you_mean(pattern.strip('.*^$'), names)}"
                for field in self.peft.patterns.values() for pattern in getattr(self, field)
                if not any(end_expression(field, pattern).fullmatch(path) for path in paths)]

    @classmethod
    def default_fields(cls, family: Family) -> dict[str, tuple[str, ...]]:
        """Return the layers that PEFT adapts in a family of models, for a method that adapts linear layers."""
        return {"target_modules": family.targets} if any(host.is_linear for host in cls.fits) else {}

    def holding(self, shared: Mapping[str, Parameter]) -> MethodConfig:
        """Return the settings with what the layers share, for `adapt`."""
        return dataclasses.replace(self, _shared=shared)

    def shapes(self, cell: nn.Cell) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what these settings train on `cell`."""
        found: dict[str, tuple[int, ...]] = self.class_for(cell).shapes(cell, self)
        return found
