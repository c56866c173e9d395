"""Weights, sizes and tokenizer out of a GGUF file of the Llama kind, by the `gguf` and `tokenizers` packages."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from common import UserError
from decoder import Sizes
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# llama.cpp's name of a layer's part | Hugging Face's.
PARTS = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL, USER_DEFINED = 3, 4


class GGUF:
    """An open file.

    Args:
        path: Of the file.

    Raises:
        UserError: It is no whole GGUF file, or of another architecture than Llama's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.reader = gguf.GGUFReader(path)
            self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        # A damaged file shows as whatever NumPy raises where a length in it is wrong.
        except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise UserError(f"{path} cannot be read as a GGUF file ({' '.join(str(error).split())[:200]}): it may be "
                            "cut short; fetch it again") from None
        architecture = self.value("general.architecture")
        if architecture != "llama":
            raise UserError(f"{path} holds a model of the architecture {architecture!r}: expected 'llama'; convert the "
                            "model's folder of Hugging Face's instead")
        scaling = self.value("llama.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self.tensors:
            raise UserError(f"{path} scales its rotary positions ({scaling}), which this example does not compute: "
                            "take a model without")

    def value(self, key: str, *default: Any) -> Any:
        """A value of the header.

        Raises:
            UserError: There is none, and no default.
        """
        field = self.reader.fields.get(key)
        if field is not None:
            return field.contents()
        if default:
            return default[0]
        raise UserError(f"{self.path} does not say {key}: it is no complete GGUF file of a language model")

    def sizes(self, context: int) -> Sizes:
        """The sizes of the model; `context` positions at most."""
        heads, width = self.value("llama.attention.head_count"), self.value("llama.embedding_length")
        d = self.value("llama.attention.key_length", width // heads)
        if self.value("llama.rope.dimension_count", d) != d or self.value("llama.attention.value_length", d) != d \
                or self.value("llama.expert_count", 0):
            raise UserError(f"{self.path} turns a part of each head only, has values of another width or several "
                            "experts, which this example does not compute: take a model without")
        return Sizes(
            hidden_size=width, intermediate_size=self.value("llama.feed_forward_length"),
            num_hidden_layers=self.value("llama.block_count"), num_attention_heads=heads,
            num_key_value_heads=self.value("llama.attention.head_count_kv", heads),
            vocab_size=len(self.value("tokenizer.ggml.tokens")), head_dim=d,
            rms_norm_eps=self.value("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=self.value("llama.rope.freq_base", 10000.0),
            tie_word_embeddings="output.weight" not in self.tensors,
            qkv_bias="blk.0.attn_q.bias" in self.tensors, o_bias="blk.0.attn_output.bias" in self.tensors,
            context=min(context, self.value("llama.context_length")))

    def names(self) -> dict[str, str]:
        """llama.cpp's name of each tensor by Hugging Face's."""
        return {hugging_face(name): name for name in self.tensors}

    def read(self, name: str, sizes: Sizes) -> np.ndarray:
        """A tensor as float32, the rows of queries and keys in Hugging Face's order."""
        tensor = self.tensors[name]
        value = gguf.dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in name:
            return unpermuted(value, sizes.num_attention_heads)
        if ".attn_k." in name:
            return unpermuted(value, sizes.num_key_value_heads)
        return value

    def tokenizer(self) -> Tokenizer:
        """The tokenizer: byte-level BPE as GPT-2's, where SmolLM's splits digits one by one first."""
        kind, split = self.value("tokenizer.ggml.model"), self.value("tokenizer.ggml.pre", "")
        if (kind, split) not in (("gpt2", "smollm"), ("gpt2", "gpt-2")):
            raise UserError(f"{self.path} has a tokenizer of the kind {kind} with the splitting {split!r}: expected "
                            "gpt2 with 'smollm' or 'gpt-2'; give the model's folder of Hugging Face's instead")
        tokens, kinds = self.value("tokenizer.ggml.tokens"), self.value("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ", 1)) for merge in self.value("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), bytes_of]) if split == "smollm" else bytes_of
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                      for token, kind in zip(tokens, kinds) if kind in (CONTROL, USER_DEFINED)])
        return tokenizer


def hugging_face(name: str) -> str:
    """Hugging Face's name of a tensor; its own where it has none."""
    layer, _, last = name.rpartition(".")
    parts = layer.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in PARTS:
        return f"model.layers.{parts[1]}.{PARTS[parts[2]]}.{last}"
    return f"{ENDS[layer]}.{last}" if layer in ENDS else name


def unpermuted(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in Hugging Face's order.

    llama.cpp turns neighbours (2i, 2i + 1) of a head together, Hugging Face i and i + d / 2.
    """
    return value.reshape(heads, value.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(value.shape)
