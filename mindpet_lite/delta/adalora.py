"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning.

Zhang et al., 2023, https://arxiv.org/abs/2303.10512, section 3.1:

    y = W x + b + s P Λ Q x        s = lora_alpha / (init_r + 10^-5), as PEFT has it

Each of the `init_r` singular values in Λ, with its column of P and its row of Q, is a triplet. While it trains,
`train.RankAllocation` sets those values to zero that matter least, so that every layer gets the rank it needs.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindpet_lite.arguments import check_alpha, check_bool, check_int, check_number, check_probability
from mindpet_lite.delta.adapted import Additive, Method, Numbers
from mindpet_lite.delta.base import overflow
from mindpet_lite.delta.dropout import delta_dropout
from mindpet_lite.delta.hosts import HOSTS, Host
from mindpet_lite.delta.method_config import MethodConfig
from mindpet_lite.delta.parts import as_type, prefix_of, put
from mindpet_lite.delta.values import FrozenParameter, frozen_parameter
from mindpet_lite.formats.peft_method import AdapterState, PeftMethod

# PEFT's names: Q, P and Λ.
_A, _B, _E = "mindpet_delta_adalora_a", "mindpet_delta_adalora_b", "mindpet_delta_adalora_e"
_KEY_END = ".lora_E"


