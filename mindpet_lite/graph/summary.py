"""The table of adapted layers."""
from __future__ import annotations

import dataclasses
import math

from mindspore import nn

from mindpet_lite.graph.freeze import TrainableReport, count
from mindpet_lite.graph.live import deltas_in
from mindpet_lite.graph.tree import cells_by_path


@dataclasses.dataclass(frozen=True)
class Summary:
    """The adapted layers of a net, a row each (path, layer, method, settings, shapes, size), and the counts."""

    rows: tuple[tuple[str, ...], ...]
    report: TrainableReport

    def __str__(self) -> str:
        head = ("path", "layer", "method", "settings", "delta shapes", "delta params")
        table = [head, *self.rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([*lines, f"{len(self.rows)} adapted layers", str(self.report)])


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def summary(net: nn.Cell) -> Summary:
    """Print and return the adapted layers of `net`, with shapes, ranks and counts.

    Raises:
        TypeError: `net` is no Cell.
    """
    rows = []
    for path, cell in deltas_in(cells_by_path(net)).items():
        parameters = cell.delta_parameters().values()
        settings = ", ".join(f"{name}={_shown(value)}" for name, value in cell.settings().items())
        if cell.strength != 1.0:
            settings += f", strength={cell.strength:g}"
        if cell.cost():
            settings += f"; {cell.cost()}"
        rows.append((path or "(the net itself)", type(cell).__name__, cell.method, settings,
                     " ".join(str(tuple(parameter.shape)) for parameter in parameters),
                     f"{sum(math.prod(parameter.shape) for parameter in parameters):,}"))
    result = Summary(tuple(rows), count(net))
    print(result)
    return result
