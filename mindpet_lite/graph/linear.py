"""What ``"all-linear"`` means: as in PEFT every linear layer but the output head."""
from __future__ import annotations

from collections.abc import Iterator, Mapping

from mindspore import nn

from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.delta_config import DeltaConfig


def linear_layers(cells: Mapping[str, nn.Cell], config: DeltaConfig) -> list[str]:
    """Return the paths of the linear layers that are not adapted yet, in the net's order.

    The output head is left out where the net tells which layer that is: by `get_output_embeddings()`, as Hugging Face's
    classes and those of mindone have it, or because its weight is an embedding's table too. A cell with a weight of two
    axes that the method cannot adapt, such as another library's linear class, is among them: it is for the caller to
    refuse by name, not to pass over.

    Args:
        cells: of the net, by path, without those inside adapted ones.
        config: of the method; it tells which cells are linear.
    """
    heads = {id(head) for head in _output_heads(cells)}
    tables = {id(item) for cell in cells.values() if not config.is_linear(cell)
              for _, item in cell.parameters_and_names(expand=False)}
    return [path for path, cell in cells.items() if id(cell) not in heads and (
        config.is_linear(cell) and not any(id(item) in tables for _, item in cell.parameters_and_names(expand=False))
        or _looks_linear(cell) and config.refusal(cell) is not None)]


def _output_heads(cells: Mapping[str, nn.Cell]) -> Iterator[nn.Cell]:
    for cell in cells.values():
        getter = getattr(type(cell), "get_output_embeddings", None)
        if getter is None:
            continue
        try:
            head = getter(cell)
        except (NotImplementedError, AttributeError):
            # A model without a head, by a class that has the method for those with one.
            continue
        if isinstance(head, nn.Cell):
            yield head


def _looks_linear(cell: nn.Cell) -> bool:
    """Tell whether a cell has a weight as linear layers have; a table of embeddings has one too."""
    if isinstance(cell, Delta) or "Embedding" in type(cell).__name__:
        return False
    return any(name == "weight" and item.ndim == 2 for name, item in cell.parameters_and_names(expand=False))
