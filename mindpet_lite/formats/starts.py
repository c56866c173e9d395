"""Starts of LoRA's factors that take a part out of the base's weights, by PEFT's names of `init_lora_weights`."""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from mindpet_lite.formats.base_hash import FIELD
from mindpet_lite.formats.state import AdapterState

# What is left only depends on the weights: whoever has the base can take the part out again.
RESIDUAL_STARTS = ("pissa", "olora")
# It depends on random numbers, on data or on how a library rounds besides: no file of an adapter tells what was left.
_LOST = re.compile(r"pissa_niter_\d{1,3}|corda|loftq|lora_ga")


def loses_base(start: object) -> bool:
    """Tell whether what a start leaves of the base cannot be known from the base and the adapter's file."""
    return isinstance(start, str) and _LOST.fullmatch(start) is not None


def takes_from_base(start: object) -> bool:
    """Tell whether a start takes a part out of the base's weights."""
    return start in RESIDUAL_STARTS or loses_base(start)


def on_residual_base(state: AdapterState, hash_of: Mapping[str, Callable[[], str]], stated: bool, cure: str
                     ) -> tuple[AdapterState, list[str]]:
    """Return the adapter with `residual_base` among the settings of each layer whose base is what its start left.

    And, a sentence each, why that is not known to be at hand.

    Args:
        state: with the paths of the net or the base at hand.
        hash_of: what gives the hash of each layer at hand, by path. It tells where an adapter says what was left.
        stated: the user says that the weights at hand are those that were left.
        cure: what to do where nothing tells, as a sentence.
    """
    starts = {path: start for path, layer in state.layers.items()
              if takes_from_base(start := (layer.settings or {}).get("init_lora_weights"))}
    if not starts:
        return state, ["residual_base says that the start took a part out of the base's weights, but that of this "
                       "adapter took nothing: leave it out."] if stated else []
    expected = state.config.get(FIELD)
    hashes = expected if isinstance(expected, Mapping) else {}
    lost = [path for path, start in starts.items() if loses_base(start)]
    unknown = [] if stated else [path for path in lost if path not in hashes or path not in hash_of
                                 or hashes[path] != hash_of[path]()]
    layers = {path: dataclasses.replace(layer, settings={**(layer.settings or {}), "residual_base": True})
              if stated and path in starts or path in lost else layer for path, layer in state.layers.items()}
    more = f" and {len(unknown) - 1} more layers" if unknown[1:] else ""
    return dataclasses.replace(state, layers=layers), [
        f"{path}{more}: the start, init_lora_weights = {starts[path]!r}, took a part out of the base's weights that "
        f"the file does not tell, and nothing tells that the weights at hand are what was left (the residual base). "
        f"{cure}" for path in unknown[:1]]
