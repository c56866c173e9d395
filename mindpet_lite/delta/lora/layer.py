"""What LoRA on every kind of layer but Dense shares: the layer itself on its own Parameters, and the way back."""
from __future__ import annotations

from typing import Any, TypeVar

import mindspore
from mindspore import Tensor, nn, ops

from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.dense import as_running, keeps_types, take_types
from mindpet_lite.delta.lora.low_rank import LowRank
from mindpet_lite.delta.lora.settings import LoraSettings
from mindpet_lite.delta.lora.typed import TypedLayer
from mindpet_lite.delta.parts import as_type

Self = TypeVar("Self", bound="LoRALayer")


class LoRALayer(TypedLayer, LowRank):
    """A layer with LoRA beside its `weight`; a kind's class is ``class X(LoRALayer, TypedX)``."""

    # The adapted layer in a tuple, so that it is no child: `plain_cell` hands back the very same object.
    _plain: tuple[nn.Cell, ...] = ()

    @classmethod
    def _on(cls: type[Self], plain: nn.Cell, settings: LoraSettings) -> Self:
        """Return the adapted layer on the Parameter objects of `plain`, which stays as it is."""
        layer = cls.on(cls, plain)
        layer._add_delta(settings)
        layer._plain = (plain,)
        take_types(layer, plain)
        layer._require_scale()
        return layer

    def _add_delta(self, config: LoraSettings) -> None:
        """Check what the layer's own settings ask of LoRA, and add what it needs."""
        raise NotImplementedError

    def _scaled(self, low: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the low-rank activations times the scaling."""
        return ops.mul(low, as_type(self.scaling, dtype))

    def plain_cell(self) -> nn.Cell:
        """Return the layer this one adapts, or one on the same Parameters; with `compute_dtype`, one with it."""
        if self._plain and keeps_types(self, self._plain[0]):
            return as_running(self._plain[0], self)
        typed: Any = next(kind for kind in type(self).__mro__ if not issubclass(kind, Delta))
        return as_running(self.on(typed if self.compute_dtype else self.plain_type, self), self)

    def cost(self) -> str:
        """Say that the weight is cast on every call, where the layer computes in another type."""
        dtype = self._compute_type()
        return "" if dtype == self.weight.dtype else f"casts its {self.weight.dtype} weight to {dtype} on every call"

    def extend_repr(self) -> str:
        """Show the low-rank settings beside those of the plain layer."""
        return f"{super().extend_repr()}, lora_rank={self.lora_rank}, lora_alpha={self.lora_alpha}"
