"""P-Tuning v2 on the key and value layers of an attention that exists, and its config."""
from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import mindspore
from mindspore import Tensor, nn

from mindpet_lite.delta.base import DeltaConfig
from mindpet_lite.delta.dense import dense_refusal
from mindpet_lite.delta.parts import prefix_of
from mindpet_lite.delta.prefix_dense import PrefixedDense, check_targets, place_names
from mindpet_lite.delta.ptuning2.prompts import PrefixEmbedding, Prompts, Ptuning2Settings


class Ptuning2Dense(Prompts, PrefixedDense):
    r"""The key or value layer of an attention, with a trained prefix before the rows of the sequence.

    .. math:: y = concat([P, act(x W^T + b)]), \quad P = drop(E) \quad or \quad
              drop(tanh(E W_1^T + b_1) W_2^T + b_2) \text{ with a projection}

    P stands before each sequence of a batch. The layer changes the output from the start, in its values and in its
    length: the attention must take more keys than queries. Those that read the lengths of query and key from their
    tensors do; a fixed mask needs :func:`prefix_mask`. Both the key and the value layer need a prefix.

    `weight` and `bias` are where nn.Dense has them. The layer adds `mindpet_delta_ptuning2_embedding.embedding_table`
    (pre_seq_len, out_channels), and with a projection `mindpet_delta_ptuning2_dense_in` and
    `mindpet_delta_ptuning2_dense_out`.

    Dtype rule: parameters keep their type. The Dense computes in what `to_float()` set, else in the type of `weight`,
    the prefix in the type of its own Parameters; the output has the type of the input.

    Source: Liu et al., https://arxiv.org/abs/2110.07602, sections 3.2 and 3.3.

    Args:
        in_channels (int): size of the last axis of the input.
        out_channels (int): size of the last axis of the output.
        pre_seq_len (int): rows of the prefix.
        prefix_projection (bool): an MLP gives P. Default: False, P is a Parameter.
        projection_dim (int): width of the MLP; without `prefix_projection` it means nothing.
        dropout_prob (int | float): probability in [0, 1) of dropping an element of P in training. At 0 there is no
            dropout operator.
        param_init_type (mindspore.dtype): type of what the layer adds: float16, bfloat16 or float32.
        **dense_kwargs: weight_init, bias_init, has_bias, activation and dtype of nn.Dense.

    Inputs:
        - **x** (Tensor): `(*, seq, in_channels)`.

    Outputs:
        Tensor `(*, pre_seq_len + seq, out_channels)` of the type of `x`.

    Raises:
        TypeError: an int is a bool or no int, dropout_prob no number, prefix_projection no bool, or a type is not
            float16, bfloat16 or float32.
        ValueError: an int is not positive; dropout_prob is outside [0, 1); an input has no axis for the sequence.
    """

    def __init__(self, in_channels: int, out_channels: int, pre_seq_len: int = 128, prefix_projection: bool = False,
                 projection_dim: int = 128, dropout_prob: float = 0.01,
                 param_init_type: mindspore.dtype = mindspore.float32, **dense_kwargs: Any) -> None:
        settings = Ptuning2Settings(pre_seq_len, prefix_projection, projection_dim, dropout_prob, param_init_type)
        super().__init__(in_channels, out_channels, **dense_kwargs)
        self._add_delta(settings)

    def _add_delta(self, config: Ptuning2Settings) -> None:
        self._add_prompts(config, self.out_channels, PrefixEmbedding(
            config.pre_seq_len, self.out_channels, param_init_type=config.param_init_type))
        place_names(self, prefix_of(self.weight.name))

    def prefix_rows(self) -> Tensor:
        """Return P (pre_seq_len, out_channels), with dropout in training."""
        rows = self._project(self.mindpet_delta_ptuning2_embedding.embedding_table)
        if self.has_dropout:
            rows = self.dropout(rows)
        return rows


@dataclasses.dataclass(frozen=True)
class Ptuning2Config(DeltaConfig, Ptuning2Settings):
    """Settings of P-Tuning v2, checked when made; the fields are those of :class:`Ptuning2Dense` and `DeltaConfig`.

    `target_modules` names the key and the value layers of attentions, such as ``["to_k", "to_v"]``.

    Raises:
        TypeError, ValueError: as :class:`Ptuning2Dense`.
    """

    pet_type: ClassVar[str] = "ptuning2"

    def __post_init__(self) -> None:
        DeltaConfig.__post_init__(self)
        Ptuning2Settings.__post_init__(self)
        check_targets(self.target_modules)

    @classmethod
    def refusal(cls, cell: nn.Cell) -> str | None:
        """Return why `cell` cannot carry a prefix, or None."""
        return dense_refusal(cell, "P-Tuning v2")

    def adapt(self, cell: nn.Cell) -> Ptuning2Dense:
        """Return the cell with a prefix on the Parameter objects of `cell`."""
        return Ptuning2Dense._on(cell, self)
