"""Cases for the laws of what LoRA gained since: rsLoRA, DoRA, a bias of B."""
from __future__ import annotations

import numpy as np
from laws import Case
from mindspore import nn
from nets import numbers

from mindpet_lite.delta import LoRADense


def dense(scaling):
    """y = x (c V)ᵀ + b + s b_B with V = W + s B A; for DoRA c = m / ||V||, with the norm a constant; else 1."""
    def compute(layer, x, output_gradient):
        weight, a, b = numbers(layer.weight), numbers(layer.mindpet_delta_lora_a), numbers(layer.mindpet_delta_lora_b)
        whole = weight + scaling * b @ a
        norm = np.sqrt((whole ** 2).sum(1))
        scale = numbers(layer.mindpet_delta_lora_magnitude) / norm if layer.use_dora else np.ones(len(weight))
        y = x @ (scale[:, None] * whole).T + numbers(layer.bias)
        rows_x, rows_g = x.reshape(-1, x.shape[-1]), output_gradient.reshape(-1, output_gradient.shape[-1])
        by_weight = rows_g.T @ rows_x
        by_whole = scale[:, None] * by_weight
        by = {layer.mindpet_delta_lora_a: scaling * b.T @ by_whole, layer.weight: by_whole,
              layer.mindpet_delta_lora_b: scaling * by_whole @ a.T, layer.bias: rows_g.sum(0)}
        if layer.use_dora:
            by[layer.mindpet_delta_lora_magnitude] = (by_weight * whole).sum(1) / norm
        if layer.has_lora_bias:
            y = y + scaling * numbers(layer.mindpet_delta_lora_b_bias)
            by[layer.mindpet_delta_lora_b_bias] = scaling * rows_g.sum(0)
        return y, by, output_gradient @ (scale[:, None] * whole)
    return compute


def embedding(layer, ids, output_gradient):
    """y = c V[ids] with V = T + s (B A)ᵀ and c = m / ||V|| over the ids."""
    table, a, b = (numbers(item) for item in (layer.embedding_table, layer.mindpet_delta_lora_embedding_a,
                                              layer.mindpet_delta_lora_embedding_b))
    ids = ids.astype(int)
    whole = table + 5 / 3 * (b @ a).T
    norm = np.sqrt((whole ** 2).sum(0))
    scale = numbers(layer.mindpet_delta_lora_magnitude) / norm
    by_table = np.zeros_like(table)
    np.add.at(by_table, ids.reshape(-1), output_gradient.reshape(-1, table.shape[1]))
    by_whole = by_table * scale
    return scale * whole[ids], {
        layer.embedding_table: by_whole, layer.mindpet_delta_lora_magnitude: (by_table * whole).sum(0) / norm,
        layer.mindpet_delta_lora_embedding_a: 5 / 3 * b.T @ by_whole.T,
        layer.mindpet_delta_lora_embedding_b: 5 / 3 * by_whole.T @ a.T}, None


def dense_case(name, scaling, by_hand=None, **settings):
    lora = {"lora_rank": 3, "lora_alpha": 5, **settings}
    return Case("lora", name, lambda dtype: nn.Dense(6, 4, dtype=dtype), by_hand, lora, (2, 3, 6), dense(scaling))


CASES = [
    dense_case("dense, rsLoRA with a bias of B", 5 / np.sqrt(3),
               lambda dtype: LoRADense(6, 4, 3, 5, use_rslora=True, lora_bias=True, dtype=dtype),
               use_rslora=True, lora_bias=True),
    dense_case("dense, DoRA", 5 / 3, use_dora=True),
    Case("lora", "embedding, DoRA", lambda dtype: nn.Embedding(7, 4, dtype=dtype), None,
         {"lora_rank": 3, "lora_alpha": 5, "use_dora": True}, (2, 3), embedding, ids=7),
]
