"""The kinds of frozen layers that methods sit on: one file a kind, and `HOSTS`, the only table of them."""
from __future__ import annotations

from mindspore import nn

from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.hosts.base import (
    Host,
    TypedCell,
    as_running,
    keeps_types,
    override_refusal,
    require_float,
    rewritten_refusal,
    take_types,
)
from mindpet_lite.delta.hosts.conv import (
    Conv1dHost,
    Conv2dHost,
    Conv3dHost,
    MintConv1dHost,
    MintConv2dHost,
    MintConv3dHost,
)
from mindpet_lite.delta.hosts.dense import DenseHost
from mindpet_lite.delta.hosts.embedding import EmbeddingHost, MintEmbeddingHost
from mindpet_lite.delta.hosts.int8 import Int8Dense
from mindpet_lite.delta.hosts.linear import LinearHost
from mindpet_lite.delta.hosts.nf4 import NF4Dense
from mindpet_lite.delta.hosts.q8_0 import Q8Dense
from mindpet_lite.delta.hosts.quantised import Quantised
from mindpet_lite.delta.hosts.split import ColumnDense, RowDense, SplitDense
from mindpet_lite.delta.hosts.transposed import TransposedHost

HOSTS: tuple[type[Host], ...] = (
    DenseHost,
    LinearHost,
    Conv1dHost,
    Conv2dHost,
    Conv3dHost,
    EmbeddingHost,
    MintConv1dHost,
    MintConv2dHost,
    MintConv3dHost,
    MintEmbeddingHost,
    TransposedHost,
    Int8Dense,
    Q8Dense,
    NF4Dense,
)
# The layers that `quantize_base` makes, by what it calls them.
QUANTISED: dict[str, type[Quantised]] = {host.quantised_kind: host for host in HOSTS if issubclass(host, Quantised)}

# Layers of which each process has a part. A method fits them where it knows which of its numbers are parts then.
SPLIT_HOSTS: tuple[type[Host], ...] = (ColumnDense, RowDense)

__all__ = ["DenseHost", "HOSTS", "Host", "LinearHost", "QUANTISED", "Quantised", "SPLIT_HOSTS", "SplitDense",
           "TransposedHost", "TypedCell", "as_running", "host_of", "host_refusal", "is_linear", "keeps_types",
           "override_refusal", "require_float", "rewritten_refusal", "take_types"]


def host_of(cell: nn.Cell) -> type[Host] | None:
    """Return the kind of host that a plain or adapted cell is, or None."""
    return next((host for host in (*SPLIT_HOSTS, *HOSTS) if host.matches(cell)), None)


def is_linear(cell: nn.Cell) -> bool:
    """Tell whether ``"all-linear"`` means this cell: a linear layer that is not adapted."""
    host = host_of(cell)
    return host is not None and host.is_linear and not isinstance(cell, Delta)


def host_refusal(cell: nn.Cell, method: str, fits: tuple[type[Host], ...] = HOSTS) -> str | None:
    """Return why the method of this name cannot adapt `cell`, or None if it can.

    Args:
        cell: any cell.
        method: its name in a sentence.
        fits: the kinds of hosts that it goes with.
    """
    kind = type(cell).__name__
    if isinstance(cell, Delta):
        return f"a {kind} is adapted already{'.' if cell.unmergeable else '; merge() it first.'}"
    host = host_of(cell)
    if host is None or host not in fits:
        first, *more = (item.plain_name for item in fits)
        besides = f" besides {first.rpartition('.')[2]} it knows {', '.join(more)}." if more else ""
        return rewritten_refusal(cell) or f"{method} adapts {first}, not {kind}{';' if more else '.'}{besides}"
    return host.refusal(cell, method)
