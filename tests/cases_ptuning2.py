"""P-Tuning v2's cases for the laws."""
from __future__ import annotations

from cases_prefix import prefixed_dense
from laws import Case
from mindspore import nn

from mindpet_lite.delta import Ptuning2Dense


def parts_of(layer):
    table = layer.mindpet_delta_ptuning2_embedding.embedding_table
    if not layer.prefix_projection:
        return [table]
    inner, outer = layer.mindpet_delta_ptuning2_dense_in, layer.mindpet_delta_ptuning2_dense_out
    return [table, inner.weight, inner.bias, outer.weight, outer.bias]


def case(name, x_shape, **settings):
    settings = {"pre_seq_len": 3, "dropout_prob": 0, **settings}
    return Case("ptuning2", name, lambda dtype: nn.Dense(6, 4, dtype=dtype),
                lambda dtype: Ptuning2Dense(6, 4, **settings, dtype=dtype), settings, x_shape,
                prefixed_dense(parts_of), starts_as_base=False)


CASES = [
    case("batch of sequences", (2, 5, 6)),
    case("one sequence, with an MLP", (5, 6), prefix_projection=True, projection_dim=7),
]
