"""How a LoRA layer starts, and what its start does to the base's weight."""
from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor
from mindspore.common.initializer import HeUniform

from mindpet_lite.delta.adapted import Adapted
from mindpet_lite.delta.lora.settings import LoraSettings
from mindpet_lite.delta.lora.start import DATA_STARTS, check_rank, factors
from mindpet_lite.delta.parts import initial, put
from mindpet_lite.delta.values import set_value
from mindpet_lite.formats.starts import loses_base, takes_from_base


class _HeUniform(HeUniform):
    """HeUniform with a name for signatures."""

    def __repr__(self) -> str:
        return "HeUniform(√5)"


HE_UNIFORM = _HeUniform(negative_slope=math.sqrt(5))
Self = TypeVar("Self", bound="Starting")


class Starting(Adapted):
    """The start of a LoRA layer: from numbers of its own, from the base's weight, or from data."""

    lora_rank: int
    lora_alpha: float
    use_dora: bool
    init_lora_weights: bool | str
    mindpet_delta_lora_magnitude: Parameter
    # Its start took a part out of the base's weight; and that part can be taken out of another weight anew.
    took: bool = False
    takes_again: bool = False
    # What LoftQ leaves of the weight, until the layer is put in.
    left: np.ndarray | None = None
    # Of a start that is not from the weight alone.
    start_settings: LoraSettings

    def factor(self) -> float:
        """Return s."""
        raise NotImplementedError

    def _update(self) -> np.ndarray:
        """Return B A in float32 and the weight's shape."""
        raise NotImplementedError

    def _magnitude(self) -> Tensor:
        """Return what DoRA's magnitude starts with."""
        raise NotImplementedError

    def base_parameter(self) -> Parameter | None:
        """Return the weight where DoRA's magnitude, or the factors, are made from it."""
        return self.weight if self.use_dora or self.takes_again else None

    def start_again(self) -> None:
        """Make DoRA's magnitude from the weight as it is now; for PiSSA and OLoRA the factors and what is left of it.

        DoRA's magnitude becomes the norm of W + s B A, so the layer computes as LoRA without DoRA does.
        """
        if self.use_dora:
            magnitude = self.mindpet_delta_lora_magnitude
            put(magnitude, self._magnitude().astype(magnitude.dtype))
            return
        for name, value in zip(self.delta_names, self._start_factors()):
            put(getattr(self, name), value.astype(getattr(self, name).dtype))
        for parameter, value in self.base_values().items():
            # Not into its own memory, which is that of the loaded checkpoint.
            set_value(parameter, value)
        self.left = None

    def _other_start(self, config: LoraSettings, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
                     ) -> tuple[Tensor, ...]:
        """Return A and B as `init_lora_weights` says; nothing where data are to say them."""
        if config.init_lora_weights is False:
            return (initial("A", HE_UNIFORM, a_shape, config.param_init_type),
                    initial("B", HE_UNIFORM, b_shape, config.param_init_type))
        if len(self.logical_shape(self)) != 2 or self.out_axis:
            raise ValueError(f"init_lora_weights {config.init_lora_weights!r} is for linear layers: leave this one "
                             f"out, or adapt it with another config.")
        if config.init_lora_weights in DATA_STARTS:
            check_rank(config.init_lora_weights, self.logical_shape(self), config.lora_rank)
            self.data_start = getattr(config, f"{config.init_lora_weights}_config")
            return ()
        a, b = self._start_factors()
        if takes_from_base(config.init_lora_weights):
            self._note_residual(takes_again=True)
        return a.astype(config.param_init_type), b.astype(config.param_init_type)

    def _note_residual(self, takes_again: bool) -> None:
        """Note that the layer's base is what the start left, or will have left, of the weight."""
        self.took, self.takes_again = True, takes_again
        self.base_is_lost = loses_base(self.init_lora_weights)
        self.fixed = (f"its start ({self.init_lora_weights}) took a part out of the base's weight, so without the "
                      f"delta the layer is not its base.")

    def _start_factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B made from the weight by `init_lora_weights`, in float32."""
        a, b, self.left = factors(str(self.init_lora_weights), self.weight_numbers(), self.lora_rank, self.factor(),
                                  self.start_settings.loftq_config if self.init_lora_weights == "loftq" else None)
        return Tensor(a.astype(np.float32)), Tensor(b.astype(np.float32))

    def watch_start(self) -> None:
        """Let the start be made again where the base is loaded later; what LoftQ left is in the base by now."""
        self.left = None
        super().watch_start()

    def begin(self: Self, a: np.ndarray, b: np.ndarray | None = None, lora_alpha: float | None = None) -> Self:
        """Start with factors that were made from data, and return the layer, or for another rank one in its place.

        Args:
            a: A (rank, in).
            b: B (out, rank), and s · B A is taken out of the weight; without it B stays at zero.
            lora_alpha: another alpha.
        """
        layer = self
        if len(a) != self.lora_rank:
            layer = self._of_rank(len(a), lora_alpha or self.lora_alpha)
        layer.data_start = None
        for name, value in zip(layer.delta_names, (a, b)):
            if value is not None:
                put(getattr(layer, name), Tensor(value.astype(np.float32)).astype(getattr(layer, name).dtype))
        if b is not None:
            set_value(self.weight, self._without_update())
            self._note_residual(takes_again=False)
        return layer

    def _of_rank(self: Self, rank: int, lora_alpha: float) -> Self:
        """Return the same layer with another rank and alpha, as it starts."""
        settings = dataclasses.replace(self.start_settings, lora_rank=rank, lora_alpha=lora_alpha)
        layer = self._on(self.plain_cell(), settings)
        for name in (*layer.delta_names, *layer.setting_names):
            new, old = getattr(layer, name), getattr(self, name)
            new.name, new.requires_grad = old.name, old.requires_grad
        layer.adapter, layer.strength, layer.enabled = self.adapter, self.strength, self.enabled
        layer.refresh()
        return layer

    def base_values(self) -> dict[Parameter, Tensor]:
        """Return the weight without what the factors start with, for PiSSA and OLoRA; for LoftQ the quantised one.

        CorDA will take its part later, but says already of which weight.
        """
        if self.left is not None:
            return {self.weight: self.as_weight(self.left.astype(np.float32))}
        if self.data_start is not None and self.init_lora_weights == "corda":
            return {self.weight: self.weight.value()}
        if not self.takes_again:
            return {}
        return {self.weight: self._without_update()}

    def _without_update(self) -> Tensor:
        """Return the weight without s · B A."""
        return self.as_weight(self.weight_numbers() - self.factor() * self._update())


def numbers_of(value: Parameter) -> np.ndarray:
    """Return a Parameter in float32."""
    return value.astype(mindspore.float32).asnumpy()
