"""LoRA: Low-Rank Adaptation of Large Language Models, Hu et al., 2021, https://arxiv.org/abs/2106.09685.

    y = act(x Wᵀ + b + (alpha / rank) · drop(x) Aᵀ Bᵀ)                                             (section 4.1, eq. 3)

W and b are frozen; A (rank, in) starts random and B (out, rank) starts at zero, so training starts at the base.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import HeUniform, Initializer, initializer

from mindpet_lite.delta.base import (
    Delta,
    DeltaConfig,
    check_float_type,
    check_int,
    check_positive,
    check_probability,
    did_you_mean,
    warn_user,
)

# What an nn.Dense is made of besides its Parameters and its activation; taken over, not copied, by `from_dense`.
_DENSE_PARTS = ("in_channels", "out_channels", "has_bias", "reshape", "shape_op", "matmul", "bias_add",
                "activation_flag")
_PRECISION_FLAGS = {"fp16": mindspore.float16, "fp32": mindspore.float32, "bf16": mindspore.bfloat16}
_HE_UNIFORM = HeUniform(negative_slope=math.sqrt(5))


def _as(x: Tensor, dtype: mindspore.dtype) -> Tensor:
    """Cast only where the type differs: a cast to the same type still costs a launch in PyNative mode."""
    if x.dtype == dtype:
        return x
    return ops.cast(x, dtype)


class LoRADense(nn.Dense, Delta):
    r"""A Dense layer with a trainable low-rank update beside its frozen weight.

    .. math:: y = act(x W^T + b + \frac{\alpha}{r} drop(x) A^T B^T)

    `weight` (out_channels, in_channels) and `bias` (out_channels,) are where nn.Dense has them. The layer adds
    `mindpet_delta_lora_a` (lora_rank, in_channels) and `mindpet_delta_lora_b` (out_channels, lora_rank), and
    `lora_scaling` (), a Parameter that is never trained: it holds the live factor, so that it can change in a
    compiled graph (:func:`mindpet_lite.set_lora_scale`, :func:`mindpet_lite.adapters_disabled`).

    Dtype rule: parameters keep their type. The layer computes in `compute_dtype` if given, else in what
    `to_float()` set, else in the type of `weight`; what differs from it is cast on the way. The output has the type
    of the input. (MindPet computes in float16 unless told otherwise; this is the one deliberate difference.)

    Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685, eq. 3 and section 4.1.

    Args:
        in_channels (int): size of the last axis of the input.
        out_channels (int): size of the last axis of the output.
        lora_rank (int): rows of A, columns of B; positive. Above min(in, out) a warning says that it is wasted.
        lora_alpha (int | float): finite and positive; the update is scaled by lora_alpha / lora_rank.
        lora_dropout (int | float): probability in [0, 1) of dropping an input of A in training. At 0 there is no
            dropout operator.
        lora_a_init (Tensor | str | Initializer | number): start of A. Default: He-uniform with negative slope √5.
        lora_b_init (Tensor | str | Initializer | number): start of B. Default: zeros, so that the layer starts equal
            to its base.
        param_init_type (mindspore.dtype): type of A and B: float16, bfloat16 or float32.
        compute_dtype (mindspore.dtype | None): see the dtype rule.
        **dense_kwargs: weight_init, bias_init, has_bias, activation and dtype of nn.Dense.

    Inputs:
        - **x** (Tensor): `(*, in_channels)`, any number of leading axes, none included.

    Outputs:
        Tensor `(*, out_channels)` of the type of `x`.

    Raises:
        TypeError: lora_rank is a bool or no int; lora_alpha or lora_dropout is a bool or no number; a type is not
            float16, bfloat16 or float32; an initialiser is of no known kind.
        ValueError: lora_rank or lora_alpha is not positive (or alpha not finite); lora_dropout is outside [0, 1); an
            initial Tensor has the wrong shape; the activation's or initialiser's name is unknown.
    """

    method: ClassVar[str] = "lora"
    delta_names: ClassVar[tuple[str, ...]] = ("mindpet_delta_lora_a", "mindpet_delta_lora_b")
    live_names: ClassVar[tuple[str, ...]] = ("lora_scaling",)

    def __init__(self, in_channels: int, out_channels: int, lora_rank: int, lora_alpha: float,
                 lora_dropout: float = 0.0, lora_a_init: Any = _HE_UNIFORM, lora_b_init: Any = "zeros",
                 param_init_type: mindspore.dtype = mindspore.float32,
                 compute_dtype: mindspore.dtype | None = None, **dense_kwargs: Any) -> None:
        settings = LoraConfig(lora_rank, lora_alpha, lora_dropout, lora_a_init, lora_b_init, param_init_type,
                              compute_dtype)
        _check_activation(dense_kwargs.get("activation"))
        super().__init__(in_channels, out_channels, **dense_kwargs)
        self._add_delta(settings)

    @classmethod
    def from_dense(cls, dense: nn.Dense, lora_rank: int, lora_alpha: float, lora_dropout: float = 0.0,
                   lora_a_init: Any = _HE_UNIFORM, lora_b_init: Any = "zeros",
                   param_init_type: mindspore.dtype = mindspore.float32,
                   compute_dtype: mindspore.dtype | None = None) -> LoRADense:
        """Adapt an existing Dense: same Parameter objects and names, same primitives, same activation.

        `dense` itself stays as it is; put the returned layer in its place. With the default `lora_b_init` the output
        is that of `dense`, bit for bit. (In float16 graphs the CPU backend leaves out roundings between operators of
        the plain layer, so there the last bit can differ.) The arguments are those of the class.

        Raises:
            TypeError: `dense` is no nn.Dense, is adapted already, or overrides `construct`.
            ValueError: as the class.
        """
        settings = LoraConfig(lora_rank, lora_alpha, lora_dropout, lora_a_init, lora_b_init, param_init_type,
                              compute_dtype)
        return cls._on(dense, settings)

    @classmethod
    def _on(cls, dense: nn.Dense, settings: LoraConfig) -> LoRADense:
        reason = LoraConfig.refusal(dense)
        if reason:
            raise TypeError(reason)
        layer = cls.__new__(cls)
        nn.Cell.__init__(layer)
        _take_over(layer, dense)
        layer._add_delta(settings)
        # In a tuple, so that the kept layer is no child: `plain_cell` hands back the very same object.
        layer._plain = (dense,)
        # Training state, recomputation and the like; the precision flags become the layer's own.
        layer.add_flags_recursive(**dense.get_flags())
        strategy = getattr(dense.matmul, "in_strategy", None)
        return layer.shard(strategy) if strategy else layer

    def _add_delta(self, config: LoraConfig) -> None:
        rank, dtype = config.lora_rank, config.param_init_type
        shapes = {"lora_a_init": (rank, self.in_channels), "lora_b_init": (self.out_channels, rank)}
        a_value = _initial("lora_a_init", config.lora_a_init, shapes["lora_a_init"], dtype)
        b_value = _initial("lora_b_init", config.lora_b_init, shapes["lora_b_init"], dtype)
        if rank > min(self.in_channels, self.out_channels):
            warn_user(f"lora_rank {rank} is above min(in_channels, out_channels) = "
                      f"{min(self.in_channels, self.out_channels)}: the update cannot use it.")
        self.lora_rank, self.lora_alpha = rank, config.lora_alpha
        self.compute_dtype: mindspore.dtype | None = config.compute_dtype
        self.float_type: mindspore.dtype | None = None
        self._plain: tuple[nn.Dense, ...] = ()
        prefix = _prefix(self.weight.name)
        self.mindpet_delta_lora_a = Parameter(a_value, name=prefix + "mindpet_delta_lora_a")
        self.mindpet_delta_lora_b = Parameter(b_value, name=prefix + "mindpet_delta_lora_b")
        self.lora_scaling = Parameter(Tensor(self.lora_alpha / rank, mindspore.float32),
                                      name=prefix + "lora_scaling", requires_grad=False)
        self.lora_dropout = nn.Dropout(p=float(config.lora_dropout))
        self.has_dropout = config.lora_dropout > 0
        self.lora_a_matmul = ops.MatMul(transpose_b=True)
        self.lora_b_matmul = ops.MatMul(transpose_b=True)
        self.mul = ops.Mul()
        self.add = ops.Add()

    def construct(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` (*, in_channels); return (*, out_channels) of the type of `x`."""
        shape, input_type = x.shape, x.dtype
        dtype = self.weight.dtype
        if self.compute_dtype is not None:
            dtype = self.compute_dtype
        elif self.float_type is not None:
            dtype = self.float_type
        x = _as(x, dtype)
        if len(shape) != 2:
            x = self.reshape(x, (-1, shape[-1]))
        y = self.matmul(x, _as(self.weight, dtype))
        if self.has_bias:
            y = self.bias_add(y, _as(self.bias, dtype))
        if self.has_dropout:
            x = self.lora_dropout(x)
        low = self.lora_a_matmul(x, _as(self.mindpet_delta_lora_a, dtype))
        # On the [tokens, rank] side: rank is far below out_channels.
        low = self.mul(low, _as(self.lora_scaling, dtype))
        y = self.add(y, self.lora_b_matmul(low, _as(self.mindpet_delta_lora_b, dtype)))
        if self.activation_flag:
            y = self.activation(y)
        if len(shape) != 2:
            y = self.reshape(y, shape[:-1] + (self.out_channels,))
        return _as(y, input_type)

    def to_float(self, dst_type: mindspore.dtype) -> LoRADense:
        """Compute in `dst_type` unless `compute_dtype` was given; the output keeps the type of the input.

        Raises:
            TypeError: `dst_type` is not float16, bfloat16 or float32.
        """
        check_float_type("dst_type", dst_type)
        self.float_type = dst_type
        return self

    def add_flags_recursive(self, **flags: Any) -> LoRADense:
        """Set flags as nn.Cell does, but read the precision flags of an outer `to_float()` as this layer's own.

        As a cell flag MindSpore would cast the input before `construct` sees its type (graph mode) or cast around
        every operator whatever `compute_dtype` says (PyNative mode).
        """
        for flag, dtype in _PRECISION_FLAGS.items():
            if flags.pop(flag, False):
                self.float_type = dtype
        return super().add_flags_recursive(**flags)

    def shard(self, strategy_org_dense_matmul: tuple | None = None, strategy_org_bias_add: tuple | None = None,
              strategy_lora_dropout: tuple | None = None, strategy_lora_a_matmul: tuple | None = None,
              strategy_lora_b_matmul: tuple | None = None, strategy_lora_mul: tuple | None = None,
              strategy_lora_add: tuple | None = None, strategy_activation: tuple | None = None) -> LoRADense:
        """Set how the operators are split in (semi-)auto-parallel training; each strategy is optional.

        A strategy is a tuple with a tuple of ints for every input of its operator, as `Primitive.shard` takes it.
        Where only the dense strategy ``(s0, s1)`` is given, A's is ``(s0, (1, s1[1]))`` and B's is
        ``((s0[0], 1), (s1[0], 1))``. What the layer lacks (bias, activation) has nothing to split.

        Raises:
            TypeError: a strategy is no tuple of tuples of ints.
            ValueError: the dense strategy does not fit a matrix product; or the activation is made of several
                operators: split those yourself.
        """
        dense = strategy_org_dense_matmul
        strategies = {
            "strategy_org_dense_matmul": dense, "strategy_org_bias_add": strategy_org_bias_add,
            "strategy_lora_dropout": strategy_lora_dropout, "strategy_lora_a_matmul": strategy_lora_a_matmul,
            "strategy_lora_b_matmul": strategy_lora_b_matmul, "strategy_lora_mul": strategy_lora_mul,
            "strategy_lora_add": strategy_lora_add, "strategy_activation": strategy_activation}
        for name, strategy in strategies.items():
            _check_strategy(name, strategy)
        if dense is not None:
            if [len(part) for part in dense] != [2, 2]:
                raise ValueError(f"strategy_org_dense_matmul must split the two axes of both inputs, such as "
                                 f"((2, 4), (1, 4)), but got {dense!r}.")
            if strategy_lora_a_matmul is None:
                strategies["strategy_lora_a_matmul"] = (dense[0], (1, dense[1][1]))
            if strategy_lora_b_matmul is None:
                strategies["strategy_lora_b_matmul"] = ((dense[0][0], 1), (dense[1][0], 1))
        primitives = {
            "strategy_org_dense_matmul": self.matmul, "strategy_lora_dropout": self.lora_dropout.dropout,
            "strategy_lora_a_matmul": self.lora_a_matmul, "strategy_lora_b_matmul": self.lora_b_matmul,
            "strategy_lora_mul": self.mul, "strategy_lora_add": self.add}
        if self.has_bias:
            primitives["strategy_org_bias_add"] = self.bias_add
        if self.activation_flag and strategy_activation is not None:
            primitives["strategy_activation"] = _only_primitive(self.activation)
        for name, primitive in primitives.items():
            if strategies[name] is not None:
                primitive.shard(strategies[name])
        return self

    def refresh(self) -> None:
        """Set the live factor to ``strength · lora_alpha / lora_rank``, or 0 where switched off."""
        factor = self.strength * self.lora_alpha / self.lora_rank if self.enabled else 0.0
        self.lora_scaling.set_data(Tensor(factor, mindspore.float32))

    def merged_value(self) -> dict[Parameter, Tensor]:
        """Return {weight: W + s · B A} with the live factor s of the running net, computed in float32."""
        a = self.mindpet_delta_lora_a.astype(mindspore.float32).asnumpy()
        b = self.mindpet_delta_lora_b.astype(mindspore.float32).asnumpy()
        # What is not finite is for the caller to refuse, by name.
        with np.errstate(over="ignore", invalid="ignore"):
            update = np.matmul(b * self.lora_scaling.asnumpy(), a)
            update += self.weight.astype(mindspore.float32).asnumpy()
        return {self.weight: Tensor(update).astype(self.weight.dtype)}

    def plain_cell(self) -> nn.Dense:
        """Return the nn.Dense this layer adapts, or a new one on the same Parameter objects."""
        if self._plain:
            plain = self._plain[0]
        else:
            plain = nn.Dense.__new__(nn.Dense)
            nn.Cell.__init__(plain)
            _take_over(plain, self)
        plain.set_train(self.training)
        if self.float_type is not None:
            plain.to_float(self.float_type)
        return plain

    def settings(self) -> dict[str, Any]:
        """Return lora_rank, lora_alpha and lora_dropout."""
        return {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha, "lora_dropout": float(self.lora_dropout.p)}

    def cost(self) -> str:
        """Say that the weight is cast on every call, where the layer computes in another type."""
        dtype = self.compute_dtype or self.float_type or self.weight.dtype
        return "" if dtype == self.weight.dtype else f"casts its {self.weight.dtype} weight to {dtype} on every call"

    def adopt_settings(self, settings: Mapping[str, Any]) -> None:
        """Take over lora_alpha: it is a value; the rank is a shape."""
        self.lora_alpha = settings["lora_alpha"]
        self.refresh()

    def extend_repr(self) -> str:
        """Show the low-rank settings beside those of nn.Dense."""
        return super().extend_repr() + f", lora_rank={self.lora_rank}, lora_alpha={self.lora_alpha}"


