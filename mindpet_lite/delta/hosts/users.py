"""Kinds of layers that a user's own code adds: `register_host`, and `linear_host` for linear layers."""
from __future__ import annotations

from typing import TypeVar

from mindspore import Parameter, Tensor, nn

from mindpet_lite.delta.base import Delta, type_refusal
from mindpet_lite.delta.hosts.base import Host, override_refusal
from mindpet_lite.delta.hosts.rows import TurnedHost
from mindpet_lite.delta.parts import WEIGHT_NAMES

Kind = TypeVar("Kind", bound=type[Host])

# What every kind has to say, and the steps that it has to write.
_SAYS = ("plain_type", "plain_name", "parts")
_WRITES = ("linear", "affine", "add_low_rank_operators", "narrow", "widen")


def check_host(host: object) -> type[Host]:
    """Return a user's kind of host.

    Raises:
        TypeError: it is no subclass of Host, or an adapted one; or it lacks what every kind has to say or write.
    """
    if not isinstance(host, type) or not issubclass(host, Host) or issubclass(host, Delta):
        raise TypeError(f"register_host takes a kind of layer, a class XHost(mindpet_lite.Host, X) for your class X, "
                        f"but got {host!r:.100}. For a linear layer X write register_host(linear_host(X)).")
    missing = [name for name in _SAYS if not hasattr(host, name)]
    if missing:
        raise TypeError(f"{host.__name__} has no {', '.join(missing)}: set {missing[0]} in the class; CONTRIBUTING.md, "
                        f"\"Add a kind of layer\", says what each means.")
    if not isinstance(host.plain_type, type) or not issubclass(host.plain_type, nn.Cell):
        raise TypeError(f"{host.__name__}.plain_type must be the class of the plain layer, a subclass of "
                        f"mindspore.nn.Cell, but is {host.plain_type!r:.100}.")
    if not issubclass(host, host.plain_type):
        raise TypeError(f"{host.__name__} must be a subclass of its plain_type {host.plain_type.__name__} too: write "
                        f"class {host.__name__}(Host, {host.plain_type.__name__}).")
    unwritten = [name for name in _WRITES if getattr(host, name) is getattr(Host, name)]
    if unwritten:
        raise TypeError(f"{host.__name__} does not write {', '.join(unwritten)}: see mindpet_lite.Host for what each "
                        f"does; for a linear layer linear_host({host.plain_type.__name__}) writes them.")
    return host


def add_host(host: type[Host], known: list[type[Host]], built_in: tuple[type[Host], ...]) -> None:
    """Put a user's kind among those that are known: before the kinds of its plain class's parents.

    Raises:
        ValueError: its layers are of a kind that is there already.
    """
    for other in (*known, *built_in):
        if other.plain_type is host.plain_type or other is host:
            again = "" if other in built_in else f" Call unregister_host({other.__name__}) first."
            raise ValueError(f"{other.plain_name} is a kind of layer that is known already, by "
                             f"{other.__name__}.{again}")
    hidden = next((other for other in built_in if issubclass(other.plain_type, host.plain_type)), None)
    if hidden is not None:
        raise ValueError(f"{host.plain_type.__name__} is a parent of {hidden.plain_name}, so {host.__name__} would "
                         f"take its layers: give plain_type a class of your own.")
    at = next((index for index, other in enumerate(known) if issubclass(host.plain_type, other.plain_type)), len(known))
    known.insert(at, host)
    # By these names the adapter's own Parameters know what to stand beside.
    WEIGHT_NAMES.add(host.base_names[0])


