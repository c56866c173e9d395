"""The keys of PEFT's tensors as PEFT writes them, from the ways in which others write them."""
from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

PREFIX = "base_model.model."
# What torch.compile, FSDP and checkpointing put around a module, and into its path; nothing else is called so.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# What stands behind a layer's path; PEFT takes the adapter's name out of it when it saves.
_LORA = re.compile(r"(?P<path>.+)\.(?P<tensor>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector"
                   r"|token_adapter\.trainable_tokens_delta)(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?"
                   r"(?P<rest>\.weight|\.bias)?")
_SAVED = ".modules_to_save."
_ORIGINAL = ".original_module."


def plain_keys(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors by the keys that PEFT itself writes.

    Taken out are the adapter's name (``lora_A.default.weight``), which PEFT removes when it saves, and the wrappers of
    torch.compile, FSDP and DistributedDataParallel (``module.base_model.model...``, ``..._orig_mod...``).

    Raises:
        ValueError: the file holds several adapters, or two keys are one. All problems stand in one message.
    """
    keys = {key: _unwrapped(key) for key in tensors}
    matches = [match for key in keys.values() if (match := _LORA.fullmatch(key))]
    adapters = sorted({match["adapter"] or "one without a name" for match in matches})
    problems = [f"it holds several adapters: {', '.join(adapters)}; save the one that is meant alone."] \
        if len(adapters) > 1 else []
    # Of a state dict of the whole model, in which a saved module stands beside its base; "default" is PEFT's own name.
    name = (matches[0]["adapter"] if matches else None) or (
        "default" if any(f"{_SAVED}default." in key and key.replace(f"{_SAVED}default.", ".") not in keys.values()
                         and not key.endswith("bias") for key in keys.values()) else None)
    found: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        # A module that is saved whole stands beside its base then, in the place of which PEFT puts it.
        if name is not None and _ORIGINAL in keys[key]:
            continue
        plain = _without(name, keys[key])
        if plain in found:
            problems.append(f"{key} stands twice in the file, in two spellings.")
        found[plain] = value
    if problems:
        raise ValueError("\n  ".join(problems))
    return found


def reads_as_lora(key: str) -> bool:
    """Tell whether a key is that of a tensor of LoRA, by any spelling."""
    return _LORA.fullmatch(key) is not None


def _unwrapped(key: str) -> str:
    """Return the key without wrappers; ``module`` may be a name of the net's own where it does not stand first."""
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    while parts[:1] == ["module"]:
        parts = parts[1:]
    return ".".join(parts)


def _without(name: str | None, key: str) -> str:
    """Return a key without the adapter's name."""
    match = _LORA.fullmatch(key)
    if match is not None:
        return f"{match['path']}.{match['tensor']}{match['rest'] or ''}"
    return key if name is None else key.replace(f"{_SAVED}{name}.", ".")
