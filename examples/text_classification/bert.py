"""BERT as MindSpore cells with the names of Hugging Face's transformers, and the reading of its files.

Devlin et al., 2019, https://arxiv.org/abs/1810.04805: an encoder whose layers have attention to all tokens and a
feed-forward part, each followed by a residual sum and a LayerNorm. The cells have the paths of transformers'
``BertModel``; MindSpore's names of single Parameters (``gamma``, ``beta``, ``embedding_table``) are ``weight`` and
``bias`` in files.

Every shape is static: a graph is compiled once for each length of sentences. Prefixes (more keys than queries) and
virtual tokens (a longer sequence than the ids) are read off the shapes, so that every method of mindpet_lite fits.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import bert_operators
import numpy as np
from mindspore import Tensor, nn, ops
from safetensors import SafetensorError
from safetensors.numpy import load_file
from user_errors import UserError

from mindpet_lite import prefix_mask, prompt_mask
from mindpet_lite.names.parameter_names import pytorch_name

# What is added to the score of a key that nobody may see: its weight is 0 in float32.
HIDDEN = -1e9
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


@dataclass(frozen=True)
class BertConfig:
    """The sizes of a BERT, by the names that its config.json has.

    Raises:
        ValueError: A size is not positive, or hidden_size is no multiple of num_attention_heads.
    """

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, field.type) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"{field.name} must be a positive {field.type.__name__}, got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                             f"{self.num_attention_heads}")


class BertEmbeddings(nn.Cell):
    """LayerNorm(word + position + type) for ids (batch, length); every token has type 0: (batch, rows, hidden).

    There are more rows than ids where the table of words puts virtual tokens before them: they have the first
    positions.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = bert_operators.layer_norm(config.hidden_size, config.layer_norm_eps)
        self.places = Tensor(np.arange(config.max_position_embeddings, dtype=np.int32)[None])
        self.types = Tensor(np.zeros((1, 1), np.int32))

    def construct(self, ids: Tensor) -> Tensor:
        words = self.word_embeddings(ids)
        places = self.position_embeddings(self.places[:, :words.shape[1]]) + self.token_type_embeddings(self.types)
        return self.LayerNorm(words + ops.broadcast_to(places, words.shape))


class BertSelfAttention(nn.Cell):
    """softmax(q kᵀ / √d + mask) v for each head; mask (batch, keys) is 0 for what is seen and HIDDEN for the rest.

    The key and value layers may give more rows than the sequence has: prefixes, which stand first and are seen by all.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.query, self.key, self.value = nn.Dense(width, width), nn.Dense(width, width), nn.Dense(width, width)
        self.heads = config.num_attention_heads
        self.scale = (width // self.heads) ** -0.5
        self.softmax = ops.Softmax(-1)
        self.scores, self.mix = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()

    def split(self, x: Tensor) -> Tensor:
        """(batch, rows, hidden) -> (batch, heads, rows, hidden / heads)."""
        return ops.transpose(ops.reshape(x, (x.shape[0], x.shape[1], self.heads, -1)), (0, 2, 1, 3))

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.split(self.query(x) * self.scale), self.split(self.key(x)), self.split(self.value(x))
        more = key.shape[2] - mask.shape[1]
        if more > 0:
            mask = prefix_mask(mask, more, visible=0)
        scores = self.scores(query, key)
        weights = self.softmax(scores + ops.broadcast_to(mask[:, None, None, :], scores.shape))
        return ops.reshape(ops.transpose(self.mix(weights, value), (0, 2, 1, 3)), x.shape)


class BertSelfOutput(nn.Cell):
    """LayerNorm(x + W h + b)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Dense(config.hidden_size, config.hidden_size)
        self.LayerNorm = bert_operators.layer_norm(config.hidden_size, config.layer_norm_eps)

    def construct(self, h: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(h) + x)


class BertAttention(nn.Cell):
    """Attention with its output layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertSelfOutput(config)

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.output(self.self(x, mask), x)


class BertIntermediate(nn.Cell):
    """gelu(W x + b), by the error function."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Dense(config.hidden_size, config.intermediate_size)
        self.gelu = bert_operators.gelu()

    def construct(self, x: Tensor) -> Tensor:
        return self.gelu(self.dense(x))


class BertOutput(nn.Cell):
    """LayerNorm(x + W h + b)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Dense(config.intermediate_size, config.hidden_size)
        self.LayerNorm = bert_operators.layer_norm(config.hidden_size, config.layer_norm_eps)

    def construct(self, h: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(h) + x)


class BertLayer(nn.Cell):
    """One layer: attention, then the feed-forward part."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class BertEncoder(nn.Cell):
    """The layers, one after the other."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.CellList([BertLayer(config) for _ in range(config.num_hidden_layers)])

    def construct(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x, mask)
        return x


class BertModel(nn.Cell):
    """BERT without its pooler, which this example does not use.

    Args:
        config: The sizes.

    Inputs:
        - **ids** (Tensor): int32 (batch, length), what is left over filled with any id.
        - **mask** (Tensor): float32 (batch, length), 1 for tokens and 0 for what fills.

    Outputs:
        Tensor (batch, length, hidden), the last hidden states; those of virtual tokens are left out.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)

    def get_input_embeddings(self) -> nn.Cell:
        """The table of words."""
        return self.embeddings.word_embeddings

    def construct(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embeddings(ids)
        more = x.shape[1] - ids.shape[1]
        if more > 0:
            mask = prompt_mask(mask, more, visible=1)
        return self.encoder(x, (1.0 - mask) * HIDDEN)[:, more:]


def read_config(folder: Path) -> BertConfig:
    """Reads config.json of a folder as transformers has it.

    Raises:
        UserError: The file is missing or no BERT's.
    """
    path = folder / CONFIG
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give a folder with {CONFIG}, {WEIGHTS} and {TOKENIZER}, or let prepare.py "
                        "fetch the base") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(said, dict) or said.get("model_type") != "bert":
        kind = said.get("model_type") if isinstance(said, dict) else type(said).__name__
        raise UserError(f"{path} is of another architecture: expected model_type bert, got {kind!r}")
    for name, wanted in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if said.get(name, wanted) != wanted:
            raise UserError(f"{path} has {name} {said[name]!r}, and this BERT has {wanted!r} only")
    names = [field.name for field in dataclasses.fields(BertConfig)]
    try:
        return BertConfig(**{name: said[name] for name in names if name in said})
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def load_bert(folder: Path) -> BertModel:
    """Makes a BERT from a folder with config.json and model.safetensors.

    Raises:
        UserError: A file is missing or broken, or the tensors are not those of the config.
    """
    config, path = read_config(folder), folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path} is missing: give a folder with {CONFIG}, {WEIGHTS} and {TOKENIZER}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is broken: {error}") from error
    tensors = {name.removeprefix("bert."): value for name, value in tensors.items()}
    net = BertModel(config)
    wanted = {pytorch_name(name): item for name, item in net.parameters_and_names()}
    missing = [name for name in wanted if name not in tensors]
    other = [f"{name} {tensors[name].shape} instead of {tuple(item.shape)}" for name, item in wanted.items()
             if name in tensors and tensors[name].shape != tuple(item.shape)]
    if missing or other:
        found = [f"{len(names)} {what}: {', '.join(names[:3])}" for names, what in
                 ((missing, "are missing"), (other, "have another shape")) if names]
        raise UserError(f"{path} does not fit {CONFIG} beside it; of its tensors {'; '.join(found)}")
    for name, item in wanted.items():
        item.set_data(Tensor(tensors[name].astype(np.float32)))
    return net.set_train(False)
