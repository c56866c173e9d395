"""A Llama from the `config.json` of its checkpoint, or from MindFormers' configuration."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mindpet_lite.estimate.layers import Layers
from mindpet_lite.estimate.mindformers import NAMES, llama_sizes
from mindpet_lite.estimate.sizes import number, switch
from mindpet_lite.estimate.tape import Value

# Models of the same operators and names, by `model_type`.
MODEL_TYPES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}


@dataclasses.dataclass(frozen=True)
class Llama:
    """Sizes of a Llama, by their names in Hugging Face's `config.json`.

    Attributes:
        attention_bias: whether `q_proj`, `k_proj` and `v_proj` have biases; Qwen2's have.
        output_bias: whether `o_proj` has a bias.
        length: tokens of a sample where nothing else is said.
        names: what another library calls a part, by Hugging Face's name.
        kind: of model.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    output_bias: bool
    length: int | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    kind: str = "Llama"

    @property
    def targets(self) -> tuple[str, ...]:
        """What LoRA adapts unless it is told otherwise: the attention."""
        return tuple(self._name(f"self_attn.{part}_proj").rpartition(".")[2] for part in "qkvo")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Llama:
        """Return the sizes that a `config.json` says.

        Raises:
            ValueError: a size is missing or no positive int, or they do not fit together; it is another model's.
        """
        model = config.get("model_type", "llama")
        if model not in MODEL_TYPES:
            raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, whose operators the plan knows, but "
                             f"is {model!r}.")
        # What a config leaves out is null in some.
        config = {key: value for key, value in config.items() if value is not None}
        width, between, layers, heads, vocabulary = (number(config, name) for name in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"))
        groups = number(config, "num_key_value_heads", heads)
        if heads % groups:
            raise ValueError(f"num_key_value_heads must divide num_attention_heads, but {groups} does not divide "
                             f"{heads}.")
        if "head_dim" not in config and width % heads:
            raise ValueError(f"num_attention_heads must divide hidden_size where there is no head_dim, but {heads} "
                             f"does not divide {width}.")
        tied, bias, mlp_bias = (switch(config, name) for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"))
        # Qwen2's config does not say it.
        is_qwen = model == "qwen2"
        return cls(width, between, layers, heads, groups, vocabulary, number(config, "head_dim", width // heads), tied,
                   attention_bias=bias or is_qwen, mlp_bias=mlp_bias, output_bias=bias and not is_qwen,
                   kind=MODEL_TYPES[model])

    @classmethod
    def of_mindformers(cls, config: Mapping[str, Any]) -> Llama:
        """Return the sizes that MindFormers' `model_config` says.

        Raises:
            ValueError: as `of`.
        """
        length = None if config.get("seq_length") is None else number(config, "seq_length")
        return dataclasses.replace(cls.of(llama_sizes(config)), output_bias=False, length=length, names=NAMES)

    def _name(self, part: str) -> str:
        return self.names.get(part, part)

    def forward(self, tape: Layers, batch: int, length: int | None, recompute: bool) -> Value:
        """Record the forward pass on (batch, length) ids, with the mean cross entropy of the next token.

        Raises:
            ValueError: there is no length.
        """
        length = self.length if length is None else length
        if length is None:
            raise ValueError("a Llama's plan needs seq, the number of tokens of each sample.")
        width, rows = self.hidden_size, batch * length
        table = tape.weight(self._name("model.embed_tokens.embedding_table"), self.vocab_size, width)
        x = tape.apply("Gather", [table], (batch, length, width), lambda reads, results, dy: [
            tape.run("UnsortedSegmentSum", [dy], table.shape)])
        for layer in range(self.num_hidden_layers):
            with tape.recomputed(recompute):
                path = f"model.layers.{layer}"
                before, after = (f"{path}.{self._name(part)}" for part in ("input_layernorm",
                                                                           "post_attention_layernorm"))
                x = tape.binary("Add", x, self._attention(tape, norm(tape, x, before), path))
                x = tape.binary("Add", x, self._mlp(tape, norm(tape, x, after), path))
        x = norm(tape, x, self._name("model.norm"))
        if self.tie_word_embeddings:
            logits = tape.matmul(tape.view(x, rows, width), table)
        else:
            logits = tape.view(tape.dense(x, "lm_head", self.vocab_size, bias=False), rows, self.vocab_size)
        return cross_entropy(tape, logits)

    def _attention(self, tape: Layers, x: Value, path: str) -> Value:
        batch, length, _ = x.shape
        heads, groups, size = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        q, k, v = (tape.transpose(tape.view(tape.dense(x, f"{path}.{self._name(f'self_attn.{name}')}", count * size,
                                                       self.attention_bias),
                                            batch, length, count, size), batch, count, length, size)
                   for name, count in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups)))
        q, k = self._rotated(tape, q), self._rotated(tape, k)
        if heads != groups:
            spread = (batch, groups, heads // groups, length, size)
            k, v = (tape.view(tape.broadcast(tape.view(item, batch, groups, 1, length, size), *spread),
                              batch, heads, length, size) for item in (k, v))
        scores = tape.batched(q, tape.transpose(k, batch, heads, size, length), (batch, heads, length, length),
                              True)
        scores = tape.binary("Add", tape.unary("Mul", scores), tape.input(length, length))
        mixed = tape.batched(tape.softmax(scores), v, (batch, heads, length, size), True)
        mixed = tape.view(tape.transpose(mixed, batch, length, heads, size), batch, length, heads * size)
        return tape.dense(mixed, f"{path}.{self._name('self_attn.o_proj')}", self.hidden_size, self.output_bias)

    def _rotated(self, tape: Layers, x: Value) -> Value:
        """Rotary positions: x cos + (-x₂, x₁) sin."""
        *rest, length, size = x.shape
        angles = tape.input(length, size)
        low, high = (tape.slice(x, *rest, length, size // 2) for _ in range(2))
        turned = tape.concat([tape.unary("Neg", high), low], -1)
        return tape.binary("Add", tape.binary("Mul", x, angles), tape.binary("Mul", turned, angles))

    def _mlp(self, tape: Layers, x: Value, path: str) -> Value:
        gate, up = (tape.dense(x, f"{path}.{self._name(f'mlp.{name}')}", self.intermediate_size, self.mlp_bias)
                    for name in ("gate_proj", "up_proj"))
        return tape.dense(tape.binary("Mul", tape.silu(gate), up), f"{path}.{self._name('mlp.down_proj')}",
                          self.hidden_size, self.mlp_bias)


def norm(tape: Layers, x: Value, path: str) -> Value:
    """RMSNorm written out: x rsqrt(mean(x²) + eps) weight."""
    mean = tape.reduce("ReduceMean", tape.binary("Mul", x, x), *x.shape[:-1], 1)
    root = tape.unary("Rsqrt", tape.unary("Add", mean), "y")
    return tape.binary("Mul", tape.binary("Mul", x, root), tape.parameter(f"{path}.weight", x.shape[-1]))


def cross_entropy(tape: Layers, logits: Value) -> Value:
    """`ops.cross_entropy`: log-softmax written out, and its gradient by each of its operators."""
    shape, column = logits.shape, (logits.shape[0], 1)

    def forward(reads: list[Value]) -> list[Value]:
        most = tape.run("ReduceMax", reads, column)
        powers = tape.run("Exp", [tape.run("Sub", [*reads, most], shape)], shape)
        logs = tape.run("Sub", [*reads, tape.run("ReduceSum", [powers], column)], shape)
        return [tape.run("GatherD", [logs], (1,)), most, powers, logs]

    def backward(reads: list[Value], results: list[Value], dy: Value) -> list[Value | None]:
        _, most, powers, logs = results
        by_label = tape.run("GatherDGradV2", [logs, dy], shape)
        by_logs = tape.run("AddN", [by_label, tape.run("Tile", [dy], shape)], shape)
        by_total = tape.run("ReduceSum", [tape.run("Neg", [by_logs], shape)], column)
        by_power = tape.run("Mul", [tape.run("Tile", [by_total], shape), powers], shape)
        by_most = tape.run("ReduceSum", [tape.run("Neg", [by_power], shape)], column)
        where = tape.run("Cast", [tape.run("Equal", [most, *reads], shape, item=1)], shape)
        return [tape.run("AddN", [tape.run("Mul", [by_most, where], shape), by_power, by_logs], shape)]

    return tape.record([logits], forward, backward)
