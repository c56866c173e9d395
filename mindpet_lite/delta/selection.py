"""A delta without a cell: Parameters that a layer of the net has, and that a method trains where they are."""
from __future__ import annotations

from typing import Any

from mindspore import Parameter, Tensor, nn

from mindpet_lite.delta.base import Delta


class Selection(Delta):
    """The Parameters of a layer that a method trains; the layer itself stays as it is.

    The record of the adapter (`graph.adapters.Adapter`) keeps the base's values of them. So the adapter is switched off
    by exchanging values. A strength between would leave neither the trained values nor the base's in place, and
    training and files take what is in place for the trained ones: `fixed` says that.
    """

    fixed = ("what trains are the layer's own Parameters: a part of the change, written into them, would be trained "
             "and saved as if it were the whole. adapters_disabled() puts the base's values in their place.")

    def __init__(self, cell: nn.Cell) -> None:
        self.cell = cell

    @classmethod
    def chosen(cls, cell: nn.Cell) -> dict[str, Parameter]:
        """Return what the method trains of a layer, by the names that files have for it."""
        raise NotImplementedError(f"{cls.__name__}.chosen() is missing: write it")

    @property
    def base_layer(self) -> nn.Cell:
        """The layer that the Parameters are in."""
        return self.cell

    def delta_parameters(self) -> dict[str, Parameter]:
        """Return what trains."""
        return self.chosen(self.cell)

    def setting_values(self) -> dict[str, Any]:
        """Return nothing: there is no Parameter that only steers."""
        return {}

    def merged_value(self) -> dict[Parameter, Tensor]:
        """Return nothing: the trained values stand in the layer already."""
        return {}

    def plain_cell(self) -> nn.Cell:
        """Return the layer: with its Parameters frozen again it is plain."""
        return self.cell
