"""What MindPet's methods share: the Dense that is built by hand, and the config for any linear layer."""
from __future__ import annotations

from typing import Any, ClassVar

from mindspore import nn

from mindpet_lite.arguments import check_bool, check_int
from mindpet_lite.delta.activation import as_activation
from mindpet_lite.delta.adapted import Adapted
from mindpet_lite.delta.hosts import HOSTS, Host, host_of, host_refusal, require_float
from mindpet_lite.delta.hosts.dense import DenseHost
from mindpet_lite.delta.method_config import HostedConfig
from mindpet_lite.delta.parts import check_init


def dense_refusal(cell: nn.Cell, method: str) -> str | None:
    """Return why `cell` is no plain `nn.Dense` that `method` can adapt, or None if it is one."""
    return host_refusal(cell, method, (DenseHost,))


def check_dense(dense: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an nn.Dense that is built by hand, checked, with the activation as a cell.

    Raises:
        TypeError: a size is no int, a flag no bool, an initialiser of no known kind.
        ValueError: a size is not positive; a name of an activation or initialiser is unknown.
    """
    check_int("in_channels", dense["in_channels"])
    check_int("out_channels", dense["out_channels"])
    check_bool("has_bias", dense.get("has_bias", True))
    for name in ("weight_init", "bias_init"):
        # None is nn.Dense's own default where the argument is left out, but no initialiser where it is given.
        if name in dense:
            check_init(name, dense[name])
    return {**dense, "activation": as_activation(dense.get("activation"))}


class AdaptedDense(Adapted, DenseHost):
    """A Dense with a delta that is built by hand: the last base class of the Dense of each of MindPet's methods.

    `weight` (out_channels, in_channels) and `bias` (out_channels,) are where nn.Dense has them. The method, which
    stands before it, adds its Parameters in `_add_delta` and computes in `construct`.
    """

    def __init__(self, in_channels: int, out_channels: int, **dense: Any) -> None:
        super().__init__(**check_dense({"in_channels": in_channels, "out_channels": out_channels, **dense}))
        require_float(self.weight, type(self))

    def strategies(self, matmul: tuple | None, bias: tuple | None,
                   activation: tuple | None) -> list[tuple[str, Any, tuple | None]]:
        """Return the strategies for `shard` of nn.Dense's own operators."""
        return [("strategy_matmul_org", self.matmul, matmul),
                ("strategy_bias_org", self.bias_add if self.has_bias else None, bias),
                ("strategy_activation_org", self.activation, activation)]


class OutputConfig(HostedConfig):
    """The config of a method that changes the output of a linear layer, whatever its weight is."""

    fits: ClassVar[tuple[type[Host], ...]] = tuple(host for host in HOSTS if host.is_linear)

    @classmethod
    def refusal(cls, cell: nn.Cell) -> str | None:
        """Return why `cell` cannot be adapted, or None: a bias that is added later would miss the method."""
        reason, host = super().refusal(cell), host_of(cell)
        if reason is not None or host is None or not host.leaves_bias(cell):
            return reason
        return (f"the bias of this {type(cell).__name__} is added to its output from outside, and {cls.title} needs "
                f"the whole output: use a method that changes the weight, such as LoRA, or leave it out with "
                f"exclude_modules.")
