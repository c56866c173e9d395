"""A decoder of the Llama kind (Touvron et al., arXiv 2302.13971), its cells and parameters named as Hugging Face's.

Grouped queries, rotary positions, RMSNorm, SwiGLU, a head that may be the embedding's table. Inside, activations are
rows (batch * length, width). Llama, Mistral and Qwen2 differ in which layers have biases, which `Sizes` says.
"""

from dataclasses import dataclass

import mindspore as ms
import numpy as np
import operators
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

LARGEST_BATCH = 4096


@dataclass(frozen=True)
class Sizes:
    """Sizes by their names in Hugging Face's `config.json`.

    Args:
        head_dim: Width of a head.
        qkv_bias: Whether q_proj, k_proj and v_proj have biases (Qwen2).
        o_bias: Whether o_proj has one.
        mlp_bias: Whether the layers of the MLP have biases.
        context: Positions at most; tables are made for so many.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    context: int = 2048


def rotation(sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Tables (context, head_dim) of cos and sin of position * theta^(-2i / d), sin with `operators.Rotate`'s signs."""
    d = sizes.head_dim
    angles = np.outer(np.arange(sizes.context), sizes.rope_theta ** (-np.arange(0, d, 2, dtype=np.float64) / d))
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([cos, cos], 1).astype(np.float32), np.concatenate([-sin, sin], 1).astype(np.float32)


def dense(inputs: int, outputs: int, has_bias: bool) -> nn.Dense:
    """A linear layer of zeros: what it holds is loaded."""
    return nn.Dense(inputs, outputs, weight_init="zeros", bias_init="zeros", has_bias=has_bias)


class RMSNorm(nn.Cell):
    """`operators.RMSNormRows` with its weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = Parameter(initializer("ones", (width,)), name="weight")
        self.norm = operators.rms_norm(eps)

    def construct(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight)


class Attention(nn.Cell):
    """Causal attention with rotary positions; several queries share a key."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.groups, self.d = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
        width = sizes.hidden_size
        self.q_proj = dense(width, self.heads * self.d, sizes.qkv_bias)
        self.k_proj = dense(width, self.groups * self.d, sizes.qkv_bias)
        self.v_proj = dense(width, self.groups * self.d, sizes.qkv_bias)
        self.o_proj = dense(self.heads * self.d, width, sizes.o_bias)
        self.rotate = operators.Rotate()
        self.query_heads, self.key_heads = operators.by_head(self.heads, self.d), operators.by_head(self.groups, self.d)
        self.attend = operators.attend(self.heads, self.groups)

    def project(self, x: Tensor, shared: tuple) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head; queries and keys turned to their positions, queries scaled."""
        cos_q, sin_q, cos_k, sin_k, _, queries, keys = shared
        batch = cos_q.shape[0]
        query = self.rotate(self.query_heads.split(self.q_proj(x), batch, queries), cos_q, sin_q)
        key = self.rotate(self.key_heads.split(self.k_proj(x), batch, keys), cos_k, sin_k)
        return query, key, self.key_heads.split(self.v_proj(x), batch, keys)

    def mixed(self, query: Tensor, key: Tensor, value: Tensor, shared: tuple) -> Tensor:
        """The output's rows."""
        return self.o_proj(self.query_heads.join(self.attend(query, key, value, shared[4]), shared[5]))

    def construct(self, x: Tensor, shared: tuple) -> Tensor:
        query, key, value = self.project(x, shared)
        return self.mixed(query, key, value, shared)


