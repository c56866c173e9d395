"""What LoRA on every kind of layer but Dense shares: the layer itself on its own Parameters, and the way back."""
from __future__ import annotations

from typing import ClassVar, TypeVar

import mindspore
from mindspore import Parameter, Tensor, nn, ops

from mindpet_lite.delta.dense import TypedCell
from mindpet_lite.delta.lora.low_rank import LoraSettings, LowRank
from mindpet_lite.delta.parts import as_type

Self = TypeVar("Self", bound="LoRALayer")


class LoRALayer(TypedCell, LowRank):
    """A layer of `plain_type` with LoRA; a kind's class is ``class X(LoRALayer, plain_type)``.

    `parts` names what a plain layer is made of besides its Parameters, which `base_names` names: taken over, not
    copied, by `_on`. LoRA is beside `weight`.
    """

    plain_type: ClassVar[type[nn.Cell]]
    plain_name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    base_names: ClassVar[tuple[str, ...]] = ("weight", "bias")
    weight: Parameter

    # The adapted layer in a tuple, so that it is no child: `plain_cell` hands back the very same object.
    _plain: tuple[nn.Cell, ...] = ()

    @classmethod
    def _on(cls: type[Self], plain: nn.Cell, settings: LoraSettings) -> Self:
        """Return the adapted layer on the Parameter objects of `plain`, which stays as it is."""
        layer = cls.__new__(cls)
        nn.Cell.__init__(layer)
        layer._take_over(layer, plain)
        layer._add_delta(settings)
        layer._plain = (plain,)
        # Training state, recomputation and the like; the precision flags become the layer's own.
        layer.add_flags_recursive(**plain.get_flags())
        return layer

    @classmethod
    def _take_over(cls, layer: nn.Cell, source: nn.Cell) -> None:
        """Make `layer` one on the parts of `source`, without renaming a Parameter (a plain assignment would)."""
        for name in cls.parts:
            if hasattr(source, name):
                setattr(layer, name, getattr(source, name))
        for name in cls.base_names:
            parameter = getattr(source, name)
            if parameter is None:
                # The compiler does not take a Parameter slot that holds None.
                setattr(layer, name, None)
            else:
                layer.insert_param_to_cell(name, parameter)
        layer.set_train(source.training)
        layer.set_grad(source.requires_grad)

    def _add_delta(self, config: LoraSettings) -> None:
        """Check what the layer's own settings ask of LoRA, and add what it needs."""
        raise NotImplementedError

    def _scaled(self, low: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the low-rank activations times the live factor."""
        return ops.mul(low, as_type(self.lora_scaling, dtype))

    def _own_type(self) -> mindspore.dtype:
        return self.weight.dtype

    def plain_cell(self) -> nn.Cell:
        """Return the layer that this one adapts, or a new one on the same Parameter objects."""
        if self._plain:
            plain = self._plain[0]
        else:
            plain = nn.Cell.__new__(self.plain_type)
            nn.Cell.__init__(plain)
            self._take_over(plain, self)
        plain.set_train(self.training)
        if self.float_type is not None:
            plain.to_float(self.float_type)
        return plain

    def cost(self) -> str:
        """Say that the weight is cast on every call, where the layer computes in another type."""
        dtype = self._compute_type()
        return "" if dtype == self.weight.dtype else f"casts its {self.weight.dtype} weight to {dtype} on every call"

    def extend_repr(self) -> str:
        """Show the low-rank settings beside those of the plain layer."""
        return f"{super().extend_repr()}, lora_rank={self.lora_rank}, lora_alpha={self.lora_alpha}"
