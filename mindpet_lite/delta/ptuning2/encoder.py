"""P-Tuning v2 for a net that one writes: the prefixes of all its layers."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindpet_lite.delta.base import check_int
from mindpet_lite.delta.ptuning2.prompts import PrefixEmbedding, Prompts, Ptuning2Settings


class PrefixEncoder(Prompts, nn.Cell):
    r"""The keys and values that every layer of a net reads before those of its input.

    .. math:: [P_{K,1}, P_{V,1}, P_{K,2}, ...] = drop(E) \quad or \quad
              drop(tanh(E W_1^T + b_1) W_2^T + b_2) \text{ with a projection}

    The layer changes the output of a net that reads them from the start: the prefixes take part in the softmax. An
    attention mask gets its columns with :func:`prefix_mask`.

    Parameters: `mindpet_delta_ptuning2_embedding.embedding_table` (pre_seq_len, width) with
    width = num_layers · 2 · num_heads · kv_channels, `mindpet_delta_ptuning2_prefix` (pre_seq_len,), the ids, never
    trained; with a projection `mindpet_delta_ptuning2_dense_in` and `mindpet_delta_ptuning2_dense_out`, which
    `mindpet_delta_ptuning2_trans` holds too.

    Source: Liu et al., https://arxiv.org/abs/2110.07602, sections 3.2 and 3.3.

    Args:
        pre_seq_len (int): rows of the prefix.
        num_layers (int): layers of the net.
        num_heads (int): heads of its attentions.
        kv_channels (int): width of a head.
        prefix_projection (bool): an MLP gives the prefixes.
        projection_dim (int): width of the MLP; without `prefix_projection` it means nothing.
        dropout_prob (int | float): probability in [0, 1) of dropping an element of a prefix in training, for each
            sequence of the batch anew. At 0 there is no dropout operator.
        parallel_config (object | None): has `data_parallel`, `model_parallel` and `vocab_emb_dp`, as the
            TransformerOpParallelConfig of MindFormers; see :meth:`shard` and :class:`PrefixEmbedding`.
        out_perm (tuple[int]): order of the output's axes: a permutation of (0 batch, 1 pre_seq_len, 2 layers' keys
            and values, 3 heads, 4 kv_channels) that starts with 2, as that axis is cut into layers.
        param_init_type (mindspore.dtype): type of the Parameters: float16, bfloat16 or float32.

    Inputs:
        - **batch_size** (int): sequences in the batch.
        - **dtype** (mindspore.dtype): type of the output. Default: float16. The prefixes are computed in the type of
          the Parameters and then cast.

    Outputs:
        Tuple of `num_layers` Tensors `(2, batch_size, num_heads, pre_seq_len, kv_channels)`: keys, then values.

    Raises:
        TypeError: an int is a bool or no int, dropout_prob no number, prefix_projection no bool; parallel_config lacks
            an attribute.
        ValueError: an int is not positive; dropout_prob is outside [0, 1); out_perm is no such permutation.
    """

    live_names = ("mindpet_delta_ptuning2_prefix",)

    def __init__(self, pre_seq_len: int, num_layers: int, num_heads: int, kv_channels: int, prefix_projection: bool,
                 projection_dim: int, dropout_prob: float, parallel_config: Any = None,
                 out_perm: Sequence[int] = (2, 0, 3, 1, 4),
                 param_init_type: mindspore.dtype = mindspore.float32) -> None:
        super().__init__()
        settings = Ptuning2Settings(pre_seq_len, prefix_projection, projection_dim, dropout_prob, param_init_type)
        for name, value in (("num_layers", num_layers), ("num_heads", num_heads), ("kv_channels", kv_channels)):
            check_int(name, value)
        if sorted(out_perm) != [0, 1, 2, 3, 4] or out_perm[0] != 2:
            raise ValueError(f"out_perm must be a permutation of (0, 1, 2, 3, 4) that starts with 2, the axis that is "
                             f"cut into layers, but got {out_perm!r}.")
        self.num_layers, self.num_heads, self.kv_channels = num_layers, num_heads, kv_channels
        self.out_perm = tuple(out_perm)
        ids = Tensor(np.arange(settings.pre_seq_len), mindspore.int64)
        self.mindpet_delta_ptuning2_prefix = Parameter(ids, name=self.live_names[0], requires_grad=False)
        data_parallel, model_parallel, vocab_emb_dp = _parallel(parallel_config)
        width = num_layers * 2 * num_heads * kv_channels
        # The ids are looked up once for the whole batch: nothing of them is split among the devices.
        self._add_prompts(settings, width, PrefixEmbedding(
            settings.pre_seq_len, width, 1, model_parallel, vocab_emb_dp, param_init_type=param_init_type))
        if prefix_projection:
            self.mindpet_delta_ptuning2_trans = nn.SequentialCell(
                self.mindpet_delta_ptuning2_dense_in, self.mindpet_delta_ptuning2_tanh,
                self.mindpet_delta_ptuning2_dense_out)
        self.expand_dims = ops.ExpandDims()
        self.tile = ops.Tile()
        self.cast = ops.Cast()
        self.reshape = ops.Reshape()
        self.transpose = ops.Transpose()
        self.split_layers = ops.Split(axis=0, output_num=num_layers)
        self.shard(data_parallel, model_parallel)

    def construct(self, batch_size: int, dtype: mindspore.dtype = mindspore.float16) -> tuple[Tensor, ...]:
        """Return the keys and values (2, batch_size, num_heads, pre_seq_len, kv_channels) of every layer."""
        ids = self.expand_dims(self.mindpet_delta_ptuning2_prefix, 0)
        # What is the same for every sequence is computed once.
        rows = self._project(self.mindpet_delta_ptuning2_embedding(ids))
        rows = self.tile(rows, (batch_size, 1, 1))
        if self.has_dropout:
            rows = self.dropout(rows)
        rows = self.reshape(rows, (batch_size, self.pre_seq_len, self.num_layers * 2, self.num_heads,
                                   self.kv_channels))
        layers = self.split_layers(self.transpose(rows, self.out_perm))
        return tuple([self.cast(layer, dtype) for layer in layers])

    def shard(self, data_parallel: int, model_parallel: int) -> PrefixEncoder:
        """Set how the operators are split in (semi-)auto-parallel training.

        Args:
            data_parallel: into how many parts the batch is split; `batch_size` is that of all devices.
            model_parallel: into how many parts the outputs of the two Dense layers of the projection are split.

        Raises:
            TypeError, ValueError: an argument is no positive int.
        """
        check_int("data_parallel", data_parallel)
        check_int("model_parallel", model_parallel)
        if self.prefix_projection:
            for dense in (self.mindpet_delta_ptuning2_dense_in, self.mindpet_delta_ptuning2_dense_out):
                dense.matmul.shard(((1, 1), (model_parallel, 1)))
                dense.bias_add.shard(((1, model_parallel), (model_parallel,)))
            self.mindpet_delta_ptuning2_tanh.tanh.shard(((1, 1, model_parallel),))
        self.dropout.dropout.shard(((data_parallel, 1, 1),))
        self.transpose.shard(((data_parallel, 1, 1, 1, 1),))
        by_layer = tuple(data_parallel if axis == 0 else 1 for axis in self.out_perm)
        self.split_layers.shard((by_layer,))
        self.cast.shard((by_layer,))
        return self

    def _drop_projection(self) -> None:
        super()._drop_projection()
        del self.mindpet_delta_ptuning2_trans


def _parallel(config: Any) -> tuple[int, int, bool]:
    """Return data_parallel, model_parallel and vocab_emb_dp of a parallel config; one device without it."""
    if config is None:
        return 1, 1, True
    names = ("data_parallel", "model_parallel", "vocab_emb_dp")
    missing = [name for name in names if not hasattr(config, name)]
    if missing:
        raise TypeError(f"parallel_config must have {', '.join(names)}, but {type(config).__name__} lacks "
                        f"{', '.join(missing)}.")
    return config.data_parallel, config.model_parallel, config.vocab_emb_dp
