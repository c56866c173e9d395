"""What P-Tuning v2 is on every kind of cell: its settings, the embedding and the MLP that give the prefix."""
from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import mindspore
from mindspore import Parameter, Tensor, nn, ops

from mindpet_lite.delta.base import check_bool, check_float_type, check_int, check_probability
from mindpet_lite.delta.parts import check_init, initial
from mindpet_lite.delta.prefix_dense import PrefixDelta, settle_table

_EMBEDDING = "mindpet_delta_ptuning2_embedding"
_DENSE_IN, _DENSE_OUT = "mindpet_delta_ptuning2_dense_in", "mindpet_delta_ptuning2_dense_out"


@dataclasses.dataclass(frozen=True)
class Ptuning2Settings:
    """The settings of P-Tuning v2, checked when made; see :class:`Ptuning2Dense`."""

    pre_seq_len: int = 128
    prefix_projection: bool = False
    projection_dim: int = 128
    dropout_prob: float = 0.01
    param_init_type: mindspore.dtype = mindspore.float32

    def __post_init__(self) -> None:
        check_int("pre_seq_len", self.pre_seq_len)
        object.__setattr__(self, "pre_seq_len", int(self.pre_seq_len))
        check_bool("prefix_projection", self.prefix_projection)
        if self.prefix_projection:
            check_int("projection_dim", self.projection_dim)
            object.__setattr__(self, "projection_dim", int(self.projection_dim))
        check_probability("dropout_prob", self.dropout_prob)
        object.__setattr__(self, "dropout_prob", float(self.dropout_prob))
        check_float_type("param_init_type", self.param_init_type)


class PrefixEmbedding(nn.Cell):
    """A table of vectors, looked up by ids, with its parallel strategy.

    Args:
        vocab_size (int): rows of the table.
        embedding_size (int): width of the table.
        data_parallel (int): into how many parts the first axis of the ids is split.
        model_parallel (int): into how many parts the table's rows are split where `vocab_emb_dp` is False.
        vocab_emb_dp (bool): every device holds the whole table.
        param_init (Tensor | str | Initializer | number): start of the table.
        param_init_type (mindspore.dtype): type of the table: float16, bfloat16 or float32.

    Inputs:
        - **input_ids** (Tensor): ints in [0, vocab_size), with two axes where `data_parallel` splits them.

    Outputs:
        Tensor, the shape of `input_ids` with `embedding_size` behind, in the type of the table.

    Raises:
        TypeError: an int is a bool or no int, or another argument is of the wrong kind.
        ValueError: an int is not positive, or `vocab_size` is no multiple of the parts it is split into.
    """

    def __init__(self, vocab_size: int, embedding_size: int, data_parallel: int = 1, model_parallel: int = 1,
                 vocab_emb_dp: bool = True, param_init: Any = "normal",
                 param_init_type: mindspore.dtype = mindspore.float32) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("embedding_size", embedding_size),
                            ("data_parallel", data_parallel), ("model_parallel", model_parallel)):
            check_int(name, value)
        check_bool("vocab_emb_dp", vocab_emb_dp)
        check_init("param_init", param_init)
        check_float_type("param_init_type", param_init_type)
        parts = 1 if vocab_emb_dp else model_parallel
        if vocab_size % parts:
            raise ValueError(f"vocab_size must be a multiple of model_parallel, which splits the table where "
                             f"vocab_emb_dp is False, but got {vocab_size} and {model_parallel}.")
        self.vocab_size, self.embedding_size = vocab_size, embedding_size
        value = initial("param_init", param_init, (vocab_size, embedding_size), param_init_type)
        self.embedding_table = Parameter(value, name="embedding_table", parallel_optimizer=False)
        self.gather = ops.Gather().shard(((parts, 1), (data_parallel, 1)))

    def construct(self, input_ids: Tensor) -> Tensor:
        """Return the rows of the table that `input_ids` names."""
        return self.gather(self.embedding_table, input_ids, 0)


class Prompts(PrefixDelta):
    """The half that PrefixEncoder and Ptuning2Dense share: settings, embedding, MLP and dropout."""

    method: ClassVar[str] = "ptuning2"

    pre_seq_len: int
    projection_dim: int
    dropout_prob: float

    def _add_prompts(self, config: Ptuning2Settings, width: int, embedding: PrefixEmbedding) -> None:
        """Make the Parameters of P (pre_seq_len, width)."""
        self.pre_seq_len, self.prefix_projection = config.pre_seq_len, config.prefix_projection
        self.projection_dim, self.dropout_prob = config.projection_dim, config.dropout_prob
        self.dropout = nn.Dropout(p=self.dropout_prob)
        self.has_dropout = self.dropout_prob > 0
        self.mindpet_delta_ptuning2_embedding = embedding
        self.delta_names = (_EMBEDDING,)
        if config.prefix_projection:
            self.delta_names = (_EMBEDDING, _DENSE_IN, _DENSE_OUT)
            dtype = config.param_init_type
            self.mindpet_delta_ptuning2_dense_in = nn.Dense(width, config.projection_dim, dtype=dtype)
            self.mindpet_delta_ptuning2_tanh = nn.Tanh()
            self.mindpet_delta_ptuning2_dense_out = nn.Dense(config.projection_dim, width, dtype=dtype)

    def _project(self, rows: Tensor) -> Tensor:
        """Return the prefixes that belong to `rows` of the embedding."""
        if self.prefix_projection:
            rows = self.mindpet_delta_ptuning2_tanh(self.mindpet_delta_ptuning2_dense_in(rows))
            rows = self.mindpet_delta_ptuning2_dense_out(rows)
        return rows

    def _drop_projection(self) -> None:
        table = self.mindpet_delta_ptuning2_embedding.embedding_table
        settle_table(table, self._project(table))
        del self.mindpet_delta_ptuning2_dense_in
        del self.mindpet_delta_ptuning2_tanh
        del self.mindpet_delta_ptuning2_dense_out
        self.delta_names = (_EMBEDDING,)

    def settings(self) -> dict[str, Any]:
        """Return pre_seq_len, prefix_projection, projection_dim and dropout_prob."""
        return {"pre_seq_len": self.pre_seq_len, "prefix_projection": self.prefix_projection,
                "projection_dim": self.projection_dim, "dropout_prob": self.dropout_prob}
