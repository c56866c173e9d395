"""The alpha of an adapter that stands in a safetensors file's metadata, instead of in a tensor or a config."""
from __future__ import annotations

from collections.abc import Collection, Mapping

from mindpet_lite.arguments import is_alpha, warn_user

# Trainers that write diffusers' layout without its config state one alpha for all layers under one of these names, and
# diffusers and sglang read it. The rank stands beside it.
_NAMES, _RANKS = ("alpha", "lora_alpha", "network_alpha"), ("rank", "r", "lora_rank", "network_dim")
# kohya's description of the training, with "Dynamic" where layers differ. No tool computes with it: without a tensor
# of alpha, the scale is 1.
_DESCRIBED = ("ss_network_alpha",)
# What counts where every layer has a tensor of alpha.
OF_TENSORS = "the tensors of alpha count"


def stated_alpha(metadata: Mapping[str, str], component: str, ranks: Collection[int]) -> float | None:
    """Return the alpha that the metadata states for the layers of a component; None where they state none.

    Args:
        metadata: of a file in diffusers' layout, which has neither a config nor tensors of alpha.
        component: its name may stand before that of the entry (``transformer.lora_alpha``).
        ranks: of the layers.

    Raises:
        ValueError: it is no positive number, two entries differ, or the rank beside it is that of no layer.
    """
    stated = _entries(metadata, _NAMES, component)
    values = {_positive(text) for text in stated.values()}
    if not stated:
        return None
    alpha = values.pop()
    if values or alpha is None:
        raise ValueError(f"its metadata say {_listed(stated)}, which is not one positive number: which alpha counts "
                         f"is not said.")
    rank = {_positive(text) for text in _entries(metadata, _RANKS, component).values()}
    if rank and not rank & set(map(float, ranks)):
        raise ValueError(f"its metadata say {_listed(stated)} for a rank that no layer has "
                         f"({_listed(_entries(metadata, _RANKS, component))}; the layers have "
                         f"{', '.join(map(str, sorted(set(ranks))))}): which alpha counts is not said.")
    return int(alpha) if alpha.is_integer() else alpha


def warn_of_unused(metadata: Mapping[str, str], ranks: Mapping[str, float]) -> None:
    """Warn of an alpha in the metadata that is not used.

    Args:
        metadata: of the safetensors file.
        ranks: by path, the alpha of each layer that has no tensor of alpha and therefore gets its rank.
    """
    stated = {name: text for name, text in _entries(metadata, (*_NAMES, *_DESCRIBED), "").items()
              if any(_positive(text) != alpha for alpha in ranks.values())}
    _warn(stated, ranks, "a layer without a tensor of alpha has its rank for it")


def warn_of_contrary(metadata: Mapping[str, str], alphas: Mapping[str, float], rule: str) -> None:
    """Warn of an alpha in the metadata that no layer has, where something else says all.

    Args:
        metadata: of the safetensors file.
        alphas: by path.
        rule: which counts, as a part of a sentence.
    """
    stated = {name: text for name, text in _entries(metadata, (*_NAMES, *_DESCRIBED), "").items()
              if _positive(text) is not None and _positive(text) not in alphas.values()}
    _warn(stated, alphas, rule)


def _warn(stated: Mapping[str, str], alphas: Mapping[str, float], rule: str) -> None:
    if stated and alphas:
        first, *others = alphas
        warn_user(f"The file's metadata say {_listed(stated)}, which is not used: {rule}, {alphas[first]:g} for "
                  f"{first}{f' and its own for {len(others)} more' if others else ''}. If the metadata are right, save "
                  f"the adapter with its alpha where it came from.")


def _entries(metadata: Mapping[str, str], names: tuple[str, ...], component: str) -> dict[str, str]:
    return {key: metadata[key] for name in names for key in (name, f"{component}.{name}") if key in metadata}


def _positive(text: str) -> float | None:
    """Return a positive number below `MAX_ALPHA`, None for any other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if is_alpha(value) else None


def _listed(entries: Mapping[str, str]) -> str:
    return " and ".join(f"{name}={text!r:.40}" for name, text in entries.items())
