"""A Llama for the benchmarks, of plain operators: RMSNorm, rotary positions, grouped queries, SwiGLU."""
from __future__ import annotations

import dataclasses

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes by their names in Hugging Face's `config.json`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int


class RMSNorm(nn.Cell):
    """x rsqrt(mean(x²) + 1e-5) weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = Parameter(initializer("ones", (width,)), name="weight")

    def construct(self, x):
        return x * ops.rsqrt((x * x).mean(-1, keep_dims=True) + 1e-5) * self.weight


class Attention(nn.Cell):
    """Causal attention with rotary positions; several queries share a key."""

    def __init__(self, net: Sizes, length: int) -> None:
        super().__init__()
        self.heads, self.groups = net.num_attention_heads, net.num_key_value_heads
        self.size = net.hidden_size // self.heads
        self.q_proj, self.o_proj = (nn.Dense(net.hidden_size, net.hidden_size, has_bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Dense(net.hidden_size, self.groups * self.size, has_bias=False)
                                    for _ in range(2))
        angles = np.outer(np.arange(length), 10000.0 ** (-np.arange(0, self.size, 2) / self.size))
        angles = np.concatenate([angles, angles], -1)
        self.cos, self.sin = Tensor(np.cos(angles), ms.float32), Tensor(np.sin(angles), ms.float32)
        self.mask = Tensor(np.triu(np.full((length, length), -1e9), 1), ms.float32)

    def split(self, x, heads):
        return x.reshape(x.shape[0], x.shape[1], heads, self.size).transpose(0, 2, 1, 3)

    def rotated(self, x):
        half = self.size // 2
        turned = ops.concat((-x[..., half:], x[..., :half]), -1)
        return x * self.cos + turned * self.sin

    def spread(self, x):
        """Give each key to all the heads that share it."""
        batch, groups, length, size = x.shape
        if groups == self.heads:
            return x
        spread = ops.broadcast_to(x.reshape(batch, groups, 1, length, size),
                                  (batch, groups, self.heads // groups, length, size))
        return spread.reshape(batch, self.heads, length, size)

    def construct(self, x):
        q = self.rotated(self.split(self.q_proj(x), self.heads))
        k = self.rotated(self.split(self.k_proj(x), self.groups))
        k, v = self.spread(k), self.spread(self.split(self.v_proj(x), self.groups))
        scores = ops.matmul(q, k.swapaxes(-1, -2)) * self.size ** -0.5 + self.mask
        mixed = ops.matmul(ops.softmax(scores, -1), v)
        return self.o_proj(mixed.transpose(0, 2, 1, 3).reshape(x.shape))


class MLP(nn.Cell):
    """down(silu(gate(x)) up(x))."""

    def __init__(self, net: Sizes) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Dense(net.hidden_size, net.intermediate_size, has_bias=False)
                                        for _ in range(2))
        self.down_proj = nn.Dense(net.intermediate_size, net.hidden_size, has_bias=False)

    def construct(self, x):
        return self.down_proj(ops.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Cell):
    """Attention and MLP, each on the normed x and added to it."""

    def __init__(self, net: Sizes, length: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(net.hidden_size), RMSNorm(net.hidden_size)
        self.self_attn, self.mlp = Attention(net, length), MLP(net)

    def construct(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Cell):
    """The layers between the embedding and the last norm."""

    def __init__(self, net: Sizes, length: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(net.vocab_size, net.hidden_size)
        self.layers = nn.CellList([Layer(net, length) for _ in range(net.num_hidden_layers)])
        self.norm = RMSNorm(net.hidden_size)

    def construct(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Llama(nn.Cell):
    """Mean cross entropy of each next token of (batch, length + 1) ids."""

    def __init__(self, net: Sizes, length: int) -> None:
        super().__init__()
        self.model = Model(net, length)
        self.lm_head = nn.Dense(net.hidden_size, net.vocab_size, has_bias=False)

    def construct(self, ids):
        logits = self.lm_head(self.model(ids[:, :-1]))
        return ops.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
