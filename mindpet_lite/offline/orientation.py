"""Which layers of a base hold their weight as (in, out): transformers' Conv1D."""
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mindpet_lite.offline.model_config import model_types

# Models of Hugging Face that have such layers, how their classes begin, and the names of these layers in them.
_MODELS = {"gpt2": "GPT2", "openai-gpt": "OpenAIGPT", "imagegpt": "ImageGPT",
           "decision_transformer": "DecisionTransformer", "clvp": "Clvp", "clvp_decoder": "ClvpDecoder"}
_CONV1D = re.compile(r"(.*\.)?(c_attn|q_attn|c_proj|c_fc)")


def inputs_first(path: str, config: Mapping[str, Any], fan_in_fan_out: bool | None = None) -> bool | None:
    """Tell whether the layer at `path` holds its weight as (in, out); None where that is not known.

    PEFT has one `fan_in_fan_out` for all layers of an adapter and corrects it for each of them, so that a file's says
    what its last layer was: the model decides. Where its config does not say what model it is, a name and the flag
    must agree.

    Args:
        path: of the layer.
        config: of the base.
        fan_in_fan_out: of the adapter's config.
    """
    is_named = _CONV1D.fullmatch(path) is not None
    models = model_types(config)
    if any(model in _MODELS or model.startswith(tuple(_MODELS.values())) for model in models):
        return is_named
    if models:
        # Of a model that is not in the table nobody but the flag says that it has such layers.
        return None if fan_in_fan_out else False
    return is_named if is_named == bool(fan_in_fan_out) else None


def has_inputs_first(config: Mapping[str, Any]) -> bool:
    """Tell whether the model of a config has layers that hold their weight as (in, out)."""
    return bool(inputs_first("c_proj", config))
