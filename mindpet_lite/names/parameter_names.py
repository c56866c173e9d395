"""What libraries call parameters, embeddings and output layers: the one table of these names."""
from __future__ import annotations

import re

# MindSpore's names of the Parameters that PyTorch calls otherwise.
PYTORCH_NAMES = {"gamma": "weight", "beta": "bias", "embedding_table": "weight", "moving_mean": "running_mean",
                 "moving_variance": "running_var"}
# The last part of the path of a table of words: what get_input_embeddings() of transformers' models gives, the names of
# MindFormers and Meta (tok_embeddings), of ChatGLM and mint (embedding), of CLIP (token_embedding).
EMBEDDINGS = frozenset("""
    embed_tokens word_embeddings word_embedding shared embeddings embedding wte tok_embeddings embed_in input_embedding
    tokens_embed token_embedding token_embeddings w embed""".split())
# The end of the path of an output layer: what get_output_embeddings() of transformers' models gives.
HEADS = ("lm_head", "embed_out", "proj_out", "output_projection", "predictions.decoder", "lm_head.decoder",
         "lm_head.out_proj", "generator_lm_head", "pred_layer.proj", "lm_loss", "vocab_projector", "head.decoder",
         "output_layer")
_LOOKUP = re.compile(r"([a-z]+_)*(embed|embedding|embeddings)(_table|_in)?|wpe")


def pytorch_name(name: str) -> str:
    """Return the name of a parameter with the last part that PyTorch has."""
    head, dot, last = name.rpartition(".")
    return f"{head}{dot}{PYTORCH_NAMES.get(last, last)}"


def is_embedding(path: str) -> bool:
    """Tell whether a layer is called as tables of words are."""
    return path.rpartition(".")[2] in EMBEDDINGS


def is_head(path: str) -> bool:
    """Tell whether a layer is called as output layers are."""
    return any(path == head or path.endswith(f".{head}") for head in HEADS)


def is_lookup(path: str) -> bool:
    """Tell whether a layer is called as embeddings of any kind are: of words, of positions, of types."""
    last = path.rpartition(".")[2]
    return last in EMBEDDINGS or _LOOKUP.fullmatch(last) is not None
