"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models.

Ben Zaken et al., 2021, https://arxiv.org/abs/2106.10199.

    y = act(x Wᵀ + b)                                                                    (section 3: only b is trained)

Nothing is added to the net: its own biases train, all else is frozen.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from mindspore import Parameter, Tensor, nn

from mindpet_lite.delta.base import Delta, DeltaConfig


class TrainedBias(Delta):
    """The biases that a layer has and BitFit trains; the layer itself stays as it is."""

    method: ClassVar[str] = "bitfit"
    fixed = "the trained biases are the layer's own, so there is no delta beside them to scale or to switch off."

    def __init__(self, cell: nn.Cell) -> None:
        self.cell = cell
        self.delta_names = tuple(_biases(cell))

    def delta_parameters(self) -> dict[str, Parameter]:
        """Return the layer's biases by attribute name."""
        return _biases(self.cell)

    def merged_value(self) -> dict[Parameter, Tensor]:
        """Return nothing: the trained values stand in the layer already."""
        return {}

    def plain_cell(self) -> nn.Cell:
        """Return the layer: with its biases frozen again it is plain."""
        return self.cell


@dataclasses.dataclass(frozen=True)
class BitFitConfig(DeltaConfig):
    """Settings of BitFit: those of :class:`DeltaConfig`; without `target_modules` every bias of the net trains.

    A bias is a Parameter whose attribute name ends in ``bias``, as `freeze_delta(net, "bitfit")` takes it; the shift
    of a LayerNorm (`beta`) can be trained too with ``freeze_exclude=["*beta"]``; such a net is saved by
    `TrainableParamsCheckPoint`, not as an adapter.

    Raises:
        ValueError: `modules_to_save` is given.
    """

    pet_type: ClassVar[str] = "bitfit"
    all_by_default: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modules_to_save:
            raise ValueError("BitFit adds nothing that tells its biases from other trained parameters, so it cannot "
                             "save modules_to_save beside them: leave it out.")

    @classmethod
    def trained_pattern(cls) -> str:
        """Return the pattern of the biases."""
        return "*bias"

    @classmethod
    def thawed(cls, cells: Mapping[str, nn.Cell]) -> dict[str, Delta]:
        """Return the layers with a trained bias in a net where biases, and nothing else, train."""
        training = {id(cell): (path, [name for name, item in cell.parameters_and_names(expand=False)
                                      if item.requires_grad]) for path, cell in reversed(list(cells.items()))}
        if not all(name.endswith("bias") for _, names in training.values() for name in names):
            return {}
        return {path: TrainedBias(cells[path]) for path, names in reversed(list(training.values())) if names}

    @classmethod
    def refusal(cls, cell: nn.Cell) -> str | None:
        """Return why `cell` has nothing for BitFit to train, or None."""
        if isinstance(cell, Delta):
            return f"a {type(cell).__name__} is adapted already; merge() it first."
        return None if _biases(cell) else f"{type(cell).__name__} has no bias."

    def adapt(self, cell: nn.Cell) -> TrainedBias:
        """Return the view of the layer's biases."""
        return TrainedBias(cell)


def _biases(cell: nn.Cell) -> dict[str, Parameter]:
    return {name: item for name, item in cell.parameters_and_names(expand=False) if name.endswith("bias")}
