"""Prefix-Tuning's cases for the laws."""
from __future__ import annotations

import reference_prefix as reference
from laws import Case
from mindspore import nn
from nets import numbers

from mindpet_lite.delta import PrefixDense

PREFIX = {"prefix_token_num": 3, "embed_dim": 5, "mid_dim": 7, "dropout_rate": 0}


def prefixed_dense(parts_of):
    """Return a reference; `parts_of` names the Parameters of a layer's prefix, one (P) or five (embedding, MLP)."""
    def compute(layer, x, output_gradient):
        parts = parts_of(layer)
        values = [numbers(item) for item in parts]
        prefix = values[0] if len(parts) == 1 else reference.mlp(*values)
        weight = numbers(layer.weight)
        by_x, by_weight, by_bias, by_prefix = reference.dense_gradients(x, weight, len(prefix), output_gradient)
        by = [by_prefix] if len(parts) == 1 else reference.mlp_gradients(*values[:4], by_prefix)
        return reference.dense(x, weight, numbers(layer.bias), prefix), \
            {**dict(zip(parts, by)), layer.weight: by_weight, layer.bias: by_bias}, by_x
    return compute


def parts_of(layer):
    if not layer.prefix_projection:
        return [layer.mindpet_delta_prefixtuning_prefix]
    mlp = layer.mindpet_delta_prefixtuning_control_trans
    return [layer.mindpet_delta_prefixtuning_wte.embedding_table, mlp[0].weight, mlp[0].bias, mlp[2].weight,
            mlp[2].bias]


def case(name, x_shape, **settings):
    settings = {**PREFIX, **settings}
    return Case("prefixtuning", name, lambda dtype: nn.Dense(6, 4, dtype=dtype),
                lambda dtype: PrefixDense(6, 4, **settings, dtype=dtype), settings, x_shape, prefixed_dense(parts_of),
                starts_as_base=False)


CASES = [
    case("batch of sequences", (2, 5, 6)),
    case("one sequence", (5, 6)),
    case("4 axes, no MLP", (2, 1, 3, 6), prefix_projection=False),
]
