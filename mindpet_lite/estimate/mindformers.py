"""MindFormers' `model_config` of a Llama, in the words of Hugging Face's `config.json`."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindpet_lite.estimate.sizes import number, switch

# Its names of a block's parts and of what stands around the blocks, by Hugging Face's.
NAMES = {
    "model.embed_tokens.embedding_table": "model.tok_embeddings.embedding_weight", "model.norm": "model.norm_out",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}
_SIZES = {"hidden_size": "hidden_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
          "vocab_size": "vocab_size"}


def model_config(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the `model_config` block of a MindFormers configuration, None where there is none."""
    for place in (document.get("model"), document):
        if isinstance(place, Mapping) and isinstance(place.get("model_config"), Mapping):
            return place["model_config"]
    return None


def llama_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a `config.json` would say of the Llama that a `model_config` describes.

    Raises:
        ValueError: it is another model's, or lacks a size; or the model has parts that the plan does not know.
    """
    config = {key: value for key, value in config.items() if value is not None}
    if config.get("type", "LlamaConfig") != "LlamaConfig":
        raise ValueError(f"type of model_config must be LlamaConfig, whose operators the plan knows, but is "
                         f"{config['type']!r}.")
    if switch(config, "qkv_concat"):
        raise ValueError("qkv_concat is true: the plan knows attention with wq, wk and wv alone.")
    experts = config.get("moe_config")
    if isinstance(experts, Mapping) and experts.get("expert_num", 1) != 1:
        raise ValueError(f"moe_config has {experts['expert_num']!r} experts: the plan knows models without experts.")
    sizes: dict[str, Any] = {ours: number(config, theirs) for ours, theirs in _SIZES.items()}
    sizes["intermediate_size"] = _intermediate(config, sizes["hidden_size"])
    if "n_kv_heads" in config:
        sizes["num_key_value_heads"] = number(config, "n_kv_heads")
    return {**sizes, "attention_bias": switch(config, "qkv_has_bias"),
            "tie_word_embeddings": switch(config, "tie_word_embeddings")}


def _intermediate(config: Mapping[str, Any], width: int) -> int:
    """Return the width of the feed-forward part: two thirds of four times the model's, up to a multiple."""
    if "intermediate_size" in config:
        return number(config, "intermediate_size")
    between = 4 * width
    factor = config.get("ffn_dim_multiplier")
    if factor is not None:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < 100:
            raise ValueError(f"ffn_dim_multiplier must be a positive number, but is {factor!r}.")
        between = int((factor + 0.01) * between)
    multiple = number(config, "multiple_of", 256)
    return multiple * -(-int(2 * between / 3) // multiple)
