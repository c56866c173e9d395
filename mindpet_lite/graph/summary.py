"""The table of adapted layers."""
from __future__ import annotations

import dataclasses
import math

from mindspore import nn

from mindpet_lite.graph.adapters import adapters_of, bring_up_to_date, deltas_in, saved_of
from mindpet_lite.graph.freeze import TrainableReport, count
from mindpet_lite.graph.parameters import net_parameters
from mindpet_lite.graph.quantise import described, quantised_in
from mindpet_lite.graph.tree import cells_by_path

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Summary:
    """The adapted layers of a net, a row each (path, layer, method, settings, shapes, size), and the counts.

    `saved` names the Parameters of the base that belong to the adapter; `notes` say what a config left to this package.
    `quantised` says how many layers are, what they
    take in memory, and how much rounding changed; it is empty where none is.

    Args:
        rows: a row for each adapted layer: path, layer, method, settings, shapes, size.
        saved: the names of the base's Parameters that belong to the adapter.
        report: how many elements train, of how many.
        notes: what a config left to this package, a sentence each. Default: ().
        quantised: how many layers are quantised, what they take in memory, and how much rounding changed; empty where
            none is. Default: "".

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> table = mp.summary(net)
        path  layer      method  settings                                   delta shapes   delta params
        -----------------------------------------------------------------------------------------------
        0     LoRADense  lora    lora_rank=2, lora_alpha=4, lora_dropout=0  (2, 4) (8, 2)  24
        1 adapted layers
        trainable params: 24 || all params: 82 || trainable%: 29.2683
        >>> table
        <Summary of 1 layers>
        >>> table.rows[0][0], table.report.trainable
        ('0', 24)
    """

    rows: tuple[tuple[str, ...], ...]
    saved: tuple[str, ...]
    report: TrainableReport
    notes: tuple[str, ...] = ()
    quantised: str = ""

    def __repr__(self) -> str:
        # Short: a terminal shows it below what `summary` has printed.
        return f"<Summary of {len(self.rows)} layers>"

    def __str__(self) -> str:
        head = ("path", "layer", "method", "settings", "delta shapes", "delta params")
        table = [head, *self.rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
        lines.insert(1, "-" * max(map(len, lines)))
        lines += [f"{len(self.rows)} adapted layers", *self.notes]
        if self.saved:
            more = f" and {len(self.saved) - _SHOWN} more" if len(self.saved) > _SHOWN else ""
            lines.append(f"and {len(self.saved)} parameters of the base: {', '.join(self.saved[:_SHOWN])}{more}")
        if self.quantised:
            lines.append(f"quantised layers: {self.quantised}")
        return "\n".join([*lines, str(self.report)])


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def summary(net: nn.Cell) -> Summary:
    """Print and return the adapted layers of `net`, with shapes, ranks and counts.

    Args:
        net: any Cell; without adapters the table has no row.

    Raises:
        TypeError: `net` is no Cell.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> table = mp.summary(net)
        path  layer      method  settings                                   delta shapes   delta params
        -----------------------------------------------------------------------------------------------
        0     LoRADense  lora    lora_rank=2, lora_alpha=4, lora_dropout=0  (2, 4) (8, 2)  24
        1 adapted layers
        trainable params: 24 || all params: 82 || trainable%: 29.2683
    """
    rows = []
    cells = cells_by_path(net)
    found = deltas_in(cells)
    bring_up_to_date(found)
    for path, cell in found.items():
        parameters = cell.delta_parameters().values()
        settings = ", ".join(f"{name}={_shown(value)}" for name, value in cell.settings().items())
        if cell.strength != 1.0:
            settings += f", strength={cell.strength:g}"
        if cell.cost():
            settings += f"; {cell.cost()}"
        rows.append((path or "(the net itself)", type(cell).__name__, cell.method, settings,
                     " ".join(str(tuple(parameter.shape)) for parameter in parameters),
                     f"{sum(math.prod(parameter.shape) for parameter in parameters):,}"))
    own = {id(item) for delta in found.values() for item in delta.delta_parameters().values()}
    layers = quantised_in(cells)
    saved = saved_of(found.values()).keys() - own
    result = Summary(tuple(rows), tuple(names[0] for item, names in net_parameters(net) if id(item) in saved),
                     count(net), tuple(record.note for record in adapters_of(found.values()) if record.note),
                     described(layers) if layers else "")
    print(result)
    return result
