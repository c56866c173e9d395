"""What Prefix-Tuning is on every kind of cell: its settings, the embedding and the MLP that give the prefix."""
from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import mindspore
from mindspore import Parameter, Tensor, nn

from mindpet_lite.delta.base import check_bool, check_float_type, check_int, check_probability
from mindpet_lite.delta.parts import initial
from mindpet_lite.delta.prefix_dense import PrefixDelta, folded_parameter

WTE, TRANS = "mindpet_delta_prefixtuning_wte", "mindpet_delta_prefixtuning_control_trans"
TABLE = f"{WTE}.embedding_table"


@dataclasses.dataclass(frozen=True)
class PrefixSettings:
    """The settings of Prefix-Tuning, checked when made; see :class:`PrefixDense`."""

    prefix_token_num: int = 128
    embed_dim: int = 512
    mid_dim: int = 512
    dropout_rate: float = 0.1
    prefix_projection: bool = True
    param_init_type: mindspore.dtype = mindspore.float32

    def __post_init__(self) -> None:
        for name in ("prefix_token_num", "embed_dim", "mid_dim"):
            check_int(name, getattr(self, name))
            # Python's own int: what numpy counts as one, JSON does not.
            object.__setattr__(self, name, int(getattr(self, name)))
        check_probability("dropout_rate", self.dropout_rate)
        object.__setattr__(self, "dropout_rate", float(self.dropout_rate))
        check_bool("prefix_projection", self.prefix_projection)
        check_float_type("param_init_type", self.param_init_type)


class Prefixes(PrefixDelta):
    """The half that PrefixLayer and PrefixDense share: settings, embedding, MLP and dropout."""

    method: ClassVar[str] = "prefixtuning"

    prefix_token_num: int
    embed_dim: int
    mid_dim: int
    dropout_rate: float

    def _add_prefixes(self, config: PrefixSettings, width: int, folded_names: tuple[str, ...]) -> None:
        """Make the Parameters of P (prefix_token_num, width), or its parts under `folded_names` without an MLP."""
        self.prefix_token_num, self.embed_dim, self.mid_dim = config.prefix_token_num, config.embed_dim, config.mid_dim
        self.dropout_rate, self.prefix_projection = config.dropout_rate, config.prefix_projection
        self.dropout = nn.Dropout(p=self.dropout_rate)
        self.has_dropout = self.dropout_rate > 0
        rows, dtype = config.prefix_token_num, config.param_init_type
        if config.prefix_projection:
            self.delta_names = (WTE, TRANS)
            self.mindpet_delta_prefixtuning_wte = nn.Embedding(
                rows, config.embed_dim, embedding_table=initial(WTE, "normal", (rows, config.embed_dim), dtype))
            self.mindpet_delta_prefixtuning_control_trans = nn.SequentialCell(
                nn.Dense(config.embed_dim, config.mid_dim, dtype=dtype), nn.Tanh(),
                nn.Dense(config.mid_dim, width, dtype=dtype))
            return
        self.delta_names = folded_names
        for name in folded_names:
            value = initial(name, "normal", (rows, width // len(folded_names)), dtype)
            setattr(self, name, Parameter(value, name=name))

    def _replace_projection(self, rows: dict[str, Tensor]) -> None:
        """Put Parameters of `rows` in the place of embedding and MLP."""
        table = self.mindpet_delta_prefixtuning_wte.embedding_table
        for name, value in rows.items():
            setattr(self, name, folded_parameter(name, value, table, TABLE))
        del self.mindpet_delta_prefixtuning_wte
        del self.mindpet_delta_prefixtuning_control_trans
        self.delta_names = tuple(rows)

    def settings(self) -> dict[str, Any]:
        """Return prefix_token_num, embed_dim, mid_dim, dropout_rate and prefix_projection."""
        return {"prefix_token_num": self.prefix_token_num, "embed_dim": self.embed_dim, "mid_dim": self.mid_dim,
                "dropout_rate": self.dropout_rate, "prefix_projection": self.prefix_projection}
