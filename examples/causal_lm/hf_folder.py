"""Weights, sizes and tokenizer out of a folder of Hugging Face's: config.json, safetensors, tokenizer.json."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import UserError, explained
from decoder import Sizes
from tokenizers import Tokenizer

from mindpet_lite.offline.base import Base, open_base

# What each kind of model means where its config.json does not say.
KINDS = {"llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
         "qwen2": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6},
         "mistral": {"max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "num_key_value_heads": 8,
                     "sliding_window": 4096}}
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Base]:
    """The open weights; errors of a damaged file or a missing shard become one sentence."""
    with contextlib.ExitStack() as stack:
        with explained(f"{folder} cannot be read as a model's folder", ValueError, OSError):
            base = stack.enter_context(open_base(folder))
        yield base


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, checked to be of a kind that `decoder` computes.

    Raises:
        UserError: It is missing, no JSON, of another kind, or asks for something that is not computed.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a model's configuration ({type(error).__name__}: {error}): give a "
                        "folder of Hugging Face's with config.json") from None
    if kind not in KINDS:
        raise UserError(f"{path}: model_type is {kind!r}: expected {', '.join(KINDS)}")
    config = {**KINDS[kind], **config}
    for key in NEEDED:
        if not isinstance(config.get(key), int):
            raise UserError(f"{path}: {key} must be a whole number, got {config.get(key)!r}")
    for key, value in not_computed(config).items():
        raise UserError(f"{path}: {key} is {value!r}, which this example does not compute: take a model without")
    return config


def rope(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of rotary positions, in the spelling of transformers 4 or 5."""
    found = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    return {"rope_theta": config.get("rope_theta", 10000.0), **found}


def not_computed(config: dict[str, Any]) -> dict[str, Any]:
    """Whatever in config.json changes the numbers in a way that `decoder` does not know."""
    settings = rope(config)
    found = {"hidden_act": config.get("hidden_act", "silu"), "quantization_config": config.get("quantization_config"),
             "partial_rotary_factor": settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)),
             "rope_scaling": settings.get("rope_type", settings.get("type", "default"))}
    plain = {"hidden_act": "silu", "quantization_config": None, "partial_rotary_factor": 1.0, "rope_scaling": "default"}
    return {key: value for key, value in found.items() if value != plain[key]}


def window(config: dict[str, Any]) -> int | None:
    """Positions that a query sees, None for all before it."""
    return config.get("sliding_window") if config.get("use_sliding_window", config["model_type"] == "mistral") else None


def sizes_of(config: dict[str, Any], context: int) -> Sizes:
    """The sizes of the model. Within a sliding window all positions are seen, so the context ends there."""
    heads = config["num_attention_heads"]
    qwen2 = config["model_type"] == "qwen2"
    bias = bool(config.get("attention_bias", False)) and config["model_type"] == "llama"
    limits = (context, config["max_position_embeddings"], window(config))
    return Sizes(
        **{key: config[key] for key in NEEDED}, num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads, rms_norm_eps=config["rms_norm_eps"],
        rope_theta=float(rope(config)["rope_theta"]), tie_word_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=qwen2 or bias, o_bias=bias, mlp_bias=config.get("mlp_bias", False),
        context=min(limit for limit in limits if limit))


def read_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json.

    Raises:
        UserError: It is missing or damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"there is no {path}: save the model's tokenizer there, as tokenizer.json")
    with explained(f"{path} cannot be read as a tokenizer", Exception):
        return Tokenizer.from_file(str(path))


def read_chat(folder: Path) -> dict[str, Any]:
    """What the tokenizer's files say of chats: the template, and the ids or texts of tokens that end an answer."""
    def read(name: str) -> dict[str, Any]:
        with explained(f"{folder / name} is not valid JSON", ValueError):
            return json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}

    about = read("tokenizer_config.json")
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else about.get("chat_template")
    if isinstance(template, list):
        template = next((one["template"] for one in template if one.get("name") == "default"), None)
    texts = [about.get(name) for name in ("bos_token", "eos_token")]
    bos, eos = (text.get("content") if isinstance(text, dict) else text for text in texts)
    ends = read("generation_config.json").get("eos_token_id", read("config.json").get("eos_token_id"))
    return {"template": template, "bos": bos or "", "eos": eos or "",
            "stop": [ends] if isinstance(ends, int) else list(ends or [])}
