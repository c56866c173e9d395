"""Prefix-Tuning on the key and value layers of an attention that exists, and its config."""
from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import mindspore
from mindspore import Tensor, nn

from mindpet_lite.delta.base import DeltaConfig
from mindpet_lite.delta.dense import dense_refusal
from mindpet_lite.delta.parts import prefix_of
from mindpet_lite.delta.prefix.reparametrised import Prefixes, PrefixSettings
from mindpet_lite.delta.prefix_dense import PrefixedDense, check_targets, place_names

_ROWS = "mindpet_delta_prefixtuning_prefix"


class PrefixDense(Prefixes, PrefixedDense):
    r"""The key or value layer of an attention, with a prefix before the rows of the sequence.

    .. math:: y = concat([P, act(x W^T + b)]), \quad P = drop(tanh(P' W_1^T + b_1) W_2^T + b_2)

    P stands before each sequence of a batch. The layer changes the output from the start, in its values and in its
    length: the attention must take more keys than queries. Those that read the lengths of query and key from their
    tensors do; a fixed mask needs :func:`prefix_mask`. Both the key and the value layer need a prefix.

    `weight` and `bias` are where nn.Dense has them. The layer adds `mindpet_delta_prefixtuning_wte.embedding_table`
    (prefix_token_num, embed_dim) and `mindpet_delta_prefixtuning_control_trans` (a SequentialCell of Dense, Tanh and
    Dense); folded, `mindpet_delta_prefixtuning_prefix` (prefix_token_num, out_channels).

    Dtype rule: parameters keep their type. The Dense computes in what `to_float()` set, else in the type of `weight`,
    the prefix in the type of its own Parameters; the output has the type of the input.

    Source: Li & Liang, https://arxiv.org/abs/2101.00190, sections 4.2 and 4.3.

    Args:
        in_channels (int): size of the last axis of the input.
        out_channels (int): size of the last axis of the output.
        prefix_token_num (int): rows of the prefix.
        embed_dim (int): width of the embedding P'.
        mid_dim (int): width of the MLP.
        dropout_rate (int | float): probability in [0, 1) of dropping an element of P in training. At 0 there is no
            dropout operator.
        prefix_projection (bool): an MLP gives P. False: P is a Parameter, as after `fold()`, and embed_dim and mid_dim
            mean nothing.
        param_init_type (mindspore.dtype): type of what the layer adds: float16, bfloat16 or float32.
        **dense_kwargs: weight_init, bias_init, has_bias, activation and dtype of nn.Dense.

    Inputs:
        - **x** (Tensor): `(*, seq, in_channels)`.

    Outputs:
        Tensor `(*, prefix_token_num + seq, out_channels)` of the type of `x`.

    Raises:
        TypeError: an int is a bool or no int, dropout_rate no number, prefix_projection no bool, or a type is not
            float16, bfloat16 or float32.
        ValueError: an int is not positive; dropout_rate is outside [0, 1); an input has no axis for the sequence.
    """

    def __init__(self, in_channels: int, out_channels: int, prefix_token_num: int = 128, embed_dim: int = 512,
                 mid_dim: int = 512, dropout_rate: float = 0.1, prefix_projection: bool = True,
                 param_init_type: mindspore.dtype = mindspore.float32, **dense_kwargs: Any) -> None:
        settings = PrefixSettings(prefix_token_num, embed_dim, mid_dim, dropout_rate, prefix_projection,
                                  param_init_type)
        super().__init__(in_channels, out_channels, **dense_kwargs)
        self._add_delta(settings)

    def _add_delta(self, config: PrefixSettings) -> None:
        self._add_prefixes(config, self.out_channels, (_ROWS,))
        place_names(self, prefix_of(self.weight.name))

    def prefix_rows(self) -> Tensor:
        """Return P (prefix_token_num, out_channels), with dropout in training."""
        rows = self._evaluate()
        if self.has_dropout:
            rows = self.dropout(rows)
        return rows

    def _evaluate(self) -> Tensor:
        if self.prefix_projection:
            table = self.mindpet_delta_prefixtuning_wte.embedding_table
            return self.mindpet_delta_prefixtuning_control_trans(table)
        return self.mindpet_delta_prefixtuning_prefix

    def _drop_projection(self) -> None:
        self._replace_projection({_ROWS: self._evaluate()})


@dataclasses.dataclass(frozen=True)
class PrefixTuningConfig(DeltaConfig, PrefixSettings):
    """Settings of Prefix-Tuning, checked when made; the fields are those of :class:`PrefixDense` and `DeltaConfig`.

    `target_modules` names the key and the value layers of attentions, such as ``["to_k", "to_v"]``.

    Raises:
        TypeError, ValueError: as :class:`PrefixDense`.
    """

    pet_type: ClassVar[str] = "prefixtuning"
    other_names: ClassVar[tuple[str, ...]] = ("prefix",)

    def __post_init__(self) -> None:
        DeltaConfig.__post_init__(self)
        PrefixSettings.__post_init__(self)
        check_targets(self.target_modules)

    @classmethod
    def refusal(cls, cell: nn.Cell) -> str | None:
        """Return why `cell` cannot carry a prefix, or None."""
        return dense_refusal(cell, "Prefix-Tuning")

    def adapt(self, cell: nn.Cell) -> PrefixDense:
        """Return the cell with a prefix on the Parameter objects of `cell`."""
        return PrefixDense._on(cell, self)