class MLP(nn.Cell):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, inner = sizes.hidden_size, sizes.intermediate_size
        self.gate_proj, self.up_proj = (dense(width, inner, sizes.mlp_bias) for _ in range(2))
        self.down_proj = dense(inner, width, sizes.mlp_bias)
        self.swiglu = operators.swiglu()

    def construct(self, x: Tensor) -> Tensor:
        return self.down_proj(self.swiglu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Cell):
    """Attention and MLP, each on the normed x and added to it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.mlp = MLP(sizes)

    def construct(self, x: Tensor, shared: tuple) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), shared)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Cell):
    """The layers between the embedding and the last norm: ids (batch, length) to rows (batch * length, width)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads, self.groups, self.d = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
        self.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.hidden_size, embedding_table="zeros")
        self.layers = nn.CellList([Layer(sizes) for _ in range(sizes.num_hidden_layers)])
        self.norm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.query_heads, self.key_heads = operators.by_head(self.heads, self.d), operators.by_head(self.groups, self.d)
        self.attend = operators.attend(self.heads, self.groups)
        self.cos, self.sin = map(Tensor, rotation(sizes))
        self.places = Tensor(np.arange(sizes.context, dtype=np.float32))
        self.numbers = Tensor(np.arange(max(sizes.context, LARGEST_BATCH, self.heads), dtype=np.int32))

    def tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What turns queries and keys at positions (batch or 1, 1, length, d), for all layers; queries are scaled."""
        batch, _, length, d = cos.shape
        query, key = (batch, self.heads, length, d), (batch, self.groups, length, d)
        scale = d ** -0.5
        return (ops.broadcast_to(cos * scale, query), ops.broadcast_to(sin * scale, query),
                ops.broadcast_to(cos, key), ops.broadcast_to(sin, key))

    def whole(self, batch: int, length: int) -> tuple:
        """What all layers share for texts from position 0 on: tables, the mask, the orders of heads.

        Position i sees those up to i.
        """
        cos = ops.broadcast_to(self.cos[:length].reshape(1, 1, length, self.d), (batch, 1, length, self.d))
        sin = ops.broadcast_to(self.sin[:length].reshape(1, 1, length, self.d), (batch, 1, length, self.d))
        places = self.places[:length]
        allowed = (places.reshape(length, 1) >= places.reshape(1, length)).astype(ms.float32)
        mask = self.attend.mask(ops.broadcast_to(allowed.reshape(1, length, length), (batch, length, length)))
        return (*self.tables(cos, sin), mask, self.query_heads.orders(self.numbers, batch, length),
                self.key_heads.orders(self.numbers, batch, length))

    def construct(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        shared = self.whole(batch, length)
        x = self.embed_tokens(ids.reshape(-1))
        for layer in self.layers:
            x = layer(x, shared)
        return self.norm(x)


class Decoder(nn.Cell):
    """The whole net: ids (batch, length), int32, to logits (batch, length, vocabulary).

    What is padded stands at the end of a row: no position sees a later one.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.model = Model(sizes)
        self.tied = sizes.tie_word_embeddings
        if not self.tied:
            self.lm_head = dense(sizes.hidden_size, sizes.vocab_size, False)
        self.matmul = ops.MatMul(transpose_b=True)

    def head(self, rows: Tensor, table: Tensor) -> Tensor:
        """Logits of rows of the last norm; `table` is the embedding's, which is the head where the two are tied."""
        return self.matmul(rows, table) if self.tied else self.lm_head(rows)

    def construct(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        return self.head(self.model(ids), self.model.embed_tokens.embedding_table).reshape(batch, length, -1)


class AnswerLoss(nn.Cell):
    """Cross entropy of the tokens of the answers: their sum over `total`.

    The head is computed for positions before a token of an answer only; there is room for a fixed number of them.

    Inputs:
        ids (batch, length), int32; places (room,), int32: positions in the flattened ids; labels (room,), int32: the
        token that follows each; real (room, 1), float32: 1, or 0 where room is left over; total (), float32: what the
        sum is divided by.

    Outputs:
        (), float32.
    """

    def __init__(self, net: Decoder) -> None:
        super().__init__(auto_prefix=False)
        self.net = net
        self.entropy = operators.entropy()
        self.log_vocabulary = float(np.log(net.sizes.vocab_size))

    def construct(self, ids: Tensor, places: Tensor, labels: Tensor, real: Tensor, total: Tensor) -> Tensor:
        rows = ops.gather(self.net.model(ids), places, 0)
        # A row of zeros has logits of zero: its loss is the log of the vocabulary's size, and it has no gradient.
        logits = self.net.head(rows * ops.broadcast_to(real, rows.shape), self.net.model.embed_tokens.embedding_table)
        mean = self.entropy(logits, labels)
        room = places.shape[0]
        return (mean * room - (room - real.sum()) * self.log_vocabulary) / total
