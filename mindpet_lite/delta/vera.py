"""VeRA: Vector-based Random Matrix Adaptation.

Kopiczko et al., 2023, https://arxiv.org/abs/2310.11454, eq. 2:

    y = W x + b + Λ_b B Λ_d A x

A and B are random, frozen, and the same for all layers; a layer takes as many columns of A and rows of B as it has
inputs and outputs. It trains the diagonals of Λ_d (one number for each of r ranks) and of Λ_b (one for each output).
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindpet_lite.arguments import check_bool, check_int, check_number, check_probability
from mindpet_lite.delta.adapted import Additive, Method, Numbers
from mindpet_lite.delta.base import Delta
from mindpet_lite.delta.dropout import delta_dropout
from mindpet_lite.delta.hosts import HOSTS, Host, fits_kind, host_of
from mindpet_lite.delta.method_config import MethodConfig
from mindpet_lite.delta.parts import as_type, prefix_of
from mindpet_lite.delta.values import frozen_parameter
from mindpet_lite.formats.peft_method import AdapterState, PeftMethod
from mindpet_lite.formats.torch_random import TorchGenerator

_B, _D = "mindpet_delta_vera_lambda_b", "mindpet_delta_vera_lambda_d"
# What all layers share: A (r, most inputs) and B (most outputs, r).
_SHARED_A, _SHARED_B = "mindpet_shared_vera_a", "mindpet_shared_vera_b"


class VeRA(Additive):
    """A layer with an update through two shared random matrices, between which and after which it trains one vector.

    `mindpet_delta_vera_lambda_b` (outputs,) starts at zero, so that the layer starts as its base, and
    `mindpet_delta_vera_lambda_d` (r,) at `d_initial`. `mindpet_shared_vera_a` (r, most inputs) and
    `mindpet_shared_vera_b` (most outputs, r) are one Parameter each in the whole net, in float32. `scaling` () is the
    strength. The rule for types is that of `mindpet_lite.LoRADense`.
    """

    method = "vera"

    @classmethod
    def shapes(cls, layer: nn.Cell, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the two vectors."""
        return {_B: (cls.outputs(layer),), _D: (config.r,)}

    def starts(self, config: Any) -> dict[str, np.ndarray]:
        """Return zeros and `d_initial`; with ``init_weights=False`` ones and normal numbers, as PEFT."""
        if config.init_weights:
            return {_B: np.zeros(self.outputs(self)), _D: np.full(config.r, config.d_initial)}
        return {_B: np.ones(self.outputs(self)), _D: np.random.standard_normal(config.r)}

    def prepare(self, config: Any) -> None:
        """Keep what part of the shared matrices the layer takes, and make its operators.

        Raises:
            ValueError: the layer is built by hand.
        """
        if not self.shared_names:
            raise ValueError("VeRA's layers share two matrices, so that none can be built alone: call get_pet_model().")
        self.add_low_rank_operators(config.r)
        self.part_of_a, self.part_of_b = (config.r, self.inputs(self)), (self.outputs(self), config.r)
        self.cuts_a = tuple(self.mindpet_shared_vera_a.shape) != self.part_of_a
        self.cuts_b = tuple(self.mindpet_shared_vera_b.shape) != self.part_of_b
        self.has_dropout = config.vera_dropout > 0
        if self.has_dropout:
            self.vera_dropout = delta_dropout(float(config.vera_dropout))

    def update(self, h: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return s Λ_b B Λ_d A h, B scaled before the product: its rows are fewer numbers than the outputs."""
        if self.has_dropout:
            h = self.vera_dropout(h)
        a, b = self.mindpet_shared_vera_a, self.mindpet_shared_vera_b
        if self.cuts_a:
            a = ops.slice(a, (0, 0), self.part_of_a)
        if self.cuts_b:
            b = ops.slice(b, (0, 0), self.part_of_b)
        between = as_type(self.mindpet_delta_vera_lambda_d, mindspore.float32) * self.scaling
        low = self.narrow(h, a, dtype) * as_type(between, dtype)
        rows = ops.reshape(as_type(self.mindpet_delta_vera_lambda_b, mindspore.float32), (-1, 1))
        return self.widen(low, b * rows, dtype)

    @staticmethod
    def delta(tensors: Numbers, settings: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
        """Return Λ_b B Λ_d A for a weight of this shape."""
        a, b = tensors[_SHARED_A][:, :shape[1]], tensors[_SHARED_B][:shape[0]]
        return (tensors[_B][:, None] * b) @ (tensors[_D][:, None] * a)

    def unlike(self, settings: Mapping[str, Any]) -> list[str]:
        """Return nothing: the rank shows in the tensors, dropout may differ, and all else is taken over."""
        return []

    def adopt_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over what the file says of the shared matrices and of the start."""
        self.config = dataclasses.replace(self.config, **{name: settings[name] for name in _ADOPTED
                                                          if name in settings})


_ADOPTED = ("d_initial", "projection_prng_key", "save_projection")


class _File(PeftMethod):
    """With ``save_projection`` false PEFT's file lacks the shared matrices: they are drawn again, from the key."""

    def for_file(self, state: AdapterState) -> AdapterState:
        """Return the adapter without the matrices where the key gives them; else the file must hold them."""
        settings = [layer.settings or {} for layer in state.layers.values()]
        if all(item.get("save_projection", True) for item in settings):
            return state
        a, b = state.shared[_SHARED_A], state.shared[_SHARED_B]
        drawn = _projections(settings[0]["projection_prng_key"], a.shape[0], a.shape[1], b.shape[0])
        if np.array_equal(drawn[_SHARED_A], a) and np.array_equal(drawn[_SHARED_B], b):
            return dataclasses.replace(state, shared={})
        return dataclasses.replace(state, layers={
            path: dataclasses.replace(layer, settings={**(layer.settings or {}), "save_projection": True})
            for path, layer in state.layers.items()})

    def from_file(self, state: AdapterState) -> AdapterState:
        """Check that the file holds both matrices, or neither where the key is to give them."""
        says = state.config.get("save_projection", True)
        missing = [key for name, key in self.shared.items() if name not in state.shared]
        if missing and (says or len(missing) == 1):
            raise ValueError(f"it lacks {' and '.join(missing)}, which "
                             f"{'save_projection says that it holds' if says else 'go together'}.")
        return state

    def drawn(self, state: AdapterState, shapes: Iterable[tuple[int, ...]]) -> Mapping[str, np.ndarray]:
        """Return A and B, drawn for the largest of these weights where the file keeps the key alone."""
        shapes = [shape for shape in shapes if len(shape) == 2]
        if state.shared or not shapes:
            return state.shared
        outputs, inputs = (max(sizes) for sizes in zip(*shapes))
        layer = next(iter(state.layers.values()))
        key = (layer.settings or {}).get("projection_prng_key", self.fields["projection_prng_key"])
        return _projections(key, len(layer.tensors[_D]), inputs, outputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeraConfig(MethodConfig):
    """Settings of VeRA; the names are PEFT's.

    All layers of an adapter share two random matrices, as large as its largest layers need. They are drawn from
    `projection_prng_key` as PEFT draws them, bit for bit. Layers that are adapted later use those that are there.

    Args:
        r: the number of ranks; positive. It costs few trained numbers, so it is larger than LoRA's. Default: 256.
        vera_dropout: rate of dropout before A, in [0, 1). Default: 0.0.
        d_initial: what the vector between A and B starts at; a finite number. Default: 0.1.
        projection_prng_key: the seed of A and B, from -2^63 to below 2^64. Default: 0.
        save_projection: whether adapter files hold A and B. Without them, whoever reads a file draws them again.
            Default: True.
        init_weights: True starts at the base; False at random. Default: True.
        bias: which biases of the base train too: "none", "all", or "vera_only", those of the adapted layers.
            Default: "none".

    Raises:
        TypeError, ValueError: a field is not what it must be.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.VeraConfig(r=16, target_modules=["0", "2"]))
        >>> sum(item.size for item in net.trainable_params())
        42
    """

    pet_type: ClassVar[str] = "vera"
    layer: ClassVar[type[Method]] = VeRA
    title: ClassVar[str] = "VeRA"
    fits: ClassVar[tuple[type[Host], ...]] = tuple(host for host in HOSTS if host.is_linear)
    peft: ClassVar[PeftMethod] = _File(
        "VERA", {_B: "vera_lambda_b", _D: "vera_lambda_d"},
        {"r": 256, "vera_dropout": 0.0, "d_initial": 0.1, "projection_prng_key": 0, "save_projection": True},
        shared={_SHARED_A: "base_model.vera_A", _SHARED_B: "base_model.vera_B"},
        written={"fan_in_fan_out": False, "init_weights": True}, bias="vera_only")

    r: int = 256
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    projection_prng_key: int = 0
    save_projection: bool = True
    init_weights: bool = True
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("r", self.r)
        check_probability("vera_dropout", self.vera_dropout)
        if not np.isfinite(check_number("d_initial", self.d_initial)):
            raise ValueError(f"d_initial must be finite, but got {self.d_initial}.")
        check_int("projection_prng_key", self.projection_prng_key, -2 ** 63)
        if self.projection_prng_key >= 2 ** 64:
            raise ValueError(f"projection_prng_key must be below 2^64, as PyTorch's seeds are, but got "
                             f"{self.projection_prng_key}.")
        check_bool("save_projection", self.save_projection)
        check_bool("init_weights", self.init_weights)

    @classmethod
    def share(cls, layers: Mapping[str, tuple[nn.Cell, Any]], given: Mapping[str, np.ndarray]) -> dict[str, Parameter]:
        """Return A and B for the largest of the layers: those that are given, else drawn from the key.

        Raises:
            ValueError: the layers differ in rank or key, or what is given is too small for them.
        """
        hosts = [(host_of(cell), cell, config) for cell, config in layers.values()]
        fitting = [(host, cell, config) for host, cell, config in hosts if host and fits_kind(host, cls.fits)]
        if not fitting:
            return {}
        inputs = max(host.inputs(cell) for host, cell, _ in fitting)
        outputs = max(host.outputs(cell) for host, cell, _ in fitting)
        if len({(config.r, config.projection_prng_key) for *_, config in fitting}) > 1:
            raise ValueError("VeRA's layers share two matrices, so r and projection_prng_key must be the same for all "
                             "of them.")
        host, first, config = fitting[0]
        values = {name: np.asarray(given[name], np.float32) for name in (_SHARED_A, _SHARED_B) if name in given}
        if values:
            _check_given(values, config.r, inputs, outputs)
        else:
            values = _projections(config.projection_prng_key, config.r, inputs, outputs)
        # Beside the first layer's weight, whose name no other net around it has.
        prefix = prefix_of(getattr(first, host.base_names[0]).name)
        return {name: frozen_parameter(Tensor(value), prefix + name) for name, value in values.items()}

    def beside(self, present: Iterable[Delta]) -> list[str]:
        """Return where this rank or key is not that of the layers that the net has already."""
        others = [delta.config for delta in present if isinstance(delta, VeRA)]
        return [f"{name} is {getattr(self, name)!r}, but the net's layers with VeRA have {getattr(others[0], name)!r}, "
                f"and all share two matrices: take the same."
                for name in ("r", "projection_prng_key", "save_projection")
                if others and getattr(others[0], name) != getattr(self, name)]


def _projections(key: int, r: int, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    """Return A (r, inputs) and B (outputs, r) as PEFT draws them: He et al.'s uniform numbers, A first."""
    generator = TorchGenerator(key)
    return {_SHARED_A: generator.kaiming_uniform((r, inputs)), _SHARED_B: generator.kaiming_uniform((outputs, r))}


def _check_given(values: Numbers, r: int, inputs: int, outputs: int) -> None:
    """Raise ValueError unless A and B are there, of this rank, and large enough."""
    shapes = {name: value.shape for name, value in values.items()}
    a, b = (shapes.get(name, ()) for name in (_SHARED_A, _SHARED_B))
    if len(a) != 2 or len(b) != 2 or a[0] != r or b[1] != r or a[1] < inputs or b[0] < outputs:
        raise ValueError(f"VeRA's shared matrices must be A of ({r}, {inputs} or more) and B of ({outputs} or more, "
                         f"{r}) for these layers, but A is {a or 'missing'} and B is {b or 'missing'}: adapt all "
                         f"layers at once, by one config, or load a file into a net of the sizes that it is for.")
