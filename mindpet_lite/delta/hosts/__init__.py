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
from mindpet_lite.delta.hosts.mindformers import KINDS as FORMERS
from mindpet_lite.delta.hosts.mindformers import experts_refusal
from mindpet_lite.delta.hosts.nf4 import NF4Dense
from mindpet_lite.delta.hosts.q8_0 import Q8Dense
from mindpet_lite.delta.hosts.quantised import Quantised
from mindpet_lite.delta.hosts.split import ColumnDense, RowDense, SplitDense
from mindpet_lite.delta.hosts.transposed import TransposedHost
from mindpet_lite.delta.hosts.users import Kind, add_host, check_host, linear_host

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
    *FORMERS,
    Int8Dense,
    Q8Dense,
    NF4Dense,
)
# The layers that `quantize_base` makes, by what it calls them.
QUANTISED: dict[str, type[Quantised]] = {host.quantised_kind: host for host in HOSTS if issubclass(host, Quantised)}

# Layers of which each process has a part. A method fits them where it knows which of its numbers are parts then.
SPLIT_HOSTS: tuple[type[Host], ...] = (ColumnDense, RowDense)

# Those that users add. They are looked up first: a layer of a class that is made from nn.Dense is theirs.
_USERS: list[type[Host]] = []

__all__ = ["DenseHost", "HOSTS", "Host", "LinearHost", "QUANTISED", "Quantised", "SPLIT_HOSTS", "SplitDense",
           "TransposedHost", "TypedCell", "as_running", "fits_kind", "host_of", "host_refusal", "is_linear",
           "keeps_types", "linear_host", "override_refusal", "register_host", "require_float", "rewritten_refusal",
           "take_types", "unregister_host"]


def register_host(host: Kind) -> Kind:
    """Add a kind of layer: every method fits it that fits the kinds of its nature that are built in.

    Layers of its class are adapted, merged, saved and loaded like those of MindSpore then, and ``"all-linear"`` means
    them where `is_linear` says so. It holds for this process: a program that loads an adapter registers the kind too.
    A kind for a class X is a class ``XHost(Host, X)``, see :class:`Host`, or ``linear_host(X)``. It is looked up before
    those that are built in, and before the kinds of X's parents.

    Args:
        host: the kind.

    Returns:
        `host`, so that it can stand before the class as a decorator.

    Raises:
        TypeError: it is no kind of host, or lacks `plain_type` or another part that every kind has.
        ValueError: its `plain_type` has a kind already, or is a parent of one that is built in.

    Examples:
        >>> from mindspore import nn
        >>> import mindpet_lite as mp
        >>> class Head(nn.Dense):
        ...     def construct(self, x):
        ...         return self.matmul(x, self.weight) + self.bias
        >>> HeadHost = mp.register_host(mp.linear_host(Head))
        >>> mp.get_pet_model(nn.SequentialCell(Head(4, 2)), mp.LoraConfig(2, 4, target_modules=["0"]))[0].lora_rank
        2
        >>> mp.unregister_host(HeadHost)
    """
    add_host(check_host(host), _USERS, (*HOSTS, *SPLIT_HOSTS))
    return host


def unregister_host(host: type[Host]) -> None:
    """Take back what `register_host` added; layers that are adapted already stay so.

    Args:
        host: the kind.

    Raises:
        ValueError: it is not registered.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> class Plain(nn.Dense):
        ...     pass
        >>> host = mp.register_host(mp.linear_host(Plain))
        >>> mp.unregister_host(host)
    """
    if host not in _USERS:
        raise ValueError(f"{getattr(host, '__name__', repr(host))} is not registered"
                         + (f"; registered are {', '.join(item.__name__ for item in _USERS)}." if _USERS else "."))
    _USERS.remove(host)


def host_of(cell: nn.Cell) -> type[Host] | None:
    """Return the kind of host that a plain or adapted cell is, or None."""
    return next((host for host in (*_USERS, *SPLIT_HOSTS, *HOSTS) if host.matches(cell)), None)


def fits_kind(host: type[Host], fits: tuple[type[Host], ...]) -> bool:
    """Tell whether a kind is among those that a method goes with; one that a user added, if all of its nature are."""
    if host not in _USERS:
        return host in fits
    alike = [kind for kind in HOSTS if (kind.takes_ids, kind.dims) == (host.takes_ids, host.dims)]
    return bool(alike) and all(kind in fits for kind in alike)


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
    if host is None or not fits_kind(host, fits):
        first, *more = (item.plain_name for item in fits)
        besides = f" besides {first.rpartition('.')[2]} it knows {', '.join(more)}." if more else ""
        reason = f"{method} adapts {first}, not {kind}{';' if more else '.'}{besides}"
        return rewritten_refusal(cell) or experts_refusal(cell) or reason
    return host.refusal(cell, method)
