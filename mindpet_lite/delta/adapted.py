"""A method on a host: what adapted layers share, and the kinds of change that a method makes.

A method is a class on one of these kinds; `adapted_class` puts it before a host. It is written once, against the host's
steps and sizes, and sits on every kind of layer.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn

from mindpet_lite.delta.base import Delta, overflow
from mindpet_lite.delta.hosts import Host, as_running, keeps_types, take_types
from mindpet_lite.delta.parts import as_type, prefix_of
from mindpet_lite.delta.values import FrozenParameter, setting_parameter

Self = TypeVar("Self", bound="Adapted")
# By name: the tensors of a layer, or its weight and bias.
Numbers = Mapping[str, np.ndarray]


class Adapted(Delta, Host):
    """A host with a delta, on the Parameters of the plain layer.

    A kind of change says in `adapted` what the layer computes, and in `merged` what weight and bias do the same.
    """

    # The adapted layer in a tuple, so that it is no child: `plain_cell` hands back the very same object.
    _plain: tuple[nn.Cell, ...] = ()

    @classmethod
    def _on(cls: type[Self], plain: nn.Cell, settings: Any) -> Self:
        """Return the adapted layer on the Parameter objects of `plain`, which stays as it is."""
        layer = cls.on(cls, plain)
        layer._add_delta(settings)
        layer._plain = (plain,)
        take_types(layer, plain)
        return layer

    def _add_delta(self, config: Any) -> None:
        """Check what the host's own settings ask of the method, and add what it needs."""
        raise NotImplementedError

    def plain_cell(self) -> nn.Cell:
        """Return the layer this one adapts, or one on the same Parameters; with `compute_dtype`, one with it."""
        if self._plain and keeps_types(self, self._plain[0]):
            return as_running(self._plain[0], self)
        host = next(kind for kind in type(self).__mro__ if issubclass(kind, Host) and not issubclass(kind, Delta))
        return as_running(self.on(host if self.compute_dtype else self.plain_type, self), self)

    def merged_cell(self) -> nn.Cell:
        """Return the plain layer, or one of the full type in the place of a quantised one."""
        return self.absorbed(self.plain_cell())

    def cost(self) -> str:
        """Say that the weight is cast on every call, where the layer computes in another type."""
        dtype = self._compute_type()
        if self.takes_ids or dtype == self._own_type():
            return ""
        return f"casts its {self._own_type()} weight to {dtype} on every call"

    def construct(self, x: Tensor) -> Tensor:
        """Apply the layer to `x`."""
        # What is decided here is decided for each layer as a graph is compiled; functions, flags and properties cost
        # the compiler far less than conditions on shapes and types.
        shape, output_type, dtype = self.checked(x.shape), self._output_type(x), self._compute_type()
        x = self._entered(x, dtype)
        h = self.arranged(x)
        if self.in_graph:
            # Not the same rows: so both gradients of x are added to those of its other uses (as in q, k and v) by one
            # kernel.
            y = self.adapted(h, self.arranged(x), dtype)
        else:
            y = self.adapted(h, h, dtype)
        return self.finish(y, shape, output_type, dtype)

    def checked(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the input; raise ValueError where the method cannot take it."""
        return shape

    def adapted(self, h: Tensor, again: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the output before `finish`.

        Args:
            h: the arranged input, for the weight.
            again: the same, for the delta.
            dtype: of both, and of the computation.
        """
        raise NotImplementedError

    def add_parameters(self, trained: Mapping[str, Tensor], steering: Mapping[str, float]) -> None:
        """Make Parameters of what trains and of what the settings say, named beside the weight."""
        prefix = prefix_of(self.weight.name)
        values = dict(trained)
        for name in trained:
            # A Parameter that is given the only reference to a value takes it; else, or by keyword, it copies.
            setattr(self, name, Parameter(values.pop(name), prefix + name))
        for name, number in steering.items():
            setattr(self, name, setting_parameter(number, prefix + name))
        self.delta_names, self.setting_names = tuple(trained), tuple(steering)


class Method(Adapted):
    """A method made by a config alone: its Parameters and settings are those that the config's fields say.

    `scaling` () holds the strength times `factor()`, so that it can change in a running graph.

    A subclass gives `starts` (what trains, as it starts) and either a kind's own functions or `adapted` and `merged`.
    """

    scaling: Parameter
    config: Any

    @classmethod
    def shapes(cls, layer: nn.Cell, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shape of each Parameter that these settings train on a plain layer; nothing is made."""
        raise NotImplementedError

    def starts(self, config: Any) -> dict[str, np.ndarray]:
        """Return the values that training starts from, by the names of `shapes`."""
        raise NotImplementedError

    def _add_delta(self, config: Any) -> None:
        self.check()
        self.config, self.compute_dtype = config, config.compute_dtype
        self.shared_names = tuple(config._shared)
        for name, parameter in config._shared.items():
            # Without renaming it, which a plain assignment would.
            self.insert_param_to_cell(name, parameter)
        shapes, values = self.shapes(self, config), self.starts(config)
        trained = {name: Tensor(np.asarray(values[name], np.float32).reshape(shape)).astype(config.param_init_type)
                   for name, shape in shapes.items()}
        self.add_parameters(trained, {"scaling": self.factor()})
        self.setting_names += tuple(name for name, item in config._shared.items() if isinstance(item, FrozenParameter))
        self.prepare(config)

    def prepare(self, config: Any) -> None:
        """Make what the forward needs besides Parameters, such as operators and constants."""

    def factor(self) -> float:
        """Return what the change is multiplied with at strength 1."""
        return 1.0

    def overflows(self, strength: float) -> str:
        """Return why the scaling cannot be that of this strength, or nothing."""
        return overflow("the strength times the scale", strength * self.factor(), (mindspore.float32,
                                                                                   self._compute_type()))

    def setting_values(self) -> dict[str, Any]:
        """Return strength times `factor()` as the scaling, or 0 where switched off."""
        return {"scaling": self.factor() * self.strength if self.enabled else 0.0}

    def settings(self) -> dict[str, Any]:
        """Return the fields of the config that say how a layer computes."""
        return {name: getattr(self.config, name) for name in self.config.layer_fields()}

    @staticmethod
    def merged(base: Numbers, tensors: Numbers, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the weight, and the bias where it changes, that compute what the adapted layer does.

        Args:
            base: `weight` in the shape that methods see, `bias` where there is one; in float32.
            tensors: what trained, by our names, and what layers share.
            settings: of the layer.

        Raises:
            ValueError: no weight computes that.
        """
        raise NotImplementedError

    @classmethod
    def merged_at(cls, base: Numbers, tensors: Numbers, settings: Mapping[str, Any], strength: float
                  ) -> dict[str, np.ndarray]:
        """Return the same at a strength: so much of the way from the base to `merged`."""
        new = cls.merged(base, tensors, settings)
        if strength == 1.0:
            return new
        return {name: base[name] + np.float32(strength) * (value - base[name]) for name, value in new.items()}

    def merged_value(self) -> dict[Parameter, Tensor]:
        """Return what `merged` says, at the strength of the running net."""
        if self.unmergeable:
            return super().merged_value()
        base = self.base_numbers()
        tensors = {name: item.astype(mindspore.float32).asnumpy() for name, item in self.delta_parameters().items()}
        strength = self.strength if self.enabled else 0.0
        # What is not finite is for the caller to refuse, by name.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            new = self.merged_at(base, {**tensors, **self.shared_numbers()}, self.settings(), strength)
        found = {self.absorbing(): self.as_weight(new["weight"])} if "weight" in new else {}
        if "bias" in new:
            found[self.bias] = Tensor(new["bias"].astype(np.float32)).astype(self.bias.dtype)
        return found

    def shared_numbers(self) -> dict[str, np.ndarray]:
        """Return the tensors that layers share and this one uses, in float32."""
        return {name: getattr(self, name).asnumpy() for name in self.shared_names}

    def extend_repr(self) -> str:
        """Show the settings beside those of the plain layer."""
        return ", ".join([super().extend_repr(), *(f"{name}={value}" for name, value in self.settings().items())])


class Additive(Method):
    """y = finish(W h + b + s · ΔW h): an update beside the weight.

    A subclass writes `delta_weight` in operators and `delta` in numbers; `update` where it has a faster way.
    """

    def adapted(self, h: Tensor, again: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the layer's own output and the update."""
        return self.affine(h, self.own_weight(dtype), dtype) + self.update(again, dtype)

    def update(self, h: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return what s · ΔW makes of the arranged input."""
        weight = self.delta_weight() * self.scaling
        return self.linear(h, self.laid_out(as_type(weight, dtype)), dtype)

    def delta_weight(self) -> Tensor:
        """Return ΔW in `logical_shape`, without `factor()`."""
        raise NotImplementedError

    @staticmethod
    def delta(tensors: Numbers, settings: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
        """Return s · ΔW at strength 1, in the weight's shape."""
        raise NotImplementedError

    @classmethod
    def merged(cls, base: Numbers, tensors: Numbers, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return W + s · ΔW."""
        return {"weight": base["weight"] + cls.delta(tensors, settings, base["weight"].shape)}


class Reweighed(Method):
    """y = finish((W + t (W' - W)) h + b): a new weight W' made from the old, at strength t.

    A subclass writes `new_weight` in operators and `reweigh` in numbers.
    """

    def adapted(self, h: Tensor, again: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return what the weight at the strength makes of the input."""
        weight = as_type(self.logical_weight(), mindspore.float32)
        weight = weight + (self.new_weight(weight) - weight) * self.scaling
        return self.affine(again, self.laid_out(as_type(weight, dtype)), dtype)

    def new_weight(self, weight: Tensor) -> Tensor:
        """Return W' for the weight in float32 and `logical_shape`."""
        raise NotImplementedError

    @staticmethod
    def reweigh(weight: np.ndarray, tensors: Numbers, settings: Mapping[str, Any]) -> np.ndarray:
        """Return W'."""
        raise NotImplementedError

    @classmethod
    def merged(cls, base: Numbers, tensors: Numbers, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return W'."""
        return {"weight": cls.reweigh(base["weight"], tensors, settings)}


# Made once, so that a method on a kind of host is one class for all nets.
_CLASSES: dict[tuple[type, type], Any] = {}


def adapted_class(method: type[Adapted], host: type[Host] | None) -> Any:
    """Return the class of the method's layers on a kind of host.

    Raises:
        TypeError: there is no host.
    """
    if host is None:
        raise TypeError(f"{method.__name__} does not adapt a layer of a kind that is no host.")
    if (method, host) not in _CLASSES:
        name = method.__name__ + host.__name__.removesuffix("Host")
        # A layer that is called, or gives back, more than a Tensor.
        around = {} if host.entrance is None else {"inside": method.construct, "construct": host.entrance}
        _CLASSES[method, host] = type(name, (method, host), {
            "__doc__": f"{method.__name__} on `{host.plain_name}`: {method.__doc__}", "__module__": method.__module__,
            **around})
    return _CLASSES[method, host]
