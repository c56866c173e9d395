"""LoRA on linear layers whose operators can be split in (semi-)automatic parallelism."""
from __future__ import annotations

from typing import Any

from mindspore import Tensor, nn, ops

from mindpet_lite.delta.dropout import delta_dropout
from mindpet_lite.delta.hosts.mindformers import FormersLinear, FormersParallelLinear
from mindpet_lite.delta.lora.low_rank import LowRank
from mindpet_lite.delta.lora.settings import LoraSettings
from mindpet_lite.delta.parts import check_strategies, set_strategies


class SplitLowRank(LowRank):
    """LoRA on a layer with the operators `matmul` and `bias_add`: its own follow the strategy of `matmul`."""

    matmul: Any
    bias_add: Any
    has_bias: bool
    lora_a_matmul: Any
    lora_b_matmul: Any

    @classmethod
    def _on(cls, plain: nn.Cell, settings: LoraSettings) -> SplitLowRank:
        layer = super()._on(plain, settings)
        strategy = getattr(layer.matmul, "in_strategy", None)
        return layer.follow(strategy) if strategy else layer

    def follow(self, strategy: tuple) -> SplitLowRank:
        """Split A and B as the product with the layer's own weight is split."""
        return self.shard(strategy)

    def add_low_rank_operators(self, rank: int) -> None:
        """Make operators of the layer's own, which `shard` can split."""
        super().add_low_rank_operators(rank)
        self.mul, self.add = ops.Mul(), ops.Add()

    def scaled(self, low: Tensor, scaling: Tensor) -> Tensor:
        """Return the low-rank activations times the scaling."""
        return self.mul(low, scaling)

    def added(self, y: Tensor, update: Tensor) -> Tensor:
        """Return the sum of the layer's own output and the update."""
        return self.add(y, update)

    def shard(self, strategy_org_dense_matmul: tuple | None = None, strategy_org_bias_add: tuple | None = None,
              strategy_lora_dropout: tuple | None = None, strategy_lora_a_matmul: tuple | None = None,
              strategy_lora_b_matmul: tuple | None = None, strategy_lora_mul: tuple | None = None,
              strategy_lora_add: tuple | None = None, strategy_activation: tuple | None = None) -> SplitLowRank:
        """Set how the operators are split in (semi-)auto-parallel training; each strategy is optional.

        A strategy is a tuple with a tuple of ints for every input of its operator, as `Primitive.shard` takes it.
        Where only the dense strategy ``(s0, s1)`` is given, A's is ``(s0, (1, i))`` and B's is ``((s0[0], 1), (o, 1))``
        with s1 = (o, i), or (i, o) for a weight that lies as (inputs, outputs). What the layer lacks (bias, activation)
        has nothing to split. The scale is multiplied on the `(tokens, lora_rank)` side: where `strategy_lora_mul`
        splits the last axis into parts that do not divide the rank, only its split of the rows is taken.

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
            outputs, inputs = dense[1][::-1] if getattr(self, "is_turned", False) else dense[1]
            if strategy_lora_a_matmul is None:
                strategy_lora_a_matmul = (dense[0], (1, inputs))
            if strategy_lora_b_matmul is None:
                strategy_lora_b_matmul = ((dense[0][0], 1), (outputs, 1))
        if not hasattr(self, "lora_dropout"):
            self.lora_dropout = delta_dropout(0.0)
        set_strategies([
            ("strategy_org_dense_matmul", self.matmul, dense),
            ("strategy_org_bias_add", self.bias_add if self.has_bias else None, strategy_org_bias_add),
            ("strategy_lora_dropout", self.lora_dropout.dropout, strategy_lora_dropout),
            ("strategy_lora_a_matmul", self.lora_a_matmul, strategy_lora_a_matmul),
            ("strategy_lora_b_matmul", self.lora_b_matmul, strategy_lora_b_matmul),
            ("strategy_lora_mul", self.mul, strategy_lora_mul), ("strategy_lora_add", self.add, strategy_lora_add),
            ("strategy_activation", getattr(self, "activation", None), strategy_activation)])
        return self


class _FormersLowRank(SplitLowRank):
    """LoRA that splits its other operators too, as MindFormers' own does."""

    is_turned: bool

    def follow(self, strategy: tuple) -> SplitLowRank:
        """Split dropout by the input, the scaling by rows, and the sum by rows and outputs."""
        (rows, inputs), weight = strategy
        outputs = weight[1 if self.is_turned else 0]
        return self.shard(strategy, strategy_lora_dropout=((rows, inputs),), strategy_lora_mul=((rows, 1), ()),
                          strategy_lora_add=((rows, outputs), (rows, outputs)))


class LoRAFormersLinear(_FormersLowRank, FormersLinear):
    """LoRA on MindFormers' Linear."""


class LoRAFormersParallelLinear(_FormersLowRank, FormersParallelLinear):
    """LoRA on MindFormers' ColumnParallelLinear and RowParallelLinear."""

    inside, construct = LowRank.construct, FormersParallelLinear.entrance  # type: ignore[assignment]
