"""The models of the PEFT fixtures in MindSpore, with Hugging Face's names, and PEFT's numbers beside ours."""
from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from safetensors.numpy import load_file

from mindpet_lite import PrefixLayer, prefix_mask, prepend_prefix, prompt_mask


class RMSNorm(nn.Cell):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(np.ones(width, np.float32)), name="weight")

    def construct(self, x):
        return x * ops.rsqrt((x * x).mean(-1, keep_dims=True) + 1e-6) * self.weight


class Attention(nn.Cell):
    def __init__(self, width: int, heads: int, groups: int, size: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, size
        self.q_proj = nn.Dense(width, heads * size, has_bias=False)
        self.k_proj = nn.Dense(width, groups * size, has_bias=False)
        self.v_proj = nn.Dense(width, groups * size, has_bias=False)
        self.o_proj = nn.Dense(heads * size, width, has_bias=False)

    def split(self, x, count):
        batch, length, _ = x.shape
        return x.reshape(batch, length, count, self.size).transpose(0, 2, 1, 3)

    def construct(self, x, cos, sin, mask):
        batch, length, _ = x.shape
        q, k = self.split(self.q_proj(x), self.heads), self.split(self.k_proj(x), self.groups)
        v = self.split(self.v_proj(x), self.groups)
        half = self.size // 2
        q = q * cos + ops.concat((-q[..., half:], q[..., :half]), -1) * sin
        k = k * cos + ops.concat((-k[..., half:], k[..., :half]), -1) * sin
        repeats = self.heads // self.groups
        shape = (batch, self.groups, repeats, length, self.size)
        k = ops.broadcast_to(ops.expand_dims(k, 2), shape).reshape(batch, self.heads, length, self.size)
        v = ops.broadcast_to(ops.expand_dims(v, 2), shape).reshape(batch, self.heads, length, self.size)
        weights = ops.softmax(ops.matmul(q, k.transpose(0, 1, 3, 2)) * self.size ** -0.5 + mask, -1)
        return self.o_proj(ops.matmul(weights, v).transpose(0, 2, 1, 3).reshape(batch, length, -1))


class MLP(nn.Cell):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Dense(width, inner, has_bias=False)
        self.up_proj = nn.Dense(width, inner, has_bias=False)
        self.down_proj = nn.Dense(inner, width, has_bias=False)

    def construct(self, x):
        return self.down_proj(ops.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention(64, 4, 2, 16)
        self.mlp = MLP(64, 128)
        self.input_layernorm = RMSNorm(64)
        self.post_attention_layernorm = RMSNorm(64)

    def construct(self, x, cos, sin, mask):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(256, 64, padding_idx=0)
        self.layers = nn.CellList([Layer(), Layer()])
        self.norm = RMSNorm(64)
        angles = np.outer(np.arange(8), 10000.0 ** (-np.arange(0, 16, 2) / 16))
        angles = np.concatenate([angles, angles], -1)
        self.cos, self.sin = Tensor(np.cos(angles), ms.float32), Tensor(np.sin(angles), ms.float32)
        self.mask = Tensor(np.triu(np.full((8, 8), -1e30), 1), ms.float32)

    def construct(self, ids):
        x = self.embed_tokens(ids)
        # The fixtures' attention mask hides the padding, which is token 0.
        hidden = ops.expand_dims(ops.expand_dims(ops.cast(ops.equal(ids, 0), ms.float32), 1), 1)
        mask = self.mask - hidden * 1e30
        for layer in self.layers:
            x = layer(x, self.cos, self.sin, mask)
        return self.norm(x)


class Llama(nn.Cell):
    """`LlamaForCausalLM` of the fixtures, for 8 tokens."""

    output = "logits"

    def __init__(self) -> None:
        super().__init__()
        self.model = Body()
        self.lm_head = nn.Dense(64, 256, has_bias=False)

    def construct(self, ids):
        return self.lm_head(self.model(ids))


class LongBody(Body):
    """The one whose positions and masks follow the length of the hidden states, up to 32."""

    def __init__(self) -> None:
        super().__init__()
        angles = np.outer(np.arange(32), 10000.0 ** (-np.arange(0, 16, 2) / 16))
        angles = np.concatenate([angles, angles], -1)
        self.cos, self.sin = Tensor(np.cos(angles), ms.float32), Tensor(np.sin(angles), ms.float32)
        self.mask = Tensor(np.triu(np.full((32, 32), -1e30), 1), ms.float32)

    def construct(self, ids):
        x = self.embed_tokens(ids)
        length = x.shape[1]
        hidden = ops.cast(ops.equal(ids, 0), ms.float32)
        if length > ids.shape[1]:
            hidden = prompt_mask(hidden, length - ids.shape[1], visible=0)
        mask = self.mask[:length, :length] - ops.expand_dims(ops.expand_dims(hidden, 1), 1) * 1e30
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length], mask)
        return self.norm(x)


