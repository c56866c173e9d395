"""What LoRA is on every kind of layer: its two factors and their scaling."""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal

from mindpet_lite.arguments import warn_user
from mindpet_lite.delta.base import float64, overflow
from mindpet_lite.delta.dropout import delta_dropout
from mindpet_lite.delta.hosts.split import own_part, whole_shape
from mindpet_lite.delta.inherited_docs import inherit_args
from mindpet_lite.delta.lora.settings import LoraSettings, OwnStart, scale_of
from mindpet_lite.delta.lora.start import DATA_STARTS
from mindpet_lite.delta.lora.starting import HE_UNIFORM, Starting, numbers_of
from mindpet_lite.delta.parts import as_type, initial, prefix_of
from mindpet_lite.formats.starts import takes_from_base

Self = TypeVar("Self", bound="LowRank")


class _UnitNormal(Normal):
    """Normal(1.0) with a name for signatures."""

    def __repr__(self) -> str:
        return "Normal(1.0)"


UNIT_NORMAL = _UnitNormal(1.0)


class LowRank(Starting):
    r"""The LoRA half of an adapted layer: factors A and B, what is optional beside them, and what steers them.

    The update of a weight W is s · B A with s = alpha / rank, or alpha / √rank with `use_rslora`
    (https://arxiv.org/abs/2312.03732, section 4). `scaling` () holds strength · s.

    With `lora_bias`, B has a bias of its own, `mindpet_delta_lora_b_bias`, scaled like B.

    With `use_dora` (DoRA, https://arxiv.org/abs/2402.09353, eq. 5) the weight is m (W + s B A) / ||W + s B A||, the
    norm over all axes but the output's, a constant in training (section 4.3). m is `mindpet_delta_lora_magnitude`; it
    starts at the norm of W, so that the layer starts equal to its base. `scaling` holds s then, and
    `strength_factor` () how much of the way from the base's output to DoRA's is gone. Norms, and m, are float32
    whatever the layer computes in. An output whose W + s B A is zero has no direction to be scaled: its factor
    m / ||W + s B A|| counts as 1, so that it starts as the base, and B's first step gives it a direction.
    """

    method: ClassVar[str] = "lora"
    setting_names: tuple[str, ...] = ("scaling",)

    lora_rank: int
    lora_alpha: float
    dropout_rate: float
    has_dropout: bool
    # Only where there is a rate, or `shard` was asked to split it.
    lora_dropout: nn.Dropout
    use_rslora: bool
    use_dora: bool
    has_lora_bias: bool
    factor_paths: tuple[str, str]
    over_outputs: tuple[int, ...]
    scaling: Parameter
    strength_factor: Parameter
    # By this name target_parameters named the weight.
    target_parameter: str | None = None
    mindpet_delta_lora_b_bias: Parameter
    mindpet_delta_lora_magnitude: Parameter

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        inherit_args(cls)

    @classmethod
    def factor_names(cls) -> tuple[str, str]:
        """Return the names of A and B, which are others on a table of vectors: PEFT's lora_embedding_A and B."""
        between = "embedding_" if cls.takes_ids else ""
        return f"mindpet_delta_lora_{between}a", f"mindpet_delta_lora_{between}b"

    @classmethod
    def axes_of_parts(cls) -> dict[str, int]:
        """Return which axis of A or B is split where each process has a part of the layer."""
        axes = zip(cls.factor_names(), (cls.narrow_axis, cls.widen_axis))
        return {name: axis for name, axis in axes if axis is not None}

    @classmethod
    def delta_shapes(cls, layer: nn.Cell, config: LoraSettings) -> dict[str, tuple[int, ...]]:
        """Return the shape of each Parameter that these settings add to a plain layer; nothing is made."""
        a, b = cls.factor_names()
        outputs = cls.outputs(layer)
        return {a: cls.narrow_shape(layer, config.lora_rank), b: cls.widen_shape(layer, config.lora_rank),
                **({"mindpet_delta_lora_b_bias": (outputs,)} if config.lora_bias else {}),
                **({"mindpet_delta_lora_magnitude": cls.across_output(outputs)} if config.use_dora else {})}

    @classmethod
    def across_output(cls, outputs: int) -> tuple[int, ...]:
        """Return the shape of a number for each output beside the layer's output."""
        return cls.across(outputs)

    def _add_delta(self, config: LoraSettings) -> None:
        """Make the Parameters and the operators."""
        self.check()
        self._check_settings(config)
        self.compute_dtype = config.compute_dtype
        self.add_low_rank_operators(config.lora_rank)
        a_name, b_name = self.factor_names()
        # A table starts the other way round: through an A of the size 1/√ids B would learn slowly.
        a_start, b_start = ("zeros", UNIT_NORMAL) if self.takes_ids else (HE_UNIFORM, "zeros")
        shapes = self.delta_shapes(self, config)
        self.split_axes = self.axes_of_parts()
        values = {name: self._started(name, field, own if isinstance(given, OwnStart) else given, shapes[name],
                                      config.param_init_type)
                  for name, field, given, own in ((a_name, "lora_a_init", config.lora_a_init, a_start),
                                                  (b_name, "lora_b_init", config.lora_b_init, b_start))}
        most = min(self.outputs(self), math.prod(shapes[a_name][1:]))
        if config.lora_rank > most:
            warn_user(f"lora_rank {config.lora_rank} is above the highest rank of the layer's weight = {most}: the "
                      f"update cannot use it.")
        self.lora_rank, self.lora_alpha = config.lora_rank, config.lora_alpha
        self.dropout_rate = float(config.lora_dropout)
        self.use_rslora, self.use_dora, self.has_lora_bias = config.use_rslora, config.use_dora, config.lora_bias
        self.init_lora_weights = config.init_lora_weights
        self.target_parameter = getattr(config, "_target_parameter", None)
        if config.init_lora_weights in (*DATA_STARTS, "loftq"):
            self.start_settings = config
        if config.residual_base:
            self._note_residual(takes_again=False)
        elif config.init_lora_weights is not True:
            values.update(zip(values, self._other_start(config, shapes[a_name], shapes[b_name])))
        # A graph calls no method of a class.
        self.factor_paths = (a_name, b_name)
        self.over_outputs = self.across_output(self.outputs(self))
        if config.lora_bias:
            values["mindpet_delta_lora_b_bias"] = initial("lora_bias", "zeros", (self.outputs(self),),
                                                          config.param_init_type)
        self.add_parameters(values, {"scaling": self.factor(),
                                     **({"strength_factor": 1.0} if config.use_dora else {})})
        self.output_names = self.delta_names[1:]
        if config.use_dora:
            self.mindpet_delta_lora_magnitude = Parameter(
                self._magnitude(), name=prefix_of(self.weight.name) + "mindpet_delta_lora_magnitude")
            self.delta_names += ("mindpet_delta_lora_magnitude",)
        self.has_dropout = self.dropout_rate > 0 and not self.takes_ids
        if self.has_dropout:
            self.lora_dropout = delta_dropout(self.dropout_rate)
        self._require_scale()

    def _started(self, name: str, field: str, value: Any, shape: tuple[int, ...], dtype: mindspore.dtype) -> Tensor:
        """Return what a factor starts with: where it is split, this process's part of what the whole starts with."""
        if name not in self.split_axes:
            return initial(field, value, shape, dtype)
        axis = self.split_axes[name]
        return own_part(initial(field, value, whole_shape(shape, axis), dtype), axis)

    def _check_settings(self, config: LoraSettings) -> None:
        """Check what the host asks of LoRA, and say why the layer cannot be merged where it cannot."""
        groups = self.group_count(self)
        reason = split_problem(self, config) if self.is_split else ""
        if reason:
            raise ValueError(f"each process has a part of this layer, and {reason}")
        if self.is_quantised and takes_from_base(config.init_lora_weights):
            raise ValueError(f"init_lora_weights {config.init_lora_weights!r} takes a part out of the weight, which a "
                             f"quantised one does not give: take another start, or dequantize_base() the layer.")
        if config.lora_bias and self.takes_ids:
            raise ValueError("LoRA on an embedding has no bias: leave lora_bias out, or the layer, with "
                             "exclude_modules.")
        if config.lora_rank % groups:
            raise ValueError(f"lora_rank must be divisible by the {groups} groups of the convolution, between which "
                             f"its channels are shared out, but got {config.lora_rank}: take a multiple of {groups}, "
                             f"or leave the layer out with exclude_modules.")
        if config.lora_bias and getattr(self, "bias", None) is None:
            self.unmergeable = ("B has a bias (lora_bias), and the layer has none that could absorb it; use the net "
                                "unmerged.")
        if groups > 1:
            self.unmergeable = (f"with {groups} groups the update makes each output depend on every input channel, "
                                f"which a kernel of as many groups cannot hold; use the net unmerged.")

    @classmethod
    def _on(cls: type[Self], plain: nn.Cell, settings: LoraSettings) -> Self:
        layer = super()._on(plain, settings)
        layer._require_scale()
        return layer

    def adapted(self, h: Tensor, again: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the output before the activation, the update added to what the weight makes of the input."""
        weight = self.own_weight(dtype)
        if self.use_dora:
            y, linear = self.affine_and_linear(h, weight, dtype)
        else:
            y = self.affine(h, weight, dtype)
        if self.has_dropout:
            again = self.lora_dropout(again)
        low = self.narrow(again, getattr(self, self.factor_paths[0]), dtype)
        # On the [tokens, rank] side: rank is far below the outputs.
        low = self.scaled(low, as_type(self.scaling, dtype))
        update = self.widen(low, getattr(self, self.factor_paths[1]), dtype)
        if self.has_lora_bias:
            update = update + self._scaled_bias(dtype)
        if self.use_dora:
            # As PEFT: what dropout takes from A's input, the rescaling of W does not see either.
            if self.has_dropout:
                linear = self.linear(again, weight, dtype)
            update = self._dora(linear, update, dtype)
        return self.added(y, update)

    def scaled(self, low: Tensor, scaling: Tensor) -> Tensor:
        """Return the low-rank activations times the scaling."""
        return ops.mul(low, scaling)

    def added(self, y: Tensor, update: Tensor) -> Tensor:
        """Return the sum of the layer's own output and the update."""
        return ops.add(y, update)

    def _magnitude(self) -> Tensor:
        """Return what DoRA's magnitude starts with, in the shape in which it multiplies the layer's output."""
        # By the same operators as in the forward, so that their quotient is 1 exactly; and in float32, as there.
        norm = self._weight_norm().asnumpy()
        return Tensor(norm.reshape(self.over_outputs).copy())

    def factor(self) -> float:
        """Return s."""
        return scale_of(self.lora_alpha, self.lora_rank, self.use_rslora)

    def overflows(self, strength: float) -> str:
        """Return why the scaling cannot be that of this strength, or nothing."""
        types = (mindspore.float32, self._compute_type())
        if self.use_dora:
            return overflow("the strength", strength, types)
        return overflow("strength times lora_alpha / lora_rank", strength * self.factor(), types)

    def _require_scale(self) -> None:
        """Raise ValueError where s is not finite in the type that the layer computes in."""
        reason = overflow("the scale", self.factor(), (self._compute_type(),))
        if reason:
            raise ValueError(f"lora_alpha {self.lora_alpha} is too large for lora_rank {self.lora_rank}: {reason}")

    def delta_norm(self) -> float:
        """Return ||s B A||, the root of the sum of squares, from the factors' products with themselves."""
        a, b = (float64(getattr(self, name)) for name in self.factor_paths)
        # B's columns are those of one group of a convolution.
        groups, rank = self.lora_rank // b.shape[1], b.shape[1]
        a, b = a.reshape(groups, rank, -1), b.reshape(groups, -1, rank)
        squares = np.sum((b.swapaxes(1, 2) @ b) * (a @ a.swapaxes(1, 2)))
        return float(self.factor() * np.sqrt(np.maximum(squares, 0)))

    def setting_values(self) -> dict[str, Any]:
        """Return ``strength · s`` as the scaling, or 0 where switched off; with DoRA s, and the strength."""
        strength = self.strength if self.enabled else 0.0
        if self.use_dora:
            return {"scaling": self.factor(), "strength_factor": strength}
        return {"scaling": strength * self.factor()}

    def _scaled_bias(self, dtype: mindspore.dtype) -> Tensor:
        """Return s times the bias of B, in the shape that is added to the layer's output."""
        bias = as_type(self.mindpet_delta_lora_b_bias, dtype) * as_type(self.scaling, dtype)
        return ops.reshape(bias, self.over_outputs)

    def _dora(self, base: Tensor, update: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return what DoRA adds to the output.

        Args:
            base: what W makes of the input, without a bias.
            update: what s · B A makes of it.
            dtype: of the computation.
        """
        norm = ops.stop_gradient(ops.reshape(self._weight_norm(), self.over_outputs))
        is_zero = ops.equal(norm, 0)
        scale = as_type(self.mindpet_delta_lora_magnitude, mindspore.float32) / ops.where(is_zero, 1.0, norm)
        scale = ops.where(is_zero, 1.0, scale)
        # The gradients of the magnitude are sums over all rows, which float16 cannot hold.
        change = (scale - 1) * as_type(base, mindspore.float32) + scale * as_type(update, mindspore.float32)
        return as_type(change * self.strength_factor, dtype)

    def _weight_norm(self) -> Tensor:
        """Return the norm of W + s B A over all axes but the output's, in float32 whatever the layer computes in.

        Each output's weights are divided by the largest of them before they are squared, so that no square vanishes.
        """
        a, b = (as_type(getattr(self, name), mindspore.float32) for name in self.factor_paths)
        product = ops.matmul(ops.reshape(b, (-1, self.lora_rank)), ops.reshape(a, (self.lora_rank, -1)))
        weight = as_type(self.logical_weight(), mindspore.float32)
        whole = weight + ops.reshape(self._oriented(product), weight.shape) * self.scaling
        axes = tuple(axis for axis in range(weight.ndim) if axis != self.out_axis)
        largest = ops.amax(ops.abs(whole), axes, True)
        parts = whole / ops.where(ops.equal(largest, 0), 1.0, largest)
        return ops.reshape(largest, (-1,)) * ops.sqrt(ops.ReduceSum()(ops.square(parts), axes))

    def _oriented(self, product: Any) -> Any:
        """Return B A with its axes in the weight's order."""
        return product.T if self.out_axis else product

    def _update(self) -> np.ndarray:
        """Return B A in float32 and the shape that the weight has for methods."""
        a, b = (numbers_of(getattr(self, name)) for name in self.factor_paths)
        with np.errstate(over="ignore", invalid="ignore"):
            product = b.reshape(-1, self.lora_rank) @ a.reshape(self.lora_rank, -1)
        return self._oriented(product).reshape(self.logical_shape(self))

    def _dora_scale(self, whole: np.ndarray) -> np.ndarray:
        """Return DoRA's factor of each output of W + s B A."""
        axes = tuple(axis for axis in range(whole.ndim) if axis != self.out_axis)
        # In float64 no square of a float32 vanishes.
        norm = np.sqrt(np.square(whole, dtype=np.float64).sum(axes))
        is_zero = norm == 0
        magnitude = numbers_of(self.mindpet_delta_lora_magnitude).reshape(-1)
        return np.where(is_zero, 1, magnitude / np.where(is_zero, 1, norm)).astype(np.float32)

    def merged_value(self) -> dict[Parameter, Tensor]:
        """Return the weight, and with `lora_bias` the bias, that give the output of the running net, from float32."""
        if self.unmergeable:
            return super().merged_value()
        weight = self.weight_numbers()
        # What is not finite is for the caller to refuse, by name.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            whole = weight + self.scaling.asnumpy() * self._update()
            if self.use_dora:
                shape = [-1 if axis == self.out_axis else 1 for axis in range(weight.ndim)]
                scale = self._dora_scale(whole).reshape(shape)
                whole = weight + self.strength_factor.asnumpy() * (scale * whole - weight)
            merged = {self.absorbing(): self.as_weight(whole)}
            if self.has_lora_bias:
                bias = numbers_of(self.bias) + self.scaling.asnumpy() * numbers_of(self.mindpet_delta_lora_b_bias)
                merged[self.bias] = Tensor(bias).astype(self.bias.dtype)
        return merged

    def settings(self) -> dict[str, Any]:
        """Return lora_rank, lora_alpha and lora_dropout, and what is used of use_rslora, use_dora and lora_bias."""
        used = {"use_rslora": self.use_rslora, "use_dora": self.use_dora, "lora_bias": self.has_lora_bias}
        return {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha,
                **({} if self.takes_ids else {"lora_dropout": self.dropout_rate}),
                **{name: True for name, is_used in used.items() if is_used},
                **({"init_lora_weights": self.init_lora_weights} if self.took else {}),
                **({"target_parameter": self.target_parameter} if self.target_parameter else {})}

    def unlike(self, settings: Mapping[str, Any]) -> list[str]:
        """Return where alpha is too large: it is taken over; all else shows in the tensors, or may differ."""
        scale = scale_of(settings["lora_alpha"], self.lora_rank, settings.get("use_rslora", False))
        return list(filter(None, [overflow("the scale in the file", scale, (mindspore.float32, self._compute_type()))]))

    def adopt_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over lora_alpha and use_rslora: they are values; the rank is a shape."""
        self.lora_alpha, self.use_rslora = settings["lora_alpha"], settings.get("use_rslora", False)
        # A file's factors have begun already.
        self.data_start = None
        self.refresh()

    def extend_repr(self) -> str:
        """Show the low-rank settings beside those of the plain layer."""
        return super().extend_repr() + f", lora_rank={self.lora_rank}, lora_alpha={self.lora_alpha}"


def split_problem(layer: LowRank, config: LoraSettings) -> str:
    """Return why LoRA with these settings does not go with a layer that is split over processes, or nothing."""
    if config.use_dora:
        return "DoRA needs the norm of the whole weight: leave use_dora out."
    if config.lora_bias:
        return "B has no bias then: leave lora_bias out."
    if config.init_lora_weights not in (True, False, "gaussian") or config.residual_base:
        return f"init_lora_weights {config.init_lora_weights!r} needs the whole weight: take True, False or 'gaussian'."
    if config.lora_dropout and layer.widen_axis is not None:
        return ("lora_dropout would drop other inputs on each: set it to 0 for column-split layers, by a config of "
                "their own.")
    return ""