@dataclasses.dataclass(frozen=True)
class LoraConfig(DeltaConfig):
    """Settings of LoRA, checked when made; the fields are those of :class:`LoRADense` and :class:`DeltaConfig`.

    Raises:
        TypeError, ValueError: as :class:`LoRADense`.
    """

    pet_type: ClassVar[str] = "lora"
    file_type: ClassVar[str] = "LORA"

    lora_rank: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    lora_a_init: Any = _HE_UNIFORM
    lora_b_init: Any = "zeros"
    param_init_type: mindspore.dtype = mindspore.float32
    compute_dtype: mindspore.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("lora_rank", self.lora_rank)
        check_positive("lora_alpha", self.lora_alpha)
        check_probability("lora_dropout", self.lora_dropout)
        check_float_type("param_init_type", self.param_init_type)
        if self.compute_dtype is not None:
            check_float_type("compute_dtype", self.compute_dtype)
        for name in ("lora_a_init", "lora_b_init"):
            _check_init(name, getattr(self, name))
        # Python's own numbers: what numpy counts as a number, JSON does not.
        object.__setattr__(self, "lora_rank", int(self.lora_rank))
        if not isinstance(self.lora_alpha, int):
            object.__setattr__(self, "lora_alpha", float(self.lora_alpha))

    @classmethod
    def refusal(cls, cell: nn.Cell) -> str | None:
        """Return why `cell` cannot carry LoRA, or None."""
        kind = type(cell).__name__
        if isinstance(cell, Delta):
            return f"a {kind} is adapted already; merge() it first."
        if not isinstance(cell, nn.Dense):
            return f"LoRA adapts nn.Dense, not {kind}."
        for name in ("construct", "bprop", "__call__"):
            if getattr(type(cell), name, None) is not getattr(nn.Dense, name, None) or name in vars(cell):
                return (f"{kind} overrides nn.Dense.{name}, so LoRA cannot know what it computes; "
                        f"build it with LoRADense, or leave it out with exclude_modules.")
        return None

    def adapt(self, cell: nn.Cell) -> nn.Cell:
        """Return the LoRA cell on the Parameter objects of `cell`."""
        return LoRADense._on(cell, self)