class LinearClassHost(TurnedHost):
    """A user's linear layer: y = x Wᵀ + b with nothing else in it."""

    taken_names: tuple[str, ...] = ()

    @classmethod
    def refusal(cls, cell: nn.Cell, method: str) -> str | None:
        """Return why `cell` cannot be adapted: it computes otherwise, or holds more than a weight and a bias."""
        own = dict(cell.parameters_and_names(expand=False))
        missing = [name for name in cls.base_names if not hasattr(cell, name)]
        if missing or getattr(cell, cls.base_names[0]) is None:
            return (f"the {type(cell).__name__} has no Parameter {(missing or cls.base_names)[0]!r}: say in "
                    f"linear_host what its weight and bias are called.")
        if own[cls.base_names[0]].ndim != 2:
            return (f"the weight of a linear layer has two axes, but {cls.base_names[0]} of the {type(cell).__name__} "
                    f"has the shape {tuple(own[cls.base_names[0]].shape)}.")
        more = [*(set(own) - set(cls.base_names)), *(name for name, _ in cell.name_cells().items())]
        if more and not isinstance(cell, cls):
            return (f"the {type(cell).__name__} holds {more[0]} besides its weight and bias, so it is not the x Wᵀ + b "
                    f"that linear_host is for: write a class of its own on mindpet_lite.Host.")
        return (override_refusal(cell, cls.plain_type, cls.plain_name, method)
                or type_refusal(getattr(cell, cls.base_names[0]), method))

    @classmethod
    def _take_parts(cls, layer: nn.Cell, source: nn.Cell) -> None:
        """Take over the layer's own attributes too, such as sizes, which the cells around it may read."""
        names = source.taken_names if isinstance(source, LinearClassHost) else tuple(
            name for name, value in vars(source).items()
            if not name.startswith("_") and name not in vars(layer) and not isinstance(value, (Parameter, nn.Cell)))
        for name in names:
            setattr(layer, name, getattr(source, name))
        super()._take_parts(layer, source)
        layer.taken_names = names
        if len(cls.base_names) == 1:
            layer.bias = None

    def extend_repr(self) -> str:
        """Show the sizes."""
        outputs, inputs = self.logical_shape(self)
        return f"inputs={inputs}, outputs={outputs}"


class _NamedWeight(LinearClassHost):
    """One whose weight has another name."""

    @property
    def weight(self) -> Parameter:
        """The weight, by the name that other kinds have for it."""
        return getattr(self, self.base_names[0])


class _NamedBias(LinearClassHost):
    """One whose bias has another name."""

    @property
    def bias(self) -> Tensor:
        """The bias, by the name that other kinds have for it."""
        return getattr(self, self.base_names[1])


def linear_host(layer: type[nn.Cell], weight: str = "weight", bias: str | None = "bias", is_turned: bool = False,
                name: str = "") -> type[Host]:
    """Return the kind of a linear layer of any class, for `register_host`.

    The layer must compute y = x Wᵀ + b for x (*, inputs), nothing else: no activation, no second input. Where it is
    adapted, plain matrix products compute that in the place of its own `construct`.

    Args:
        layer: its class.
        weight: the attribute that holds W, (outputs, inputs). Default: "weight".
        bias: the attribute that holds b (outputs,), which may hold None; None where the class has none. Default:
            "bias".
        is_turned: W lies as (inputs, outputs), for y = x W + b. Default: False.
        name: what messages call it; the name of the class where it is empty. Default: "".

    Raises:
        TypeError: `layer` is no subclass of nn.Cell; a name is no text.

    Examples:
        >>> import numpy as np
        >>> from mindspore import Parameter, Tensor, nn, ops
        >>> import mindpet_lite as mp
        >>> class Projection(nn.Cell):
        ...     def __init__(self, inputs, outputs):
        ...         super().__init__()
        ...         self.kernel = Parameter(Tensor(np.ones((inputs, outputs), np.float32)))
        ...     def construct(self, x):
        ...         return ops.matmul(x, self.kernel)
        >>> host = mp.register_host(mp.linear_host(Projection, weight="kernel", bias=None, is_turned=True))
        >>> net = nn.SequentialCell(Projection(8, 4))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules="all-linear"))
        >>> [item.name for item in net.trainable_params()]
        ['0.mindpet_delta_lora_a', '0.mindpet_delta_lora_b']
        >>> mp.unregister_host(host)
    """
    if not isinstance(layer, type) or not issubclass(layer, nn.Cell):
        raise TypeError(f"linear_host takes the class of a layer, a subclass of mindspore.nn.Cell, but got "
                        f"{layer!r:.100}.")
    for what, value in (("weight", weight), *([] if bias is None else [("bias", bias)])):
        if not isinstance(value, str) or not value.isidentifier():
            raise TypeError(f"{what} must be the name of an attribute, but got {value!r:.100}.")
    bases = (*([_NamedWeight] if weight != "weight" else []), *([_NamedBias] if bias not in (None, "bias") else []))
    return type(f"{layer.__name__}Host", (*(bases or (LinearClassHost,)), layer), {
        "__doc__": f"`{name or layer.__name__}` with the dtype rule.", "__module__": layer.__module__,
        "plain_type": layer, "plain_name": name or layer.__name__, "lies_turned": bool(is_turned),
        "base_names": (weight,) if bias is None else (weight, bias)})