class AdaLoRA(Additive):
    """A layer with an update by singular values, of which the least important can be taken away while it trains.

    `mindpet_delta_adalora_a` is Q (init_r, inputs · kernel), `mindpet_delta_adalora_b` P (outputs, init_r), both random
    at the start, and `mindpet_delta_adalora_e` the diagonal of Λ (init_r, 1), which starts at zero: the layer starts as
    its base. `scaling` () is the strength times s. `kept` (init_r, 1) records which triplets the last allocation left:
    the layer computes without it. The rule for types is that of `mindpet_lite.LoRADense`.
    """

    method = "adalora"
    kept: FrozenParameter

    @classmethod
    def shapes(cls, layer: nn.Cell, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of Q, P and Λ."""
        inputs = math.prod(cls.logical_shape(layer)[1:])
        return {_A: (config.init_r, inputs), _B: (cls.outputs(layer), config.init_r), _E: (config.init_r, 1)}

    def starts(self, config: Any) -> dict[str, np.ndarray]:
        """Return normal numbers of deviation 0.02, and zeros for Λ; with ``init_lora_weights=False`` of 1, as PEFT."""
        sizes = {name: (0.02 if name != _E else 0.0) if config.init_lora_weights else 1.0 for name in (_A, _B, _E)}
        found = {name: sizes[name] * np.random.standard_normal(shape)
                 for name, shape in self.shapes(self, config).items()}
        mask = _mask(config._kept, config.init_r)
        return {name: value * (mask if name == _B else mask[:, None]) for name, value in found.items()}

    def factor(self) -> float:
        """Return s."""
        return scale_of(self.config.lora_alpha, self.config.init_r)

    def prepare(self, config: Any) -> None:
        """Make the operators, and the record of what is kept."""
        if self.dims:
            self.product = ops.MatMul()
            self.weight_shape = self.logical_shape(self)
        else:
            self.add_low_rank_operators(config.init_r)
        self.has_dropout = config.lora_dropout > 0
        if self.has_dropout:
            self.lora_dropout = delta_dropout(float(config.lora_dropout))
        mask = _mask(config._kept, config.init_r).astype(np.float32)
        self.kept = frozen_parameter(Tensor(mask[:, None]), prefix_of(self.weight.name) + "kept")
        self.setting_names += ("kept",)

    def triplets(self) -> tuple[Parameter, Parameter, Parameter]:
        """Return Q, P and Λ."""
        return self.mindpet_delta_adalora_a, self.mindpet_delta_adalora_b, self.mindpet_delta_adalora_e

    def update(self, h: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return s P Λ Q h."""
        if self.has_dropout:
            h = self.lora_dropout(h)
        if self.dims:
            weight = self.delta_weight() * self.scaling
            return self.linear(h, self.laid_out(as_type(weight, dtype)), dtype)
        values = ops.reshape(as_type(self.mindpet_delta_adalora_e, mindspore.float32) * self.scaling, (-1,))
        low = self.narrow(h, self.mindpet_delta_adalora_a, dtype) * as_type(values, dtype)
        return self.widen(low, self.mindpet_delta_adalora_b, dtype)

    def delta_weight(self) -> Tensor:
        """Return P Λ Q in the shape of a convolution's weight."""
        right = as_type(self.mindpet_delta_adalora_a, mindspore.float32) * as_type(self.mindpet_delta_adalora_e,
                                                                                   mindspore.float32)
        weight = self.product(as_type(self.mindpet_delta_adalora_b, mindspore.float32), right)
        return ops.reshape(weight, self.weight_shape)

    @staticmethod
    def delta(tensors: Numbers, settings: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
        """Return s P Λ Q."""
        product = tensors[_B] @ (tensors[_E] * tensors[_A])
        return (product * scale_of(settings["lora_alpha"], settings["init_r"])).reshape(shape)

    def settings(self) -> dict[str, Any]:
        """Return the fields of the config, and which triplets a file must hold, where it can do without some."""
        kept = self.kept.asnumpy() > 0
        # A value that was set to zero and has grown since counts until the next allocation.
        held = kept | (self.mindpet_delta_adalora_e.astype(mindspore.float32).asnumpy() != 0)
        text = None if kept.all() or held.all() else "".join("1" if item else "0" for item in held.reshape(-1))
        return {**super().settings(), "kept": text}

    def unlike(self, settings: Mapping[str, Any]) -> list[str]:
        """Return where alpha is too large: it is taken over; the rank shows in the tensors, dropout may differ."""
        scale = scale_of(settings["lora_alpha"], self.config.init_r)
        return list(filter(None, [overflow("the scale in the file", scale, (mindspore.float32, self._compute_type()))]))

    def adopt_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over alpha, the schedule of the allocation, and what it left."""
        own = ("init_r", "lora_dropout", "kept")
        self.config = dataclasses.replace(self.config, **{name: value for name, value in settings.items()
                                                          if name not in own})
        mask = _mask(settings["kept"], self.config.init_r).astype(np.float32)
        put(self.kept, Tensor(mask[:, None]))
        self.refresh()


def scale_of(lora_alpha: float, init_r: int) -> float:
    """Return s."""
    return lora_alpha / (init_r + 1e-5)


def _mask(kept: str | None, count: int) -> np.ndarray:
    """Return for each triplet whether it is kept."""
    return np.ones(count, bool) if kept is None else np.array([item == "1" for item in kept], bool)


class _File(PeftMethod):
    """After an allocation PEFT's config has rank_pattern, which triplets each layer keeps; its file holds those alone.

    An adapter that is read has all `init_r` triplets, with zeros for those that are gone: from zeros all three parts of
    a triplet get gradients of zero, so that they stay.
    """

    def layer_settings(self, path: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of the layer at `path`; older configs have no total_step.

        Raises:
            ValueError: its entry of rank_pattern is no list of `init_r` times true or false.
        """
        found = super().layer_settings(path, config)
        if found["total_step"] is None:
            found["total_step"] = sum(found[name] for name in ("tinit", "tfinal") if type(found[name]) is int) + 1
        patterns = config.get("rank_pattern") or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"rank_pattern must be an object, but the config says {patterns!r:.100}.")
        own = next((value for key, value in patterns.items() if key.partition(_KEY_END)[0] == path), None)
        if own is None:
            return {**found, "kept": None}
        if not isinstance(own, list) or len(own) != found["init_r"] or not all(type(item) is bool for item in own):
            raise ValueError(f"rank_pattern of {path} must be a list of true or false for each of init_r = "
                             f"{found['init_r']!r:.60} triplets, but the config says {own!r:.100}.")
        return {**found, "kept": None if all(own) else "".join("1" if item else "0" for item in own)}

    def config_fields(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return PEFT's fields, with rank_pattern for all layers where one of them has lost triplets."""
        found = super().config_fields(settings)
        pattern = {path + _KEY_END: _mask(item.get("kept"), item["init_r"]).tolist()
                   for path, item in settings.items()}
        return {**found, "rank_pattern": pattern if any(item.get("kept") for item in settings.values()) else None}

    def for_file(self, state: AdapterState) -> AdapterState:
        """Return the adapter without the triplets that are gone."""
        layers = {}
        for path, layer in state.layers.items():
            mask = _mask((layer.settings or {}).get("kept"), len(layer.tensors[_E]))
            layers[path] = dataclasses.replace(layer, tensors={
                name: np.ascontiguousarray(value[:, mask] if name == _B else value[mask])
                for name, value in layer.tensors.items()})
        return dataclasses.replace(state, layers=layers)

    def from_file(self, state: AdapterState) -> AdapterState:
        """Return the adapter with zeros for the triplets that are gone.

        Raises:
            ValueError: a layer's tensors have another rank than rank_pattern says.
        """
        layers, problems = {}, []
        for path, layer in state.layers.items():
            mask = _mask((layer.settings or {})["kept"], 0)
            wrong = [f"{path}: {self.keys[name]} has the shape {value.shape}, but rank_pattern keeps {mask.sum()} "
                     f"triplets." for name, value in layer.tensors.items()
                     if mask.size and (value.ndim != 2 or value.shape[name == _B] != mask.sum())]
            problems += wrong
            layers[path] = layer if wrong or not mask.size else dataclasses.replace(layer, tensors={
                name: _grown(value, mask, int(name == _B)) for name, value in layer.tensors.items()})
        if problems:
            raise ValueError("\n  ".join(problems))
        return dataclasses.replace(state, layers=layers)


def _grown(value: np.ndarray, mask: np.ndarray, axis: int) -> np.ndarray:
    """Return a tensor with zeros along `axis` where the mask is false."""
    shape = list(value.shape)
    shape[axis] = len(mask)
    found = np.zeros(shape, value.dtype)
    found[(slice(None),) * axis + (mask,)] = value
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(MethodConfig):
    """Settings of AdaLoRA; the names are PEFT's.

    Train with `mindpet_lite.RankAllocation` around the optimizer, which reads the schedule from here: the budget
    is `init_r` triplets a layer until step `tinit`, falls by a cubic curve, and is `target_r` a layer, on average, for
    the last `tfinal` steps. Add `mindpet_lite.OrthogonalRegularization` to the loss.

    Args:
        total_step: how many steps of the optimizer the training has; above tinit + tfinal. It has no default.
        init_r: triplets of each layer at the start; positive. Default: 12.
        target_r: triplets of a layer at the end, on average; positive, not above `init_r`. Default: 8.
        lora_alpha: the scale s is lora_alpha / (init_r + 10^-5); finite and positive. Default: 8.
        lora_dropout: rate of dropout before Q, in [0, 1). Default: 0.0.
        tinit: steps before the budget falls; 0 or more. Default: 0.
        tfinal: steps with the final budget; 0 or more. Default: 0.
        deltaT: steps from one allocation to the next; positive. Default: 1.
        beta1: how slowly the mean importance moves, in (0, 1). Default: 0.85.
        beta2: how slowly its uncertainty moves, in (0, 1). Default: 0.85.
        orth_reg_weight: the weight of the regularisation, not negative. Default: 0.5.
        init_lora_weights: True starts at the base; False at random. Default: True.
        bias: which biases of the base train too: "none", "all", or "lora_only", those of the adapted layers.
            Default: "none".

    Raises:
        TypeError, ValueError: a field is not what it must be, or no step is left between `tinit` and `tfinal`.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.AdaLoraConfig(total_step=1000, init_r=3, target_r=2, target_modules=["0"]))
        >>> sum(item.size for item in net.trainable_params())
        39
    """

    pet_type: ClassVar[str] = "adalora"
    layer: ClassVar[type[Method]] = AdaLoRA
    title: ClassVar[str] = "AdaLoRA"
    of_one_layer: ClassVar[tuple[str, ...]] = ("kept",)
    fits: ClassVar[tuple[type[Host], ...]] = tuple(host for host in HOSTS if not host.takes_ids)
    peft: ClassVar[PeftMethod] = _File(
        "ADALORA", {_A: "lora_A", _B: "lora_B", _E: "lora_E"},
        {"init_r": 12, "target_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "tinit": 0, "tfinal": 0, "deltaT": 1,
         "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5, "total_step": None},
        neutral={"use_dora": (False, None), "layer_replication": (None, []), "target_parameters": (None, []),
                 "trainable_token_indices": (None, [], {}), "alora_invocation_tokens": (None, [])},
        written={"fan_in_fan_out": False, "init_lora_weights": True, "r": 8}, bias="lora_only", may_be_empty=True)

    total_step: int
    init_r: int = 12
    target_r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    init_lora_weights: bool = True
    bias: str = "none"
    _kept: str | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("total_step", 1), ("init_r", 1), ("target_r", 1), ("deltaT", 1), ("tinit", 0),
                            ("tfinal", 0)):
            check_int(name, getattr(self, name), least)
        check_alpha("lora_alpha", self.lora_alpha)
        check_probability("lora_dropout", self.lora_dropout)
        check_bool("init_lora_weights", self.init_lora_weights)
        for name in ("beta1", "beta2"):
            if not 0 < check_number(name, getattr(self, name)) < 1:
                raise ValueError(f"{name} must be between 0 and 1, but got {getattr(self, name)}.")
        if not 0 <= check_number("orth_reg_weight", self.orth_reg_weight) < math.inf:
            raise ValueError(f"orth_reg_weight must be finite and not negative, but got {self.orth_reg_weight}.")
        if self.target_r > self.init_r:
            raise ValueError(f"target_r must not be above init_r = {self.init_r}, but got {self.target_r}: ranks only "
                             f"fall.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(f"total_step must be above tinit + tfinal = {self.tinit + self.tfinal}: the budget needs "
                             f"steps in which to fall, but got {self.total_step}.")
        # A 1 for each triplet that a file holds and a 0 for each that is gone; None for all.
        kept = self._kept
        if kept is not None and (not isinstance(kept, str) or len(kept) != self.init_r or set(kept) - {"0", "1"}):
            raise ValueError(f"kept must have 0 or 1 for each of {self.init_r} triplets, but got {kept!r:.100}.")