def _take_over(layer: nn.Dense, source: nn.Dense) -> None:
    """Make `layer` a Dense on the parts of `source`, without renaming a Parameter (a plain assignment would)."""
    for name in _DENSE_PARTS:
        if hasattr(source, name):
            setattr(layer, name, getattr(source, name))
    layer.insert_param_to_cell("weight", source.weight)
    if source.has_bias:
        layer.insert_param_to_cell("bias", source.bias)
    else:
        # As nn.Dense has it: the compiler does not take a Parameter slot that holds None.
        layer.bias = None
    if isinstance(source.activation, nn.Cell):
        layer.insert_child_to_cell("activation", source.activation)
    else:
        layer.activation = source.activation
    layer.set_train(source.training)
    layer.set_grad(source.requires_grad)


def _prefix(weight_name: str) -> str:
    """Return what stands before ``weight`` in a Parameter name: the delta's names go beside it."""
    return weight_name[:-len("weight")] if weight_name.endswith(".weight") else ""


def _check_init(name: str, value: object) -> None:
    """Raise unless `value` is something MindSpore's initializer takes."""
    if isinstance(value, bool) or not isinstance(value, (Tensor, str, Initializer, int, float)):
        raise TypeError(f"{name} must be a Tensor, a number, an initialiser or its name, "
                        f"but got {value!r} of type {type(value).__name__}.")
    if isinstance(value, str):
        try:
            initializer(value, (2, 2))
        except ValueError as error:
            known = [item.__name__.lower() for item in Initializer.__subclasses__()] + ["zeros", "ones", "normal"]
            raise ValueError(f"{name} {value!r} is no initialiser of mindspore.common.initializer."
                             f"{did_you_mean(value, known)}") from error


