"""P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks.

Liu et al., 2022, https://arxiv.org/abs/2110.07602.

    keys = concat([P_K, X W_Kᵀ]),   values = concat([P_V, X W_Vᵀ])      in every layer of the net        (section 3.2)

P is a Parameter, or comes from an embedding through an MLP (section 3.3, "reparameterization").
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import mindspore
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindpet_lite.arguments import check_bool, check_int, check_probability
from mindpet_lite.delta.adapted import Adapted
from mindpet_lite.delta.base import check_float_type
from mindpet_lite.delta.delta_config import DeltaConfig
from mindpet_lite.delta.dense import AdaptedDense, OutputConfig
from mindpet_lite.delta.dropout import delta_dropout
from mindpet_lite.delta.hosts import DenseHost, Host
from mindpet_lite.delta.parts import check_init, initial, prefix_of
from mindpet_lite.delta.prefix_dense import (
    PrefixDelta,
    Prefixed,
    attention_refusal,
    check_targets,
    place_names,
    settle_table,
)
from mindpet_lite.delta.values import setting_parameter

_EMBEDDING = "mindpet_delta_ptuning2_embedding"
_DENSE_IN, _DENSE_OUT = "mindpet_delta_ptuning2_dense_in", "mindpet_delta_ptuning2_dense_out"


@dataclasses.dataclass(frozen=True)
class Ptuning2Settings:
    """The settings of P-Tuning v2, checked when made; see `Ptuning2Dense`."""

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
        vocab_size (int): rows of the table; positive.
        embedding_size (int): width of the table; positive.
        data_parallel (int): into how many parts the first axis of the ids is split; positive. Default: 1.
        model_parallel (int): into how many parts the table's rows are split where `vocab_emb_dp` is False; positive.
            Default: 1.
        vocab_emb_dp (bool): every device holds the whole table. Default: True.
        param_init (Tensor | str | Initializer | number): start of the table. Default: "normal".
        param_init_type (mindspore.dtype): type of the table: float16, bfloat16 or float32. Default: float32.

    Inputs:
        - **input_ids** (Tensor): ints in [0, vocab_size), with two axes where `data_parallel` splits them.

    Outputs:
        Tensor, the shape of `input_ids` with `embedding_size` behind, in the type of the table.

    Raises:
        TypeError: an int is a bool or no int, or another argument is of the wrong kind.
        ValueError: an int is not positive, or `vocab_size` is no multiple of the parts it is split into.

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import Tensor
        >>> layer = mp.PrefixEmbedding(10, 4)
        >>> layer(Tensor([1, 2, 3])).shape
        (3, 4)
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
    """The half that PrefixEncoder and Ptuning2 share: settings, embedding, MLP and dropout."""

    method: ClassVar[str] = "ptuning2"

    pre_seq_len: int
    projection_dim: int
    dropout_prob: float

    def _add_prompts(self, config: Ptuning2Settings, width: int, embedding: PrefixEmbedding) -> None:
        """Make the Parameters of P (pre_seq_len, width)."""
        self.pre_seq_len, self.prefix_projection = config.pre_seq_len, config.prefix_projection
        self.projection_dim, self.dropout_prob = config.projection_dim, config.dropout_prob
        self.dropout = delta_dropout(self.dropout_prob)
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


class PrefixEncoder(Prompts, nn.Cell):
    r"""The keys and values that every layer of a net reads before those of its input.

    $$
    [P_{K,1}, P_{V,1}, P_{K,2}, ...] = drop(E) \quad or \quad
    drop(tanh(E W_1^T + b_1) W_2^T + b_2) \text{ with a projection}
    $$

    The layer changes the output of a net that reads them from the start: the prefixes take part in the softmax. An
    attention mask gets its columns with `prefix_mask`.

    Parameters: `mindpet_delta_ptuning2_embedding.embedding_table` (pre_seq_len, width) with
    width = num_layers · 2 · num_heads · kv_channels, `mindpet_delta_ptuning2_prefix` (pre_seq_len,), the ids, never
    trained; with a projection `mindpet_delta_ptuning2_dense_in` and `mindpet_delta_ptuning2_dense_out`, which
    `mindpet_delta_ptuning2_trans` holds too.

    Source: Liu et al., https://arxiv.org/abs/2110.07602, sections 3.2 and 3.3.

    Args:
        pre_seq_len (int): rows of the prefix; positive.
        num_layers (int): layers of the net; positive.
        num_heads (int): heads of its attentions; positive.
        kv_channels (int): width of a head; positive.
        prefix_projection (bool): an MLP gives the prefixes.
        projection_dim (int): width of the MLP; positive; without `prefix_projection` it means nothing.
        dropout_prob (int | float): probability in [0, 1) of dropping an element of a prefix in training, for each
            sequence of the batch anew. At 0 there is no dropout operator.
        parallel_config (object | None): has `data_parallel`, `model_parallel` and `vocab_emb_dp`, as the
            TransformerOpParallelConfig of MindFormers; see `shard` and `PrefixEmbedding`. Default: None.
        out_perm (tuple[int]): order of the output's axes: a permutation of (0 batch, 1 pre_seq_len, 2 layers' keys
            and values, 3 heads, 4 kv_channels) that starts with 2, as that axis is cut into layers.
            Default: (2, 0, 3, 1, 4).
        param_init_type (mindspore.dtype): type of the Parameters: float16, bfloat16 or float32. Default: float32.

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

    Examples:
        >>> import mindpet_lite as mp
        >>> import mindspore as ms
        >>> encoder = mp.PrefixEncoder(3, num_layers=2, num_heads=2, kv_channels=4, prefix_projection=False,
        ...                            projection_dim=8, dropout_prob=0.0)
        >>> prefixes = encoder(5, ms.float32)
        >>> len(prefixes), prefixes[0].shape
        (2, (2, 5, 2, 3, 4))
    """

    setting_names = ("mindpet_delta_ptuning2_prefix",)

    def __init__(self, pre_seq_len: int, num_layers: int, num_heads: int, kv_channels: int, prefix_projection: bool,
                 projection_dim: int, dropout_prob: float, parallel_config: Any = None,
                 out_perm: Sequence[int] = (2, 0, 3, 1, 4),
                 param_init_type: mindspore.dtype = mindspore.float32) -> None:
        super().__init__()
        settings = Ptuning2Settings(pre_seq_len, prefix_projection, projection_dim, dropout_prob, param_init_type)
        for name, value in (("num_layers", num_layers), ("num_heads", num_heads), ("kv_channels", kv_channels)):
            check_int(name, value)
        if not isinstance(out_perm, (list, tuple)) or sorted(out_perm) != [0, 1, 2, 3, 4] or out_perm[0] != 2:
            raise ValueError(f"out_perm must be a permutation of (0, 1, 2, 3, 4) that starts with 2, the axis that is "
                             f"cut into layers, but got {out_perm!r:.100}.")
        self.num_layers, self.num_heads, self.kv_channels = num_layers, num_heads, kv_channels
        self.out_perm = tuple(out_perm)
        ids = Tensor(np.arange(settings.pre_seq_len), mindspore.int64)
        self.mindpet_delta_ptuning2_prefix = setting_parameter(ids, self.setting_names[0])
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

    def setting_values(self) -> dict[str, Any]:
        """Return the row numbers."""
        return {self.setting_names[0]: np.arange(self.pre_seq_len)}

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


class Ptuning2(Prompts, Prefixed):
    """A key or value layer with a prefix before the sequence from the start of training on; see `Ptuning2Dense`."""

    def _add_delta(self, config: Ptuning2Settings) -> None:
        width = self.outputs(self)
        self._add_prompts(config, width, PrefixEmbedding(config.pre_seq_len, width,
                                                         param_init_type=config.param_init_type))
        place_names(self, prefix_of(self.weight.name))

    def prefix_rows(self) -> Tensor:
        """Return P (pre_seq_len, outputs), with dropout in training."""
        rows = self._project(self.mindpet_delta_ptuning2_embedding.embedding_table)
        if self.has_dropout:
            rows = self.dropout(rows)
        return rows


class Ptuning2Dense(Ptuning2, AdaptedDense):
    r"""The key or value layer of an attention, with a trained prefix before the rows of the sequence.

    $$
    y = concat([P, act(x W^T + b)]), \quad P = drop(E) \quad or \quad
    drop(tanh(E W_1^T + b_1) W_2^T + b_2) \text{ with a projection}
    $$

    P stands before each sequence of a batch. The layer changes the output from the start, in its values and in its
    length: the attention must take more keys than queries. Those that read the lengths of query and key from their
    tensors do; a fixed mask needs `prefix_mask`. Both the key and the value layer need a prefix.

    `weight` and `bias` are where nn.Dense has them. The layer adds `mindpet_delta_ptuning2_embedding.embedding_table`
    (pre_seq_len, out_channels), and with a projection `mindpet_delta_ptuning2_dense_in` and
    `mindpet_delta_ptuning2_dense_out`.

    Dtype rule: parameters keep their type. `to_float(t)` means what it means in MindSpore: the input counts as one of
    type t, and the output has type t. Without it the output has the type of the input. The Dense computes in t, else
    in the type of `weight`, the prefix in the type of its own Parameters.

    Source: Liu et al., https://arxiv.org/abs/2110.07602, sections 3.2 and 3.3.

    Args:
        in_channels (int): size of the last axis of the input; positive.
        out_channels (int): size of the last axis of the output; positive.
        pre_seq_len (int): rows of the prefix; positive. Default: 128.
        prefix_projection (bool): an MLP gives P. Default: False, P is a Parameter.
        projection_dim (int): width of the MLP; positive; without `prefix_projection` it means nothing. Default: 128.
        dropout_prob (int | float): probability in [0, 1) of dropping an element of P in training. At 0 there is no
            dropout operator. Default: 0.01.
        param_init_type (mindspore.dtype): type of what the layer adds: float16, bfloat16 or float32. Default: float32.
        **dense_kwargs: weight_init, bias_init, has_bias, activation and dtype of nn.Dense.

    Inputs:
        - **x** (Tensor): `(*, seq, in_channels)`.

    Outputs:
        Tensor `(*, pre_seq_len + seq, out_channels)`, of the type that the dtype rule says.

    Raises:
        TypeError: an int is a bool or no int, dropout_prob no number, prefix_projection no bool, or a type is not
            float16, bfloat16 or float32.
        ValueError: an int is not positive; dropout_prob is outside [0, 1); an input has no axis for the sequence.

    Examples:
        >>> import mindpet_lite as mp
        >>> import numpy as np
        >>> from mindspore import Tensor, nn
        >>> layer = mp.Ptuning2Dense(4, 8, pre_seq_len=3)
        >>> layer(Tensor(np.ones((2, 5, 4), np.float32))).shape       # the prefix, and five rows of the sequence
        (2, 8, 8)
    """

    def __init__(self, in_channels: int, out_channels: int, pre_seq_len: int = 128, prefix_projection: bool = False,
                 projection_dim: int = 128, dropout_prob: float = 0.01,
                 param_init_type: mindspore.dtype = mindspore.float32, **dense_kwargs: Any) -> None:
        settings = Ptuning2Settings(pre_seq_len, prefix_projection, projection_dim, dropout_prob, param_init_type)
        super().__init__(in_channels, out_channels, **dense_kwargs)
        self._add_delta(settings)


@dataclasses.dataclass(frozen=True)
class Ptuning2Config(OutputConfig, Ptuning2Settings):
    """Settings of P-Tuning v2, checked when made; the fields are those of `Ptuning2Dense` and `DeltaConfig`.

    `target_modules` names the key and the value layers of attentions, such as ``["to_k", "to_v"]``.

    Args:
        pre_seq_len: rows of the prefix; positive. Default: 128.
        prefix_projection: True: an MLP gives the prefix. False: it is a Parameter. Default: False.
        projection_dim: width of the MLP; positive. Without prefix_projection it means nothing. Default: 128.
        dropout_prob: probability in [0, 1) of dropping an element of the prefix in training. Default: 0.01.
        param_init_type: type of what trains: float16, bfloat16 or float32. Default: float32.

    Raises:
        TypeError, ValueError: as `Ptuning2Dense`.

    Examples:
        >>> from mindspore import nn
        >>> import mindpet_lite as mp
        >>> class Attention(nn.Cell):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.to_q, self.to_k, self.to_v = nn.Dense(4, 4), nn.Dense(4, 4), nn.Dense(4, 4)
        >>> net = mp.get_pet_model(Attention(), mp.Ptuning2Config(pre_seq_len=3, target_modules=["to_k", "to_v"]))
        >>> sum(item.size for item in net.trainable_params())
        24
    """

    pet_type: ClassVar[str] = "ptuning2"
    layer: ClassVar[type[Adapted]] = Ptuning2
    by_hand: ClassVar[Mapping[type[Host] | None, type[Adapted]]] = {DenseHost: Ptuning2Dense}
    title: ClassVar[str] = "P-Tuning v2"

    def __post_init__(self) -> None:
        DeltaConfig.__post_init__(self)
        Ptuning2Settings.__post_init__(self)
        check_targets(self.target_modules)

    @classmethod
    def refusal_in(cls, path: str, cells: Mapping[str, nn.Cell]) -> str | None:
        """Return why the attention around the layer cannot take rows before its keys, or None."""
        return attention_refusal(path, cells)

    def shapes(self, cell: nn.Cell) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the embedding and, with a projection, of the MLP."""
        width, size = self.class_for(cell).outputs(cell), self.projection_dim
        return {f"{_EMBEDDING}.embedding_table": (self.pre_seq_len, width),
                **({f"{_DENSE_IN}.weight": (size, width), f"{_DENSE_IN}.bias": (size,),
                    f"{_DENSE_OUT}.weight": (width, size), f"{_DENSE_OUT}.bias": (width,)}
                   if self.prefix_projection else {})}
