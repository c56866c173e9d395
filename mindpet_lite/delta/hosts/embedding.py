"""`mindspore.nn.Embedding` and `mindspore.mint.nn.Embedding` as hosts."""
from __future__ import annotations

import mindspore
from mindspore import Parameter, Tensor, mint, nn, ops

from mindpet_lite.delta.hosts.base import Host
from mindpet_lite.delta.parts import as_type


class TableHost(Host):
    """A table of vectors, (ids, size): ids have no float type, so the output has the type of the table by default."""

    base_names = ("weight",)
    out_axis = 1
    takes_ids = True

    def _output_type(self, x: Tensor) -> mindspore.dtype:
        return self.weight.dtype if self.float_type is None else self.float_type

    def _entered(self, x: Tensor, dtype: mindspore.dtype) -> Tensor:
        return x

    def own_weight(self, dtype: mindspore.dtype) -> Tensor:
        """Return the table in its own type: only the rows that are looked up are cast."""
        return self.weight

    def arranged(self, x: Tensor) -> Tensor:
        """Return the ids in one row."""
        return ops.reshape(x, (-1,))

    def rows(self, ids: Tensor, table: Tensor) -> Tensor:
        """Return the rows of a table for `ids` (n,): (n, size)."""
        raise NotImplementedError

    def linear(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the rows of the ids."""
        return as_type(self.rows(h, weight), dtype)

    def affine(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the rows of the ids: a table has no bias."""
        return self.linear(h, weight, dtype)

    def affine_and_linear(self, h: Tensor, weight: Tensor, dtype: mindspore.dtype) -> tuple[Tensor, Tensor]:
        """Return the rows, twice."""
        rows = self.linear(h, weight, dtype)
        return rows, rows

    def finish(self, y: Tensor, shape: tuple[int, ...], output_type: mindspore.dtype,
               dtype: mindspore.dtype) -> Tensor:
        """Return the rows with the axes of the ids."""
        return as_type(ops.reshape(y, (*shape, y.shape[1])), output_type)

    @classmethod
    def narrow_shape(cls, layer: nn.Cell, rank: int) -> tuple[int, ...]:
        """Return (rank, ids)."""
        return rank, cls.logical_shape(layer)[0]

    def add_low_rank_operators(self, rank: int) -> None:
        """Make the look-up of columns and the product of `widen`."""
        ids = self.logical_shape(self)[0]
        self.lora_padding = None if self.padding_idx is None else self.padding_idx % ids
        self.lora_a_gather = ops.Gather()
        self.lora_b_matmul = ops.MatMul(transpose_a=True, transpose_b=True)

    def columns(self, ids: Tensor, a: Tensor) -> Tensor:
        """Return the columns of `a` (rank, ids) for `ids` (n,): (rank, n)."""
        return self.lora_a_gather(a, ids, 1)

    def narrow(self, h: Tensor, a: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return the columns of the ids; that of `padding_idx` gets no gradient."""
        low = self.columns(h, a)
        if self.lora_padding is not None:
            low = ops.where(ops.not_equal(h, self.lora_padding), low, ops.stop_gradient(low))
        return as_type(low, dtype)

    def widen(self, low: Tensor, b: Tensor, dtype: mindspore.dtype) -> Tensor:
        """Return lowᵀ Bᵀ."""
        return self.lora_b_matmul(low, as_type(b, dtype))


class EmbeddingHost(TableHost, nn.Embedding):
    """`nn.Embedding` with the dtype rule."""

    plain_type, plain_name = nn.Embedding, "nn.Embedding"
    base_names = ("embedding_table",)
    parts = ("vocab_size", "embedding_size", "use_one_hot", "dtype", "padding_idx", "init_tensor", "expand",
             "reshape_flat", "shp_flat", "gather", "one_hot", "on_value", "off_value", "array_mul", "reshape",
             "get_shp", "concat")

    @property
    def weight(self) -> Parameter:
        """The table, by the name that other kinds of layers have for it."""
        return self.embedding_table

    def _one_hot(self, ids: Tensor, dtype: mindspore.dtype) -> Tensor:
        return as_type(self.one_hot(ids, self.vocab_size, self.on_value, self.off_value), dtype)

    def rows(self, ids: Tensor, table: Tensor) -> Tensor:
        """Return the rows of a table, as the plain layer looks them up."""
        if self.use_one_hot:
            return self.array_mul(self._one_hot(ids, table.dtype), table)
        return self.gather(table, ids, 0)

    def add_low_rank_operators(self, rank: int) -> None:
        """Make a product for `use_one_hot` too."""
        super().add_low_rank_operators(rank)
        self.lora_a_matmul = ops.MatMul(transpose_b=True)

    def columns(self, ids: Tensor, a: Tensor) -> Tensor:
        """Return the columns of the ids, as the plain layer looks up rows."""
        if self.use_one_hot:
            return self.lora_a_matmul(a, self._one_hot(ids, a.dtype))
        return self.lora_a_gather(a, ids, 1)


class MintEmbeddingHost(TableHost, mint.nn.Embedding):
    """`mint.nn.Embedding` with the dtype rule."""

    plain_type, plain_name = mint.nn.Embedding, "mint.nn.Embedding"
    parts = ("num_embeddings", "embedding_dim", "dtype", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq",
             "sparse")

    def check(self) -> None:
        """Raise ValueError for `max_norm` and `scale_grad_by_freq`."""
        for name, reason in (("max_norm", "rewrites the rows of the table whenever they are looked up, frozen or not"),
                             ("scale_grad_by_freq", "scales the table's gradient, which A's would not follow")):
            if getattr(self, name):
                raise ValueError(f"no method adapts an embedding with {name}={getattr(self, name)!r}, which {reason}: "
                                 f"leave it out with exclude_modules.")

    def _output_type(self, x: Tensor) -> mindspore.dtype:
        return self.weight.dtype if self.in_graph else super()._output_type(x)

    def _compute_type(self) -> mindspore.dtype:
        # MindSpore's own layer looks up by a function, into which to_float() does not reach in graph mode.
        if self.in_graph and self.compute_dtype is None:
            return self.weight.dtype
        return super()._compute_type()

    def rows(self, ids: Tensor, table: Tensor) -> Tensor:
        """Return the rows of a table, as the plain layer looks them up."""
        return mint.nn.functional.embedding(ids, table, self.padding_idx)
