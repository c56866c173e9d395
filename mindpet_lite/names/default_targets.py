"""Which layers PEFT adapts in a known family of models where the user names none."""
from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class Family(NamedTuple):
    """A family of models.

    Attributes:
        name: for people.
        sign: an expression that the path of one of its layers matches whole.
        targets: the layers that PEFT adapts.
        scaled: those that (IA)³ scales.
        feedforward: those among them whose input is scaled.
    """

    name: str
    sign: str
    targets: tuple[str, ...]
    scaled: tuple[str, ...] = ()
    feedforward: tuple[str, ...] = ()


# PEFT 0.21's tables, by what paths show. A family comes before those whose sign it has too.
FAMILIES = (
    Family("Phi", r".*layers\.\d+\.self_attn\.dense", ("q_proj", "v_proj", "fc1", "fc2")),
    Family("OPT", r".*decoder\.layers\.\d+\.self_attn\.out_proj", ("q_proj", "v_proj"), ("k_proj", "v_proj", "fc2"),
           ("fc2",)),
    Family("Llama, Mistral, Qwen2 and Gemma", r".*layers\.\d+\.self_attn\.o_proj", ("q_proj", "v_proj"),
           ("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    Family("MindFormers' Llama", r".*layers\.\d+\.attention\.wo", ("wq", "wv"), ("wk", "wv", "w2"), ("w2",)),
    Family("BERT, RoBERTa and ViT", r".*layer\.\d+\.attention\.(self|attention)\.query", ("query", "value"),
           ("key", "value", "output.dense"), ("output.dense",)),
    Family("GPT-2", r".*h\.\d+\.attn\.c_attn", ("c_attn",), ("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    Family("T5", r".*block\.\d+\.layer\.\d+\.SelfAttention\.q", ("q", "v"), ("k", "v", "wo"), ("wo",)),
    Family("BLOOM, GPT-NeoX, Falcon and GLM", r".*\.query_key_value", ("query_key_value",)),
    Family("CLIP", r".*encoder\.layers\.\d+\.self_attn\.out_proj", ("q_proj", "v_proj")),
)


def family_of(paths: Iterable[str]) -> Family | None:
    """Return the family of the model whose layers have these paths, or None where none is known."""
    listed = list(paths)
    return next((family for family in FAMILIES if any(re.fullmatch(family.sign, path) for path in listed)), None)
