"""What a file holds for a layer beside what the net or the file's own settings say it must hold."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

from mindpet_lite.formats.state import LayerState


def shape_problems(path: str, layer: LayerState, shapes: Mapping[str, Iterable[int]]) -> list[str]:
    """Return, a sentence each, which tensors of a layer's file are missing or have another shape.

    Args:
        path: of the layer in the net.
        layer: as it stands in the file.
        shapes: that its delta has, by the names of `Delta.delta_parameters`; of a new delta those that
            `DeltaConfig.shapes` tells from the settings before anything is made.
    """
    held = {name: value.shape for name, value in layer.tensors.items()}
    return [f"missing: {path}.{name}." for name in shapes if name not in held] + [
        f"misshapen: {path}.{name} is {tuple(shape)} in the net, {held[name]} in the file."
        for name, shape in shapes.items() if name in held and tuple(shape) != held[name]]
