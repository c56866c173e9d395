"""LoRA on `nn.Dense`."""
from __future__ import annotations

from typing import Any

import mindspore
from mindspore import Tensor, nn, ops

from mindpet_lite.delta.dense import AdaptedDense, dense_refusal
from mindpet_lite.delta.dropout import delta_dropout
from mindpet_lite.delta.lora.low_rank import HE_UNIFORM, LowRank
from mindpet_lite.delta.lora.settings import NEWER, LoraSettings
from mindpet_lite.delta.lora.start import RESIDUAL
from mindpet_lite.delta.parts import as_type, check_strategies, from_rows, set_strategies, to_rows


class LoRADense(AdaptedDense, LowRank):
    r"""A Dense layer with a trainable low-rank update beside its frozen weight.

    .. math:: y = act(x W^T + b + \frac{\alpha}{r} drop(x) A^T B^T)

    `weight` (out_channels, in_channels) and `bias` (out_channels,) are where nn.Dense has them. The layer adds
    `mindpet_delta_lora_a` (lora_rank, in_channels) and `mindpet_delta_lora_b` (out_channels, lora_rank), and
    `scaling` (), a Parameter that is never trained: it holds strength · alpha / r, so that it can change in a
    compiled graph (:func:`mindpet_lite.set_lora_scale`, :func:`mindpet_lite.adapters_disabled`).

    Dtype rule: parameters keep their type. `to_float(t)` on the layer, or on a net around it, means what it means in
    MindSpore: the input counts as one of type t, and the output has type t. Without it the output has the type of the
    input. In between the layer computes in `compute_dtype` if given, else in t, else in the type of `weight`; what
    differs from it is cast on the way. (MindPet computes in float16 unless told otherwise; this is the one deliberate
    difference.)

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
        **dense_kwargs: weight_init, bias_init, has_bias, activation and dtype of nn.Dense; and by keyword, False by
            default, use_rslora (scale by lora_alpha / √lora_rank) and lora_bias (B has a bias of its own): see
            :class:`mindpet_lite.delta.lora.low_rank.LowRank`.

    Inputs:
        - **x** (Tensor): `(*, in_channels)`, any number of leading axes, none included.

    Outputs:
        Tensor `(*, out_channels)`, of the type that the dtype rule says.

    Raises:
        TypeError: lora_rank is a bool or no int; lora_alpha or lora_dropout is a bool or no number; a type is not
            float16, bfloat16 or float32; an initialiser is of no known kind.
        ValueError: lora_rank or lora_alpha is not positive (or alpha, or its scale in a type that it is used in, not
            finite); lora_dropout is outside [0, 1);
            use_dora is set, which needs a base: see `from_dense`; an initial Tensor has the wrong shape; the
            activation's or initialiser's name is unknown.
    """

    def __init__(self, in_channels: int, out_channels: int, lora_rank: int, lora_alpha: float,
                 lora_dropout: float = 0.0, lora_a_init: Any = HE_UNIFORM, lora_b_init: Any = "zeros",
                 param_init_type: mindspore.dtype = mindspore.float32,
                 compute_dtype: mindspore.dtype | None = None, **dense_kwargs: Any) -> None:
        # The signature is MindPet's; what LoRA gained since is by keyword.
        newer = {name: dense_kwargs.pop(name) for name in NEWER if name in dense_kwargs}
        if newer.get("use_dora"):
            raise ValueError("DoRA starts from the norms of the base's weight, which a new layer does not have yet: "
                             "load the base into an nn.Dense, then use LoRADense.from_dense() or get_pet_model().")
        if "init_lora_weights" in dense_kwargs:
            raise ValueError("init_lora_weights is a setting of LoraConfig: load the base into an nn.Dense, then use "
                             "get_pet_model(). By hand, lora_a_init and lora_b_init say how A and B start.")
        settings = LoraSettings(lora_rank, lora_alpha, lora_dropout, lora_a_init, lora_b_init, param_init_type,
                                compute_dtype, **newer)
        super().__init__(in_channels, out_channels, **dense_kwargs)
        self._add_delta(settings)

    @classmethod
    def from_dense(cls, dense: nn.Dense, lora_rank: int, lora_alpha: float, lora_dropout: float = 0.0,
                   lora_a_init: Any = HE_UNIFORM, lora_b_init: Any = "zeros",
                   param_init_type: mindspore.dtype = mindspore.float32,
                   compute_dtype: mindspore.dtype | None = None, **newer: bool) -> LoRADense:
        """Adapt an existing Dense: same Parameter objects and names, same primitives, same activation.

        `dense` itself stays as it is; put the returned layer in its place. With the default `lora_b_init` the output
        is that of `dense`, bit for bit. (In float16 graphs the CPU backend leaves out roundings between operators of
        the plain layer, so there the last bit can differ.) The arguments are those of the class, and use_dora.

        Raises:
            TypeError: `dense` is no nn.Dense, is adapted already, or overrides `construct`.
            ValueError: as the class.
        """
        reason = dense_refusal(dense, "LoRA")
        if reason:
            raise TypeError(reason)
        if newer.get("init_lora_weights") in RESIDUAL:
            raise ValueError(f"init_lora_weights {newer['init_lora_weights']!r} takes a part out of the weight of "
                             f"`dense`, which from_dense() leaves as it is: use get_pet_model().")
        layer = cls._on(dense, LoraSettings(lora_rank, lora_alpha, lora_dropout, lora_a_init, lora_b_init,
                                            param_init_type, compute_dtype, **newer))
        layer.watch_start()
        return layer

    @classmethod
    def _on(cls, dense: nn.Dense, settings: LoraSettings) -> LoRADense:
        layer = super()._on(dense, settings)
        layer._require_scale()
        strategy = getattr(dense.matmul, "in_strategy", None)
        return layer.shard(strategy) if strategy else layer

    @classmethod
    def factor_shapes(cls, layer: nn.Cell, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B."""
        return (rank, layer.in_channels), (layer.out_channels, rank)

    def _add_delta(self, config: LoraSettings) -> None:
        self.compute_dtype = config.compute_dtype
        self.lora_a_matmul, self.lora_b_matmul = ops.MatMul(transpose_b=True), ops.MatMul(transpose_b=True)
        self.mul, self.add = ops.Mul(), ops.Add()
        self._add_factors(config, self.weight, min(self.in_channels, self.out_channels))
        self._add_dropout()

    def construct(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` (*, in_channels); return (*, out_channels)."""
        # What is decided here is decided for each layer as a graph is compiled; functions, flags and properties cost
        # the compiler far less than conditions on shapes and types.
        shape, output_type, dtype = x.shape, self._output_type(x), self._compute_type()
        x = self._entered(x, dtype)
        rows = to_rows(x, shape)
        if self.in_graph:
            # Not the same rows: so both gradients of x are added to those of its other uses (as in q, k and v) by one
            # kernel.
            y = self._with_update(rows, to_rows(x, shape), dtype)
        else:
            y = self._with_update(rows, rows, dtype)
        if self.activation_flag:
            y = as_type(self.activation(y), dtype)
        return as_type(from_rows(y, shape, self.out_channels), output_type, dtype)

    def _with_update(self, rows: Tensor, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the output before the activation, the update added to what the weight makes of the rows.

        Args:
            rows: what the weight sees.
            x: the same, for the update.
            dtype: of the computation.
        """
        linear = self.matmul(rows, as_type(self.weight, dtype))
        y = self._with_bias(linear, dtype)
        if self.has_dropout:
            x = self.lora_dropout(x)
        low = self.lora_a_matmul(x, as_type(self.mindpet_delta_lora_a, dtype))
        # On the [tokens, rank] side: rank is far below out_channels.
        low = self.mul(low, as_type(self.scaling, dtype))
        update = self.lora_b_matmul(low, as_type(self.mindpet_delta_lora_b, dtype))
        if self.has_lora_bias:
            update = update + self._scaled_bias(dtype)
        if self.use_dora:
            # As PEFT: what dropout takes from A's input, the rescaling of W does not see either.
            linear = self.matmul(x, as_type(self.weight, dtype)) if self.has_dropout else linear
            update = self._dora(linear, update, dtype)
        return self.add(y, update)

    def shard(self, strategy_org_dense_matmul: tuple | None = None, strategy_org_bias_add: tuple | None = None,
              strategy_lora_dropout: tuple | None = None, strategy_lora_a_matmul: tuple | None = None,
              strategy_lora_b_matmul: tuple | None = None, strategy_lora_mul: tuple | None = None,
              strategy_lora_add: tuple | None = None, strategy_activation: tuple | None = None) -> LoRADense:
        """Set how the operators are split in (semi-)auto-parallel training; each strategy is optional.

        A strategy is a tuple with a tuple of ints for every input of its operator, as `Primitive.shard` takes it.
        Where only the dense strategy ``(s0, s1)`` is given, A's is ``(s0, (1, s1[1]))`` and B's is
        ``((s0[0], 1), (s1[0], 1))``. What the layer lacks (bias, activation) has nothing to split. The scale is
        multiplied on the `(tokens, lora_rank)` side: where `strategy_lora_mul` splits the last axis into parts that
        do not divide the rank, only its split of the rows is taken.

        Raises:
            TypeError: a strategy is no tuple of tuples of ints.
            ValueError: the dense strategy does not fit a matrix product; or the activation is LogSoftmax, or not made
                of one operator: split those yourself.
        """
        dense = strategy_org_dense_matmul
        check_strategies({"strategy_org_dense_matmul": dense})
        if strategy_lora_mul is not None:
            check_strategies({"strategy_lora_mul": strategy_lora_mul})
            rows, *parts = strategy_lora_mul[0]
            if parts and self.lora_rank % parts[-1]:
                # MindPet multiplies on the side of the outputs; of the rank there is less to split.
                strategy_lora_mul = ((rows, *[1] * len(parts)), *strategy_lora_mul[1:])
        if dense is not None:
            if [len(part) for part in dense] != [2, 2]:
                raise ValueError(f"strategy_org_dense_matmul must split the two axes of both inputs, such as "
                                 f"((2, 4), (1, 4)), but got {dense!r:.100}.")
            if strategy_lora_a_matmul is None:
                strategy_lora_a_matmul = (dense[0], (1, dense[1][1]))
            if strategy_lora_b_matmul is None:
                strategy_lora_b_matmul = ((dense[0][0], 1), (dense[1][0], 1))
        if not hasattr(self, "lora_dropout"):
            self.lora_dropout = delta_dropout(0.0)
        set_strategies([
            ("strategy_org_dense_matmul", self.matmul, dense),
            ("strategy_org_bias_add", self.bias_add if self.has_bias else None, strategy_org_bias_add),
            ("strategy_lora_dropout", self.lora_dropout.dropout, strategy_lora_dropout),
            ("strategy_lora_a_matmul", self.lora_a_matmul, strategy_lora_a_matmul),
            ("strategy_lora_b_matmul", self.lora_b_matmul, strategy_lora_b_matmul),
            ("strategy_lora_mul", self.mul, strategy_lora_mul), ("strategy_lora_add", self.add, strategy_lora_add),
            ("strategy_activation", self.activation, strategy_activation)])
        return self

    def extend_repr(self) -> str:
        """Show the low-rank settings beside those of nn.Dense."""
        return super().extend_repr() + f", lora_rank={self.lora_rank}, lora_alpha={self.lora_alpha}"
