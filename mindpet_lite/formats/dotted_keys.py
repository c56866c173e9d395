"""Which component of a pipeline a dotted key is of, as diffusers and its followers write it."""
from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from mindpet_lite.names import components

# What stands before a component's layers, kohya's prefixes with a dot too. What is called the diffusion model is the
# U-Net or the transformer, as the layers' names say.
_DENOISER = tuple(f"{'.'.join(name)}." for name, component in components.SPELLINGS.items()
                  if component == components.DENOISER)
_HEADS = {"lora_unet.": components.UNET, "lora_transformer.": "transformer", "lora_te.": "text_encoder",
          "lora_te1.": "text_encoder", "lora_te2.": "text_encoder_2", "lora_te3.": "text_encoder_3",
          **{f"{'.'.join(name)}.": component for name, component in components.SPELLINGS.items()
             if component != components.DENOISER}}
# What stands behind a layer's path.
_PARTS = r"\.(lora_(A|B|down|up)\..*|(hada|lokr)_[^.]*|alpha|dora_scale|scalar)$"
_KOHYA = re.compile(r"(lora_(unet|te\d?|transformer)|lycoris)_")


def by_component(keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return the component of each key and the key below it."""
    found = {key: (_HEADS.get(head, components.UNET), key.removeprefix(head))
             for key in keys for head in [_head(key)]}
    inner = {key: below for key, (_, below) in found.items() if key.startswith(_DENOISER)}
    paths = {re.sub(_PARTS, "", below) for below in inner.values()}
    if components.component_of(paths) == components.TRANSFORMER:
        found |= {key: (components.TRANSFORMER, below) for key, below in inner.items()}
    return found


def _head(key: str) -> str:
    """Return what a key has before the layer's path to say the component, empty for nothing."""
    return next((head for head in (*_DENOISER, *_HEADS) if key.startswith(head)), "")


def component_of_keys(keys: Iterable[str], paths: Iterable[str], component: str) -> str:
    """Return which component a file of one is of, as far as its keys say so."""
    heads = set(map(_head, keys))
    if heads == {""}:
        return ""
    return components.denoiser_of(paths) if heads & set(_DENOISER) else component


def unknown_keys(keys: Collection[str]) -> list[str]:
    """Return a sentence for each key that does not say its component, or is of another layout."""
    return components.unknown_encoders(keys) + [
        f"{key} is one of kohya's keys, in a file of another layout: which layer it is of is not said."
        for key in keys if _KOHYA.match(key)]
