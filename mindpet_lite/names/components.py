"""The parts of a diffusion pipeline that one file can hold adapters of: U-Net, text encoders and the like.

In an `AdapterState` of several components the component stands first in each path (``text_encoder.text_model...``).
Where an adapter is of one component, the paths are those of that net and `AdapterState.component` says which it is.
"""
from __future__ import annotations

from collections.abc import Iterable

from mindpet_lite.names.layouts import TEXT_ENCODERS, UNETS
from mindpet_lite.names.underscores import networks_of

UNET, TRANSFORMER, TEXT_ENCODER = "unet", "transformer", "text_encoder"
COMPONENTS = (UNET, TEXT_ENCODER, "text_encoder_2", "text_encoder_3", TRANSFORMER, "transformer_2", "vae")
# What the U-Net and the transformer are called before it is known which of both it is.
DENOISER = "diffusion_model"
# Components that nobody means without saying so, for the net may as well be the first of its kind.
NUMBERED = ("text_encoder_2", "text_encoder_3", "transformer_2")
# Each component by the parts of a path that stand before its layers, longest first: in pipelines of diffusers, in
# Stable Diffusion's own files (1, XL) and in ComfyUI's.
SPELLINGS = {tuple(spelling.split(".")): component for spelling, component in {
    "conditioner.embedders.0.transformer": TEXT_ENCODER, "conditioner.embedders.1.model": "text_encoder_2",
    "text_encoders.clip_l.transformer": TEXT_ENCODER, "text_encoders.clip_g.transformer": "text_encoder_2",
    "cond_stage_model.transformer": TEXT_ENCODER, "cond_stage_model": TEXT_ENCODER,
    "clip_l": TEXT_ENCODER, "clip_g": "text_encoder_2", "first_stage_model": "vae",
    "model.diffusion_model": DENOISER, "diffusion_model": DENOISER,
    **{component: component for component in COMPONENTS}}.items()}
# What ComfyUI's text encoders stand below.
ENCODERS = "text_encoders"
# Text encoders that are nets of their own, too.
_ALONE = {"a language model"}
# What the layers of transformers of diffusion are in, be they known networks or not.
_BLOCKS = ("transformer_blocks", "single_transformer_blocks", "double_blocks", "single_blocks", "joint_blocks")


def component_of(paths: Iterable[str]) -> str:
    """Return which component a net is by the paths of its layers: unet, transformer, text_encoder, or empty.

    Which of several text encoders or transformers it is, the paths do not say.
    """
    networks: set[str] = set()
    found = ""
    for path in paths:
        first = path.partition(".")[0]
        found = TRANSFORMER if first in _BLOCKS else found or (TEXT_ENCODER if first == "text_model" else "")
        # Names without a number (`proj_out`) are those of many nets.
        networks |= networks_of(path) if any(part.isdecimal() for part in path.split(".")) else set()
    if networks & UNETS:
        return UNET
    return TRANSFORMER if networks - TEXT_ENCODERS else found or (TEXT_ENCODER if networks - _ALONE else "")


def denoiser_of(paths: Iterable[str]) -> str:
    """Return what the U-Net or transformer that has these layers is, `DENOISER` where they do not tell."""
    found = component_of(paths)
    return found if found in (UNET, TRANSFORMER) else DENOISER


def alike(one: str, other: str) -> bool:
    """Tell whether two names may mean one component."""
    return one == other or DENOISER in (one, other) and {one, other} <= {UNET, TRANSFORMER, DENOISER}


def split(paths: Iterable[str], component: str = "") -> dict[str, tuple[str, str]]:
    """Return by path its component and the path below it.

    Args:
        paths: of an adapter.
        component: that it is of; empty where the paths say it, or nothing does: then it is the U-Net.

    Raises:
        ValueError: nothing says which component it is, and by the names of its layers it is not the U-Net.
    """
    paths = list(paths)
    unknown = unknown_encoders(paths)
    if unknown and component not in COMPONENTS:
        raise ValueError("\n  ".join(unknown))
    said = "" if component == DENOISER else component
    if component or not in_paths(paths):
        kind = said or component_of(paths) or UNET
        if not component and kind != UNET:
            names = [name for name in COMPONENTS if name.startswith(kind)]
            raise ValueError(f"the layers are those of a {kind}, and the file must say of which component: give "
                             f"component={names[0]!r} (--component {names[0]}), or {' or '.join(names[1:])}.")
        return {path: (kind, path) for path in paths}
    return {path: path.split(".", 1) for path in paths}  # type: ignore[misc]


def unknown_encoders(paths: Iterable[str]) -> list[str]:
    """Return a sentence for each of ComfyUI's text encoders of which the name does not tell its place in a pipeline.

    T5 is the second text encoder of FLUX and the third of Stable Diffusion 3.
    """
    heads = dict.fromkeys(".".join(path.split(".")[:2]) for path in paths if path.startswith(f"{ENCODERS}."))
    known = {".".join(spelling[:2]) for spelling in SPELLINGS}
    return [f"{head} is a text encoder whose place in its pipeline is not known: begin its names with text_encoder, "
            f"text_encoder_2 or text_encoder_3 instead." for head in heads if head not in known]


def in_paths(paths: Iterable[str]) -> bool:
    """Tell whether a component stands before each path."""
    return all(below and first in COMPONENTS for first, _, below in (path.partition(".") for path in paths))


def join(component: str, path: str, components: Iterable[str], keep: bool = False) -> str:
    """Return the path in an `AdapterState` of a file with these `components`; `keep` names one that is alone, too."""
    return path if not keep and len(set(components)) == 1 else f"{component}.{path}"
