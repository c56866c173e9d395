"""The cases of trainable tokens for the laws."""
from __future__ import annotations

import numpy as np
from laws import Case
from mindspore import Tensor, nn
from nets import numbers

TOKENS = [5, 2]


def reference(layer, ids, output_gradient):
    """y_i = D_k at the tokens, else T_i: each row's gradient is the sum over the places that look it up."""
    ids, rows = ids.astype(int), layer.mindpet_delta_trainable_tokens_rows
    table = numbers(layer.embedding_table)
    table[TOKENS] = numbers(rows)
    slopes = np.zeros_like(table)
    np.add.at(slopes, ids, output_gradient)
    by_rows = slopes[TOKENS]
    slopes[TOKENS] = 0
    return table[ids], {rows: by_rows, layer.embedding_table: slopes}, None


def table(dtype):
    """Return an embedding; its own `dtype` is not that of its table."""
    values = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    return nn.Embedding(8, 4, embedding_table=Tensor(values).astype(dtype), dtype=dtype)


CASES = [Case("trainable_tokens", "embedding", table, None, {"token_indices": TOKENS}, (2, 8), reference, ids=8)]