class LongLlama(Llama):
    """The one for up to 32 tokens, virtual ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LongBody()


class PrefixAttention(Attention):
    """One that reads keys and values of its own before those of the tokens, behind the positions."""

    def __init__(self, rows: int, heads: int = 4, groups: int = 2, size: int = 16) -> None:
        super().__init__(64, heads, groups, size)
        self.prefix = PrefixLayer(rows, 1, groups, groups * size, 1, dropout_rate=0, prefix_projection=False)

    def construct(self, x, cos, sin, mask):
        batch, length, _ = x.shape
        q, k = self.split(self.q_proj(x), self.heads), self.split(self.k_proj(x), self.groups)
        half = self.size // 2
        q = q * cos + ops.concat((-q[..., half:], q[..., :half]), -1) * sin
        k = k * cos + ops.concat((-k[..., half:], k[..., :half]), -1) * sin
        prefix_key, prefix_value = self.prefix()
        k = prepend_prefix(prefix_key, k.transpose(0, 2, 1, 3).reshape(batch, length, -1))
        v = prepend_prefix(prefix_value, self.v_proj(x))
        k, v = (ops.repeat_interleave(self.split(item, self.groups), self.heads // self.groups, 1) for item in (k, v))
        weights = ops.softmax(ops.matmul(q, k.transpose(0, 1, 3, 2)) * self.size ** -0.5 + mask, -1)
        return self.o_proj(ops.matmul(weights, v).transpose(0, 2, 1, 3).reshape(batch, length, -1))


class PrefixBody(LongBody):
    """The one for attentions with a prefix: positions count from its number of rows on."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        for layer in self.layers:
            layer.self_attn = PrefixAttention(rows)

    def construct(self, ids):
        x, length, rows = self.embed_tokens(ids), ids.shape[1], self.rows
        hidden = ops.expand_dims(ops.expand_dims(ops.cast(ops.equal(ids, 0), ms.float32), 1), 1)
        mask = prefix_mask(self.mask[:length, :length] - hidden * 1e30, rows, visible=0)
        for layer in self.layers:
            x = layer(x, self.cos[rows:rows + length], self.sin[rows:rows + length], mask)
        return self.norm(x)


class PrefixLlama(Llama):
    """The one with 4 keys and values of its own in each attention."""

    def __init__(self) -> None:
        super().__init__()
        self.model = PrefixBody(4)


class ConvNet(nn.Cell):
    """The small convolution net of the fixtures."""

    output = "y"

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, pad_mode="pad", padding=1, has_bias=True)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, pad_mode="pad", padding=1, has_bias=True)
        self.conv3 = nn.Conv2d(16, 8, 1, has_bias=True)

    def construct(self, x):
        return self.conv3(ops.relu(self.conv2(ops.relu(self.conv1(x)))))


class ConvNetGrouped(ConvNet):
    """The one with groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, pad_mode="pad", padding=1, has_bias=True)
        self.conv2 = nn.Conv2d(8, 16, 3, pad_mode="pad", padding=1, group=4, has_bias=True)
        self.conv3 = nn.Conv2d(16, 8, (1, 3), pad_mode="valid")


MODELS = {"llama_tiny": Llama, "conv_tiny": ConvNet, "conv_grouped": ConvNetGrouped}


def base_model(shared: Path, family: str, kind: type[nn.Cell] | None = None) -> nn.Cell:
    """Return the fixtures' base model with its weights, of another class where `kind` says so."""
    net = (kind or MODELS[family])()
    stored = load_file(shared / "fixtures" / "peft" / family / "base" / "model.safetensors")
    for path, parameter in net.parameters_and_names():
        if "prefix" in path:
            continue
        parameter.set_data(Tensor(stored.pop(path.replace("embedding_table", "weight"))))
    assert not stored
    return net.set_train(False)


def inputs_of(io: dict[str, np.ndarray]) -> Tensor:
    """Return the model's input from an io.npz."""
    return Tensor(io["input.input_ids"].astype(np.int32)) if "input.input_ids" in io else Tensor(io["input.x"])


def close(ours: np.ndarray, wanted: np.ndarray, relative: float, what: str = "") -> None:
    """Assert that no element is off by more than `relative` times the largest."""
    off = np.abs(ours.astype(np.float64) - wanted).max() / max(np.abs(wanted).max(), 1e-30)
    assert ours.shape == wanted.shape and off <= relative, f"{what}: off by {off:.2e} of its size"
