"""The part of an adapter that is for one component of a diffusion pipeline."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mindpet_lite.formats.base_hash import FIELD
from mindpet_lite.formats.state import AdapterState
from mindpet_lite.names.components import COMPONENTS, alike, in_paths

# The formats that say the component of each layer.
_SAYING = ("diffusers", "kohya")


def part(state: AdapterState, component: str | None, target: str | None = None) -> AdapterState:
    """Return the adapter of one component: of an adapter of several its part, under the paths of that net.

    Args:
        state: an adapter of several components, of this one alone, or one that does not say which it is of.
        component: one of `names.components.COMPONENTS`; None for all there is.
        target: the format that it will be written in, if it will.

    Raises:
        ValueError: there is no such component, the adapter has nothing of it, or `target` does not say components.
    """
    if component is None:
        return state
    if component not in COMPONENTS:
        raise ValueError(f"component must be one of {', '.join(map(repr, COMPONENTS))}, but got {component!r}.")
    several = not state.component and bool(state.layers) and in_paths(state.layers)
    known = sorted({path.partition(".")[0] for path in state.layers} if several else {state.component} - {""})
    if known and not any(alike(component, name) for name in known):
        raise ValueError(f"component is {component!r}, but the adapter is of {' and '.join(known)}.")
    if not known and target not in (None, *_SAYING):
        raise ValueError(f"component is {component!r}, but the files of {target} do not say a component: leave it out.")
    if not several:
        return dataclasses.replace(state, component=component)
    config: dict[str, Any] = _below(component, state.config) or dict(state.config)
    if isinstance(config.get(FIELD), Mapping):
        config[FIELD] = _below(component, config[FIELD])
    # What is carried goes by the keys of a file of all components.
    return AdapterState(state.method, _below(component, state.layers), _below(component, state.trained), config,
                        component=component, shared=state.shared)


def _below(component: str, items: Mapping[str, Any]) -> dict[str, Any]:
    """Return the items whose names begin with the component, without it."""
    head = f"{component}."
    return {name.removeprefix(head): item for name, item in items.items() if name.startswith(head)}
