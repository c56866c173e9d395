"""LoRA on `mindspore.nn.Embedding` and `mindspore.mint.nn.Embedding`."""
from __future__ import annotations

from typing import Any

import mindspore
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Normal

from mindpet_lite.arguments import check_number
from mindpet_lite.delta.dense import require_float
from mindpet_lite.delta.lora.layer import LoRALayer
from mindpet_lite.delta.lora.settings import LoraSettings
from mindpet_lite.delta.lora.typed import TypedEmbedding, TypedMintEmbedding
from mindpet_lite.delta.parts import as_type

UNIT_NORMAL = Normal(1.0)


class LoRATable(LoRALayer):
    r"""A table of vectors with a trainable low-rank update beside it: what both kinds of embedding share.

    .. math:: y_i = T_i + \frac{\alpha}{r} (B A)^T_i

    `mindpet_delta_lora_embedding_a` (lora_rank, vocab_size) and `mindpet_delta_lora_embedding_b` (embedding_size,
    lora_rank) are PEFT's lora_embedding_A and B; for `scaling` () see :class:`LoRADense`.
    As in PEFT, A starts from zeros and B from a normal distribution of deviation 1 (the other way round, B would learn
    through an A of the size 1/√vocab_size), and A's column at `padding_idx` gets no gradient.

    Dtype rule: that of :class:`LoRADense` with the table for the weight. Ids have no float type, so the output has the
    type that `to_float()` set, else that of the table. (In graph mode MindSpore's `to_float()` does not reach into
    mint.nn.Embedding, and so it does nothing there when adapted either.)

    Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685; for embeddings the authors' loralib, and PEFT.

    Args:
        vocab_size (int): how many ids there are.
        embedding_size (int): size of a vector.
        lora_rank (int): rows of A, columns of B; positive. Above min(vocab_size, embedding_size) a warning says that
            it is wasted.
        lora_alpha (int | float): finite and positive; the update is scaled by lora_alpha / lora_rank.
        lora_dropout (int | float): 0, because ids cannot be dropped. The `lora_dropout` of a config that adapts other
            layers too does not apply to embeddings, as in PEFT.
        lora_a_init (Tensor | str | Initializer | number): start of A. Default: zeros.
        lora_b_init (Tensor | str | Initializer | number): start of B. Default: normal with deviation 1.
        param_init_type (mindspore.dtype): type of A and B: float16, bfloat16 or float32.
        compute_dtype (mindspore.dtype | None): see the dtype rule.
        use_rslora (bool): as for :class:`LoRADense`. (DoRA's norm is over the ids.)
        **embedding_kwargs: the other arguments of the plain layer.

    Inputs:
        - **ids** (Tensor): of int32 or int64 and any shape.

    Outputs:
        Tensor of shape `ids.shape + (embedding_size,)`.

    Raises:
        TypeError: as :class:`LoRADense` and the plain layer.
        ValueError: as :class:`LoRADense` and the plain layer; lora_dropout is not 0.
    """

    delta_names = ("mindpet_delta_lora_embedding_a", "mindpet_delta_lora_embedding_b")
    a_start, b_start = "zeros", UNIT_NORMAL
    out_axis = 1

    def __init__(self, vocab_size: int, embedding_size: int, lora_rank: int, lora_alpha: float,
                 lora_dropout: float = 0.0, lora_a_init: Any = "zeros", lora_b_init: Any = UNIT_NORMAL,
                 param_init_type: mindspore.dtype = mindspore.float32,
                 compute_dtype: mindspore.dtype | None = None, use_rslora: bool = False,
                 **embedding_kwargs: Any) -> None:
        if check_number("lora_dropout", lora_dropout) != 0:
            raise ValueError(f"lora_dropout must be 0, because the ids an embedding takes cannot be dropped, but got "
                             f"{lora_dropout}.")
        settings = LoraSettings(lora_rank, lora_alpha, lora_dropout, lora_a_init, lora_b_init, param_init_type,
                                compute_dtype, use_rslora)
        super().__init__(vocab_size, embedding_size, **embedding_kwargs)
        require_float(self.weight, type(self))
        self._add_delta(settings)

    @classmethod
    def factor_shapes(cls, layer: nn.Cell, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B."""
        ids, size = getattr(layer, cls.base_names[0]).shape
        return (rank, ids), (size, rank)

    def _add_delta(self, config: LoraSettings) -> None:
        ids, size = self.weight.shape
        if config.lora_bias:
            raise ValueError("LoRA on an embedding has no bias: leave lora_bias out, or the layer, with "
                             "exclude_modules.")
        self.compute_dtype = config.compute_dtype
        self._add_factors(config, self.weight, min(ids, size))
        self.lora_padding = None if self.padding_idx is None else self.padding_idx % ids
        self.lora_a_gather = ops.Gather()
        self.lora_b_matmul = ops.MatMul(transpose_a=True, transpose_b=True)

    def _columns(self, ids: Tensor) -> Tensor:
        """Return A's columns for `ids` (n,): (lora_rank, n)."""
        return self.lora_a_gather(self.mindpet_delta_lora_embedding_a, ids, 1)

    def construct(self, ids: Tensor) -> Tensor:
        """Look up `ids` (*); return (*, embedding_size)."""
        dtype, flat = self._compute_type(), ops.reshape(ids, (-1,))
        low = self._columns(flat)
        if self.lora_padding is not None:
            low = ops.where(ops.not_equal(flat, self.lora_padding), low, ops.stop_gradient(low))
        low = self._scaled(as_type(low, dtype), dtype)
        rows = as_type(self._rows(flat), dtype)
        update = self.lora_b_matmul(low, as_type(self.mindpet_delta_lora_embedding_b, dtype))
        if self.use_dora:
            update = self._dora(rows, update, dtype)
        y = rows + update
        return as_type(ops.reshape(y, (*ids.shape, y.shape[1])), self._output_type(ids))

    def _oriented(self, product: Any) -> Any:
        return product.T

    def cost(self) -> str:
        """Say nothing: only the rows that are looked up are cast."""
        return ""

    def settings(self) -> dict[str, Any]:
        """Return lora_rank and lora_alpha, and what is used of use_rslora and use_dora."""
        return {name: value for name, value in super().settings().items() if name != "lora_dropout"}


class LoRAEmbedding(LoRATable, TypedEmbedding):
    """LoRA on `nn.Embedding`; see :class:`LoRATable`. `embedding_table` is (vocab_size, embedding_size)."""

    def _add_delta(self, config: LoraSettings) -> None:
        super()._add_delta(config)
        self.lora_a_matmul = ops.MatMul(transpose_b=True)

    def _columns(self, ids: Tensor) -> Tensor:
        a = self.mindpet_delta_lora_embedding_a
        if self.use_one_hot:
            return self.lora_a_matmul(a, self._one_hot(ids, a.dtype))
        return self.lora_a_gather(a, ids, 1)


class LoRAMintEmbedding(LoRATable, TypedMintEmbedding):
    """LoRA on `mint.nn.Embedding`; see :class:`LoRATable`. `weight` is (num_embeddings, embedding_dim).

    Raises:
        ValueError: the layer has `max_norm`, which rewrites its rows whenever they are looked up, or
            `scale_grad_by_freq`, which A's gradient would not follow.
    """

    def _add_delta(self, config: LoraSettings) -> None:
        for name, reason in (("max_norm", "rewrites the rows of the table whenever they are looked up, frozen or not"),
                             ("scale_grad_by_freq", "scales the table's gradient, which A's would not follow")):
            if getattr(self, name):
                raise ValueError(f"LoRA does not adapt an embedding with {name}={getattr(self, name)!r}, which "
                                 f"{reason}: leave it out with exclude_modules.")
        super()._add_delta(config)
