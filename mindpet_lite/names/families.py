"""The same layer under other names: one network as several libraries name it.

A family has one function for each library; it takes the path of a layer and gives what stands before the network itself
(``unet.``, ``model.diffusion_model.``) and what all libraries would call the layer, or None for a path that the library
does not have. Two paths are one layer where both are called the same and the same net is meant by what stands before.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Spelling = Callable[[str], "tuple[str, str] | None"]
_HEAD = r"(?P<head>(?:.*\.)?)"

# Hugging Face | MindFormers and Meta.
_LLAMA = [(f"layers.#.{ours}", f"layers.#.{theirs}") for ours, theirs in (
    ("self_attn.q_proj", "attention.wq"), ("self_attn.k_proj", "attention.wk"), ("self_attn.v_proj", "attention.wv"),
    ("self_attn.o_proj", "attention.wo"), ("mlp.gate_proj", "feed_forward.w1"), ("mlp.up_proj", "feed_forward.w3"),
    ("mlp.down_proj", "feed_forward.w2"), ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"))] + [
    ("embed_tokens", "tok_embeddings"), ("model.norm", "model.norm_out"), ("lm_head", "lm_head")]
# Hugging Face | MindSpore's model zoo | MindFormers.
_BERT = [(f"encoder.layer.#.{hugging}", f"bert_encoder.layers.#.{zoo}", f"bert_encoder.encoder.blocks.#.{formers}")
         for hugging, zoo, formers in (
    ("attention.self.query", "attention.attention.query_layer", "attention.dense1"),
    ("attention.self.key", "attention.attention.key_layer", "attention.dense2"),
    ("attention.self.value", "attention.attention.value_layer", "attention.dense3"),
    ("attention.output.dense", "attention.output.dense", "attention.projection"),
    ("intermediate.dense", "intermediate", "output.mapping"), ("output.dense", "output.dense", "output.projection"))
    ] + [("embeddings.word_embeddings", "bert_embedding_lookup", "word_embedding"),
         ("pooler.dense", "bert.dense", "bert.dense")]

# A residual block: diffusers | the original U-Net | Wukong.
_RESIDUAL = [("norm1", "in_layers.0", "in_layers_norm"), ("conv1", "in_layers.2", "in_layers_conv.conv"),
             ("time_emb_proj", "emb_layers.1", "emb_layers.1"), ("norm2", "out_layers.0", "out_layers_norm"),
             ("conv2", "out_layers.3", "out_layers_conv.conv"),
             ("conv_shortcut", "skip_connection", "skip_connection.conv")]
# What stands outside the blocks, in the same order.
_ENDS = [("conv_in", "input_blocks.0.0", "input_blocks.0.0.conv"), ("conv_norm_out", "out.0", "out.0"),
         ("conv_out", "out.2", "out.2.conv"), ("time_embedding.linear_1", "time_embed.0", "time_embed.0"),
         ("time_embedding.linear_2", "time_embed.2", "time_embed.2"),
         ("add_embedding.linear_1", "label_emb.0.0", "label_emb.0.0"),
         ("add_embedding.linear_2", "label_emb.0.2", "label_emb.0.2")]
_MIDDLE = {("resnets", "0"): "0", ("attentions", "0"): "1", ("resnets", "1"): "2"}
_DIFFUSERS = re.compile(_HEAD + r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?"
                        r"(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_ORIGINAL = re.compile(_HEAD + r"(?P<block>(?:(input|output)_blocks\.(\d+)\.\d+|middle_block\.\d+)\.)(.+)")


def _column(rows: Sequence[tuple[str, ...]], place: int) -> Spelling:
    """Return the spelling in one column of a table; what is common to all is the first column."""
    patterns = [(re.compile(_HEAD + re.escape(row[place]).replace(r"\#", r"(\d+)")), row[0]) for row in rows]

    def spelling(path: str) -> tuple[str, str] | None:
        for pattern, first in patterns:
            match = pattern.fullmatch(path)
            if match:
                head, *numbers = match.groups()
                return head, first.replace("#", numbers[0]) if numbers else first
        return None
    return spelling


def _in_block(part: str, place: int) -> str:
    """Return a path below a residual block, or below any other layer of a block, as the original U-Net has it."""
    return next((row[1] for row in _RESIDUAL if row[place] == part), part)


def _original(place: int) -> Spelling:
    """Return the spelling of the original U-Net (place 1) or of Wukong (place 2)."""
    ends = _column([(row[1], row[place]) for row in _ENDS], 1)

    def spelling(path: str) -> tuple[str, str] | None:
        match = _ORIGINAL.fullmatch(path)
        if not match or ends(path):
            return ends(path)
        head, block, way, number, part = match.groups()
        if way == "output" and part == ("conv" if place == 1 else "conv.conv"):
            # An upsampler comes after the attention if there is one.
            return head, f"output_blocks.{number}.up"
        return head, block + ("op" if part == ("op" if place == 1 else "op.conv") else _in_block(part, place))
    return spelling


def _in_original(depth: int, block: str, number: str | None, kind: str, item: str, part: str) -> str | None:
    """Return what the original U-Net calls a layer of diffusers', None where it has none."""
    if block == "mid_block":
        place = _MIDDLE.get((kind, item))
        return None if place is None or number else f"middle_block.{place}.{_in_block(part, 0)}"
    if number is None:
        return None
    # The way up has one residual block more, so that both ways go up by depth + 1 with each block.
    first = int(number) * (depth + 1)
    if kind in ("downsamplers", "upsamplers"):
        return {("down_blocks", "conv"): f"input_blocks.{first + depth + 1}.0.op",
                ("up_blocks", "conv"): f"output_blocks.{first + depth}.up"}.get((block, part))
    if int(item) >= depth + (block == "up_blocks"):
        return None
    name = f"input_blocks.{first + 1 + int(item)}" if block == "down_blocks" else f"output_blocks.{first + int(item)}"
    return f"{name}.{0 if kind == 'resnets' else 1}.{_in_block(part, 0)}"


def _diffusers(depth: int) -> Spelling:
    """Return the spelling of diffusers for a U-Net with `depth` residual blocks in each block of the way down."""
    ends = _column([(row[1], row[0]) for row in _ENDS], 1)

    def spelling(path: str) -> tuple[str, str] | None:
        match = _DIFFUSERS.fullmatch(path)
        if not match:
            return ends(path)
        head, *parts = match.groups()
        name = _in_original(depth, *parts)
        return None if name is None else (head, name)
    return spelling


FAMILIES: dict[str, list[Spelling]] = {
    "Llama": [_column(_LLAMA, 0), _column(_LLAMA, 1)],
    "BERT": [_column(_BERT, 0), _column(_BERT, 1), _column(_BERT, 2)],
    "the diffusion U-Net": [_original(1), _original(2), *map(_diffusers, range(1, 5))],
}
