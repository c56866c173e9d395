"""LoRA on `mindspore.nn.Embedding` and `mindspore.mint.nn.Embedding`."""
from __future__ import annotations

from typing import Any

import mindspore

from mindpet_lite.arguments import check_number
from mindpet_lite.delta.hosts import require_float
from mindpet_lite.delta.hosts.embedding import EmbeddingHost, MintEmbeddingHost
from mindpet_lite.delta.lora.low_rank import UNIT_NORMAL, LowRank
from mindpet_lite.delta.lora.settings import LoraSettings


class LoRATable(LowRank):
    r"""A table of vectors with a trainable low-rank update beside it: what both kinds of embedding share.

    $$
    y_i = T_i + \frac{\alpha}{r} (B A)^T_i
    $$

    `mindpet_delta_lora_embedding_a` (lora_rank, vocab_size) and `mindpet_delta_lora_embedding_b` (embedding_size,
    lora_rank) are PEFT's lora_embedding_A and B; for `scaling` () see `LoRADense`.
    As in PEFT, A starts from zeros and B from a normal distribution of deviation 1 (the other way round, B would learn
    through an A of the size 1/√vocab_size), and A's column at `padding_idx` gets no gradient.

    Dtype rule: that of `LoRADense` with the table for the weight. Ids have no float type, so the output has the
    type that `to_float()` set, else that of the table. (In graph mode MindSpore's `to_float()` does not reach into
    mint.nn.Embedding, and so it does nothing there when adapted either.)

    Source: Hu et al., LoRA, https://arxiv.org/abs/2106.09685; for embeddings the authors' loralib, and PEFT.

    Args:
        vocab_size (int): how many ids there are; positive.
        embedding_size (int): size of a vector; positive.
        lora_rank (int): rows of A, columns of B; positive. Above min(vocab_size, embedding_size) a warning says that
            it is wasted.
        lora_alpha (int | float): finite and positive; the update is scaled by lora_alpha / lora_rank.
        lora_dropout (int | float): 0, because ids cannot be dropped. The `lora_dropout` of a config that adapts other
            layers too does not apply to embeddings, as in PEFT. Default: 0.0.
        lora_a_init (Tensor | str | Initializer | number): start of A. Default: zeros.
        lora_b_init (Tensor | str | Initializer | number): start of B. Default: normal with deviation 1.
        param_init_type (mindspore.dtype): type of A and B: float16, bfloat16 or float32. Default: float32.
        compute_dtype (mindspore.dtype | None): see the dtype rule. Default: None.
        use_rslora (bool): scale by lora_alpha / √lora_rank instead. (DoRA's norm is over the ids.) Default: False.
        **embedding_kwargs: the other arguments of the plain layer.

    Inputs:
        - **ids** (Tensor): of int32 or int64 and any shape.

    Outputs:
        Tensor of shape `ids.shape + (embedding_size,)`.

    Raises:
        TypeError: as `LoRADense` and the plain layer.
        ValueError: as `LoRADense` and the plain layer; lora_dropout is not 0.
    """

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


class LoRAEmbedding(LoRATable, EmbeddingHost):
    """LoRA on `nn.Embedding`; see `LoRATable`. `embedding_table` is (vocab_size, embedding_size).

    Examples:
        >>> import mindpet_lite as mp
        >>> from mindspore import Tensor
        >>> layer = mp.LoRAEmbedding(10, 4, lora_rank=2, lora_alpha=4)
        >>> layer(Tensor([[1, 2, 3]])).shape
        (1, 3, 4)
        >>> layer.mindpet_delta_lora_embedding_a.shape, layer.mindpet_delta_lora_embedding_b.shape
        ((2, 10), (4, 2))
    """


class LoRAMintEmbedding(LoRATable, MintEmbeddingHost):
    """LoRA on `mint.nn.Embedding`; see `LoRATable`. `weight` is (num_embeddings, embedding_dim).

    Raises:
        ValueError: the layer has `max_norm`, which rewrites its rows whenever they are looked up, or
            `scale_grad_by_freq`, which A's gradient would not follow.

    Examples:
        >>> import mindpet_lite as mp
        >>> layer = mp.LoRAMintEmbedding(10, 4, lora_rank=2, lora_alpha=4)
        >>> layer.mindpet_delta_lora_embedding_a.shape, layer.mindpet_delta_lora_embedding_b.shape
        ((2, 10), (4, 2))
    """
