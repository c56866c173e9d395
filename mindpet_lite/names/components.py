"""The parts of a diffusion pipeline that one file can hold adapters of: U-Net, text encoders and the like.

In an `AdapterState` the component stands first in each path (``text_encoder.text_model...``), but not where the file
holds the U-Net alone: then the paths are those of the U-Net.
"""
from __future__ import annotations

from collections.abc import Iterable

UNET = "unet"
COMPONENTS = (UNET, "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "transformer_2")


def split(paths: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return by path its component and the path below it; without components in the paths, all are the U-Net's."""
    parts = {path: tuple(path.split(".", 1)) for path in paths}
    if all(len(part) == 2 and part[0] in COMPONENTS for part in parts.values()):
        return {path: (part[0], part[1]) for path, part in parts.items()}
    return {path: (UNET, path) for path in parts}


def in_paths(paths: Iterable[str]) -> bool:
    """Return whether the component stands in the paths."""
    return all(component != UNET or below != path for path, (component, below) in split(paths).items())


def join(component: str, path: str, components: Iterable[str], keep: bool = False) -> str:
    """Return the path in an `AdapterState` of a file with these `components`; `keep` names the U-Net in any case."""
    return path if not keep and set(components) == {UNET} else f"{component}.{path}"
