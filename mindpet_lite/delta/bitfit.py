"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models.

Ben Zaken et al., 2021, https://arxiv.org/abs/2106.10199.

    y = act(x Wᵀ + b)                                                                    (section 3: only b is trained)

Nothing is added to the net: its own biases train, all else is frozen. In a net with another adapter they become a part
of that adapter, as PEFT's ``bias="all"`` has it.
"""
from __future__ import annotations

import dataclasses
from typing import ClassVar

from mindspore import Parameter, nn

from mindpet_lite.delta.base import Delta, type_refusal
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.delta.selection import Selection
from mindpet_lite.delta.values import FrozenParameter


class TrainedBias(Selection):
    """The biases that a layer has and BitFit trains."""

    method: ClassVar[str] = "bitfit"

    @classmethod
    def chosen(cls, cell: nn.Cell) -> dict[str, Parameter]:
        """Return the layer's biases by attribute name."""
        return _biases(cell)


@dataclasses.dataclass(frozen=True)
class BitFitConfig(DeltaConfig):
    """Settings of BitFit: those of `DeltaConfig`; without `target_modules` every bias of the net trains.

    A bias is a Parameter whose attribute name ends in ``bias``, as `freeze_delta(net, "bitfit")` takes it; the shift
    of a LayerNorm (`beta`) can be trained too with ``freeze_exclude=["*beta"]``. In a net with another adapter the
    biases belong to that adapter: they are saved, switched off and merged with it.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.BitFitConfig())
        >>> [item.name for item in net.trainable_params()]
        ['0.bias', '2.bias']
    """

    pet_type: ClassVar[str] = "bitfit"
    all_by_default: ClassVar[bool] = True
    adds_nothing: ClassVar[bool] = True

    @classmethod
    def trained_pattern(cls) -> str:
        """Return the pattern of the biases."""
        return "*bias"

    @classmethod
    def refusal(cls, cell: nn.Cell) -> str | None:
        """Return why `cell` has nothing for BitFit to train, or None."""
        if not _biases(cell):
            return f"{type(cell).__name__} has no bias."
        # What never trains, as the codes of a quantised layer, may be of any type.
        return next(filter(None, (type_refusal(item, "BitFit") for item in cell.get_parameters(expand=False)
                                  if not isinstance(item, FrozenParameter))), None)

    def adapt(self, cell: nn.Cell) -> TrainedBias:
        """Return the view of the layer's biases."""
        return TrainedBias(cell)


def _biases(cell: nn.Cell) -> dict[str, Parameter]:
    """Return the biases that the base has in a cell, without those of an adapter."""
    own = cell.delta_parameters() if isinstance(cell, Delta) else {}
    return {name: item for name, item in cell.parameters_and_names(expand=False)
            if name.endswith("bias") and name not in own}
