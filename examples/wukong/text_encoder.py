"""The Chinese CLIP text encoder of Wukong-Huahua: token ids in, one vector per position out."""

import mindspore
import numpy as np
from layers import Attend, name_parameters
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer


class MultiheadAttention(nn.Cell):
    """Self-attention whose query, key and value come from one Dense."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.in_proj = nn.Dense(width, 3 * width, weight_init=Normal(width ** -0.5))
        self.out_proj = nn.Dense(width, width)
        self.attend = Attend(heads)

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = ops.split(self.in_proj(x), x.shape[-1], axis=-1)
        return self.out_proj(self.attend(query, key, value, mask))


class Attention(nn.Cell):
    """Holds the attention one level down, where Wukong's checkpoints have it (`attn.attn`)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = MultiheadAttention(width, heads)

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attn(x, mask)


class ResidualBlock(nn.Cell):
    """x + attention(norm(x)), then x + mlp(norm(x)) with x * sigmoid(1.702 x) as the activation."""

    def __init__(self, width: int, heads: int, epsilon: float) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm((width,), epsilon=epsilon)
        self.c_fc = nn.Dense(width, 4 * width)
        self.c_proj = nn.Dense(4 * width, width)
        self.ln_2 = nn.LayerNorm((width,), epsilon=epsilon)

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        h = self.c_fc(self.ln_2(x))
        return x + self.c_proj(h * ops.sigmoid(1.702 * h))


class Transformer(nn.Cell):
    """The stack of residual blocks."""

    def __init__(self, width: int, layers: int, heads: int, epsilon: float) -> None:
        super().__init__()
        self.resblocks = nn.CellList([ResidualBlock(width, heads, epsilon) for _ in range(layers)])

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class TextEncoder(nn.Cell):
    """CLIP's text transformer (Radford et al., 2021) with a causal mask and without the projection to the image space.

    Args:
        context_length: Tokens per text.
        vocab_size: Entries of the vocabulary.
        output_dim: Width of the output; must equal `width`, as there is no projection.
        width: Width of the transformer, a multiple of `heads`.
        layers: Residual blocks.
        heads: Attention heads.
        epsilon: Added to the variance in every LayerNorm.

    Inputs:
        ids: int32 (batch, context_length), each in [0, vocab_size).

    Outputs:
        float32 (batch, context_length, width), after the last LayerNorm.

    Raises:
        ValueError: `output_dim` differs from `width`, or `width` is not a multiple of `heads`.
    """

    def __init__(self, context_length: int, vocab_size: int, output_dim: int, width: int, layers: int,
                 heads: int, epsilon: float = 1e-7) -> None:
        super().__init__()
        if output_dim != width:
            raise ValueError(f"TextEncoder has no output projection: output_dim must equal width, "
                             f"got output_dim={output_dim} and width={width}.")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width={width} and heads={heads}.")
        self.embedding_table = Parameter(initializer(Normal(0.02), (vocab_size, width)), name="embedding_table")
        self.positional_embedding = Parameter(initializer(Normal(0.01), (context_length, width)),
                                              name="positional_embedding")
        self.ln_final = nn.LayerNorm((width,), epsilon=epsilon)
        self.transformer_layer = Transformer(width, layers, heads, epsilon)
        # -1e4 and not -inf: finite in float16, and no softmax kernel has to take infinities.
        self.mask = Tensor(np.triu(np.full((context_length, context_length), -1e4), 1), mindspore.float32)
        name_parameters(self)

    def construct(self, ids: Tensor) -> Tensor:
        x = ops.gather(self.embedding_table, ids, 0) + self.positional_embedding
        return self.ln_final(self.transformer_layer(x, self.mask))
