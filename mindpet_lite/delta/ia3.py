"""(IA)³: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning.

Liu et al., 2022, https://arxiv.org/abs/2205.05638, section 3.3:

    y = l · (W x + b)    on keys and values        y = W (l · x) + b    on the second layer of a feed-forward block

l starts at one, so training starts at the base. With strength t the factor is 1 + t (l - 1).
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Tensor, nn, ops

from mindpet_lite.delta.adapted import Method, Numbers
from mindpet_lite.delta.delta_config import names_of
from mindpet_lite.delta.hosts import HOSTS, Host
from mindpet_lite.delta.method_config import MethodConfig
from mindpet_lite.delta.parts import as_type
from mindpet_lite.formats.peft_method import PeftMethod
from mindpet_lite.names.default_targets import Family
from mindpet_lite.names.expressions import compile_checked

_L = "mindpet_delta_ia3_l"


class IA3(Method):
    """A layer whose outputs, or whose inputs (`is_feedforward`), are multiplied by one trained number each.

    `mindpet_delta_ia3_l` is (outputs, 1), or (1, inputs); for a convolution (1, channels, 1, ...), as PEFT has it.
    `scaling` () is the strength. The rule for types is that of `mindpet_lite.LoRADense`.
    """

    method = "ia3"

    @classmethod
    def shapes(cls, layer: nn.Cell, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shape of l."""
        size = cls.inputs(layer) if config.is_feedforward else cls.outputs(layer)
        if cls.dims:
            return {_L: cls.across(size)}
        return {_L: (1, size) if config.is_feedforward else (size, 1)}

    def starts(self, config: Any) -> dict[str, np.ndarray]:
        """Return ones, or with ``init_ia3_weights=False`` numbers from a normal distribution."""
        (shape,) = self.shapes(self, config).values()
        return {_L: np.ones(shape) if config.init_ia3_weights else np.random.standard_normal(shape)}

    def prepare(self, config: Any) -> None:
        """Keep which side is scaled, and the shape in which it is."""
        self.is_feedforward = config.is_feedforward
        self.factor_shape = self.across(self.mindpet_delta_ia3_l.size)

    def adapted(self, h: Tensor, again: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the output with the factor on its side."""
        learned = ops.reshape(as_type(self.mindpet_delta_ia3_l, mindspore.float32), self.factor_shape)
        factor = as_type(1 + (learned - 1) * self.scaling, dtype)
        if self.is_feedforward:
            return self.affine(again * factor, self.own_weight(dtype), dtype)
        return self.affine(h, self.own_weight(dtype), dtype) * factor

    @staticmethod
    def merged(base: Numbers, tensors: Numbers, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the weight times l along its inputs, or weight and bias times l along the outputs."""
        learned, weight = tensors[_L].reshape(-1), base["weight"]
        if settings["is_feedforward"]:
            groups = learned.size // weight.shape[1]
            # A grouped convolution's output sees the inputs of its group.
            rows = np.repeat(learned.reshape(groups, -1), weight.shape[0] // groups, axis=0)
            return {"weight": weight * rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))}
        if weight.shape[0] != learned.size:
            return {"weight": weight * learned}
        new = {"weight": weight * learned.reshape(-1, *[1] * (weight.ndim - 1))}
        return {**new, **({"bias": base["bias"] * learned} if "bias" in base else {})}


class _File(PeftMethod):
    """PEFT's config lists the feed-forward layers, by the ends of their paths or as an expression."""

    def layer_settings(self, path: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return whether the inputs of the layer at `path` are scaled."""
        return {"is_feedforward": _is_feedforward(path, config.get("feedforward_modules") or ())}

    def config_fields(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the list of feed-forward layers."""
        return {**self.written, "feedforward_modules": sorted(path for path, item in settings.items()
                                                              if item.get("is_feedforward"))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3Config(MethodConfig):
    """Settings of (IA)³; the names are PEFT's.

    Args:
        feedforward_modules: the layers among `target_modules` whose inputs are scaled, not their outputs: names (each
            the end of a path) or one regular expression of whole paths. Default: ().
        init_ia3_weights: True starts at the base; False at random. Default: True.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]))
        >>> sum(item.size for item in net.trainable_params())
        16
    """

    pet_type: ClassVar[str] = "ia3"
    layer: ClassVar[type[Method]] = IA3
    title: ClassVar[str] = "(IA)³"
    fits: ClassVar[tuple[type[Host], ...]] = tuple(host for host in HOSTS if not host.takes_ids)
    of_one_layer: ClassVar[tuple[str, ...]] = ("is_feedforward",)
    peft: ClassVar[PeftMethod] = _File("IA3", {_L: "ia3_l"}, {"is_feedforward": False},
                                       written={"fan_in_fan_out": False, "init_ia3_weights": True})

    feedforward_modules: str | tuple[str, ...] = ()
    _is_feedforward: bool = dataclasses.field(default=False, repr=False)
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        names = names_of("feedforward_modules", self.feedforward_modules or None, allow_text=True)
        object.__setattr__(self, "feedforward_modules", names or ())

    @property
    def is_feedforward(self) -> bool:
        """Tell whether the inputs of the layer are scaled that these settings are made for."""
        return self._is_feedforward

    @classmethod
    def default_fields(cls, family: Family) -> dict[str, tuple[str, ...]]:
        """Return the layers that PEFT scales in a family of models."""
        return {"target_modules": family.scaled, "feedforward_modules": family.feedforward} if family.scaled else {}

    def for_layer(self, path: str) -> IA3Config:
        """Return the settings for the layer at `path`."""
        return dataclasses.replace(self, _is_feedforward=_is_feedforward(path, self.feedforward_modules))


def _is_feedforward(path: str, wanted: Any) -> bool:
    if isinstance(wanted, str):
        return compile_checked(wanted, path).fullmatch(path) is not None
    return any(path == name or path.endswith("." + name) for name in wanted)
