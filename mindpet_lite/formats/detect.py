"""Which format an adapter is in, by what its files hold."""
from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from mindpet_lite.formats.extras import BUNDLED
from mindpet_lite.formats.lora import OWN_ENTRY
from mindpet_lite.formats.native import FORMAT as NATIVE

FORMATS = ("peft", "diffusers", "kohya", "mindpet", "mindformers", "mlx", NATIVE)
# What every key of a file of the format matches.
_KEYS = {
    "kohya": re.compile(r"(lora_(unet|te[123]?|transformer)|lycoris)_[^.]+\..+"),
    "mindpet": re.compile(r"(.*\.)?mindpet_delta_.+"),
    "mindformers": re.compile(r".+\.lora_[ab](\.weight)?"),
    "peft": re.compile(r"((module|_orig_mod)\.)*base_model\.model\..+"),
    "diffusers": re.compile(r".+\.(lora_[AB]\..+|lora_embedding_[AB].*|lora_magnitude_vector.*|alpha|dora_scale|scalar"
                            r"|lora(_linear_layer)?[._](down|up)\.weight|to_(q|k|v|out)_lora\.(down|up)\.weight"
                            r"|lora_mid\..+|(hada|lokr|oft|boft)_.+|diff(_b)?|[wb]_norm|set_weight|reshape_weight)"),
}


def detect(names: Collection[str], metadata: Mapping[str, str], config: Mapping[str, Any] | None) -> str:
    """Return the format: one of `FORMATS`.

    Args:
        names: of the tensors.
        metadata: the texts beside the tensors; those of a checkpoint by entry.
        config: of ``adapter_config.json``, None where there is none.

    Raises:
        ValueError: it is none of them.
    """
    if config is not None and config.get("format") == NATIVE:
        return NATIVE
    if config is not None and {"fine_tune_type", "lora_parameters"} & config.keys():
        return "mlx"
    names = [name for name in names if not name.startswith(BUNDLED)]
    kinds = [kind for kind, pattern in _KEYS.items() if names and all(map(pattern.fullmatch, names))]
    if config is not None and kinds and kinds[0] in ("mindpet", "mindformers"):
        return "mindformers"
    if config is not None and config.get("peft_type") is not None:
        return "peft"
    if kinds:
        return kinds[0]
    # Checkpoints of ours may hold Parameters of the net's own, as BitFit's, under their names.
    if OWN_ENTRY in metadata or any(map(_KEYS["mindpet"].fullmatch, names)):
        return "mindpet"
    example = f"its keys are like {', '.join(sorted(names)[:3])}" if names else "it holds no tensor"
    raise ValueError(f"this is no adapter of a format that can be read ({', '.join(FORMATS)}): {example}.")