def _initial(name: str, value: Any, shape: tuple[int, int], dtype: mindspore.dtype) -> Tensor:
    """Return the initial value of a factor, already filled: a net that ran before will not fill it later."""
    if isinstance(value, Tensor):
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must be a Tensor of shape {shape}, but got shape {tuple(value.shape)}.")
        # A Tensor from initializer() holds no data yet; and layers made from one Tensor must not share its memory.
        data = value.init_data() if value.has_init else value
        return Tensor(data.astype(mindspore.float32).asnumpy().copy()).astype(dtype)
    return initializer(value, shape, dtype).init_data()


def _check_activation(activation: object) -> None:
    """Raise ValueError for the name of an activation that MindSpore does not have."""
    if isinstance(activation, str):
        try:
            nn.get_activation(activation)
        except KeyError as error:
            known = [name.lower() for name in nn.layer.activation.__all__] + ["leakyrelu", "fast_gelu"]
            raise ValueError(f"activation {activation!r} is unknown to mindspore.nn.get_activation."
                             f"{did_you_mean(activation, known)}") from error


def _check_strategy(name: str, strategy: object) -> None:
    if strategy is None:
        return
    good = isinstance(strategy, tuple) and all(
        isinstance(part, tuple) and all(isinstance(item, int) and not isinstance(item, bool) for item in part)
        for part in strategy)
    if not good:
        raise TypeError(f"{name} must be a tuple of tuples of ints, one for each input, but got {strategy!r}.")


def _only_primitive(activation: Any) -> ops.Primitive:
    """Return the operator an activation is made of, where there is just one."""
    if isinstance(activation, ops.Primitive):
        return activation
    found = [part for part in vars(activation).values() if isinstance(part, ops.Primitive)]
    if len(found) != 1:
        raise ValueError(f"strategy_activation: {type(activation).__name__} is made of {len(found)} operators, so one "
                         f"strategy does not say how to split it; call shard() on its operators yourself.")
    return found[0]
