"""The cases for the laws of LoRA on embeddings."""
from __future__ import annotations

import numpy as np
from laws import Case
from mindspore import Tensor, nn
from nets import numbers

from mindpet_lite.delta import LoRAEmbedding

LORA = {"lora_rank": 2, "lora_alpha": 5}
IDS, SIZE = 7, 4


def reference_of(layer, x, output_gradient):
    """Compute y = T_i + s · (B A)ᵀ_i and its gradients; A's column at padding_idx gets none."""
    ids, scale = x.astype(int), 5 / 2
    table, a, b = (numbers(item) for item in (layer.embedding_table, layer.mindpet_delta_lora_embedding_a,
                                              layer.mindpet_delta_lora_embedding_b))
    y = table[ids] + scale * (b @ a).T[ids]
    rows = output_gradient.reshape(-1, SIZE)
    by_table = np.zeros_like(table)
    np.add.at(by_table, ids.reshape(-1), rows)
    by_a = scale * (by_table @ b).T
    if layer.padding_idx is not None:
        by_a[:, layer.padding_idx] = 0
    return y, {layer.embedding_table: by_table, layer.mindpet_delta_lora_embedding_a: by_a,
               layer.mindpet_delta_lora_embedding_b: scale * (a @ by_table).T}, None


def table(dtype):
    """Return values for a table: nn.Embedding's own `dtype` is not the table's."""
    return Tensor(np.random.default_rng(5).standard_normal((IDS, SIZE)).astype(np.float32)).astype(dtype)


def embedding_case(name, x_shape, **embedding):
    def settings(dtype):
        return {"embedding_table": table(dtype), "dtype": dtype, **embedding}
    return Case("lora", name, lambda dtype: nn.Embedding(IDS, SIZE, **settings(dtype)),
                lambda dtype: LoRAEmbedding(IDS, SIZE, **LORA, **settings(dtype)), LORA, x_shape, reference_of,
                ids=IDS)


CASES = [
    embedding_case("embedding", (3, 5)),
    embedding_case("embedding with padding_idx, 1 axis", (9,), padding_idx=3),
    embedding_case("embedding by one-hot", (2, 2, 3), use_one_hot=True),
]
