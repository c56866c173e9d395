"""What an adapter on the disk is."""
from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindpet_lite.formats import kohya
from mindpet_lite.formats.adapters import LORA, Adapter, Methods, read_adapter
from mindpet_lite.formats.base_hash import FIELD
from mindpet_lite.formats.files import as_float, open_tensors, type_name
from mindpet_lite.formats.lora import EMBEDDING_A, EMBEDDING_B, A, B
from mindpet_lite.formats.state import LayerState
from mindpet_lite.offline.plan import scale_of

_SIZES = ("B", "kB", "MB", "GB")
# Settings that have a column, or are told by the tensors.
_SHOWN = ("lora_rank", "lora_alpha", "token_indices")


def inspect(path: Path, kind: str | None = None, methods: Methods = LORA) -> dict[str, Any]:
    """Return what an adapter is, as plain data that JSON can hold.

    The norm of a layer is the Frobenius norm of its update s · B A, without computing it:
    ||B A||² = tr(BᵀB · A Aᵀ), a product of matrices of the size of the rank (Golub and Van Loan, Matrix Computations,
    section 2.3). It is None where there is no such update, or the file does not tell the scale. With DoRA it is that of
    the update before the sum is scaled to the magnitudes, which depends on the base.

    Args:
        path: a file or a directory.
        kind: its format; None to detect it. Default: None.
        methods: by name, see `adapters.read_adapter`. Default: LoRA alone.

    Raises:
        OSError: there is nothing to read.
        ValueError: it is no adapter, or damaged.

    Examples:
        >>> from pathlib import Path
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> from mindpet_lite.offline.inspect import inspect
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> _ = mp.save_adapter(net, "adapter")
        >>> report = inspect(Path("adapter"))
        >>> report["format"], report["method"], [layer["rank"] for layer in report["layers"]]
        ('peft', 'lora', [2])
    """
    found = _read(path, kind, methods)
    state = found.state
    layers = [_layer(place, layer) for place, layer in state.layers.items()]
    trained = [{"name": name, "shape": list(value.shape), "dtype": type_name(value.dtype), "parameters": value.size}
               for name, value in state.trained.items()]
    norms = [layer["norm"] for layer in layers if layer["norm"] is not None]
    return {
        "path": str(path), "format": found.kind, "method": state.method,
        "fingerprint": state.config.get(FIELD), "parameters": sum(item["parameters"] for item in [*layers, *trained]),
        "bytes": sum(file.stat().st_size for file in found.files), "files": [file.name for file in found.files],
        "norm": math.sqrt(sum(norm ** 2 for norm in norms)) if norms else None,
        "layers": layers, "trained": trained, "remarks": list(found.remarks)}


def table(report: Mapping[str, Any]) -> str:
    """Return what `inspect` found as text for people."""
    layers = report["layers"]
    size = next(f"{report['bytes'] / 1000 ** power:.4g} {_SIZES[power]}" for power in reversed(range(4))
                if report["bytes"] >= 1000 ** power or not power)
    rows = [("layer", "rank", "alpha", "scale", "shapes", "type", "norm")]
    rows += [(layer["path"] or "(the net)", _number(layer["rank"]), _number(layer["alpha"]), _number(layer["scale"]),
              " ".join("x".join(map(str, shape)) or "1" for shape in layer["shapes"].values()),
              "/".join(layer["dtypes"]), _number(layer["norm"])) for layer in layers]
    lines = [f"{report['format']} adapter of method {report['method']}: {len(layers)} "
             f"layer{'s' if len(layers) != 1 else ''}, {report['parameters']:,} parameters, {size}"]
    if report["fingerprint"]:
        together = hashlib.sha256(json.dumps(report["fingerprint"], sort_keys=True).encode()).hexdigest()[:16]
        lines += [f"fingerprint of the base's adapted layers {together}"]
    shared = Counter(str(layer["settings"]) for layer in layers).most_common(1)
    lines += [f"settings {shared[0][0][1:-1]}"] if shared and shared[0][0] != "{}" else []
    lines += [f"note: {text}" for text in report["remarks"]]
    lines += ["", *_aligned(rows)]
    lines += [f"{layer['path']}: {str(layer['settings'])[1:-1] or 'no settings'}" for layer in layers
              if str(layer["settings"]) != shared[0][0]]
    lines += [f"{layer['path']} holds NaN or infinite values" for layer in layers if not layer["finite"]]
    lines += [f"trained beside the deltas: {item['name']} {'x'.join(map(str, item['shape']))} {item['dtype']}"
              for item in report["trained"]]
    lines += [f"norm of all updates {_number(report['norm'])}"] if report["norm"] is not None else []
    return "\n".join(lines) + "\n"


def _read(path: Path, kind: str | None, methods: Methods) -> Adapter:
    try:
        return read_adapter(path, kind, methods)
    except ValueError:
        # kohya's underscores may hide the paths: then the layers are shown by the file's own names for them.
        if path.suffix != ".safetensors":
            raise
        with open_tensors(path) as file:
            names = [below for name in file.keys() if (below := kohya.without_prefix(name))]
        return read_adapter(path, kind, methods, names)


def _layer(path: str, layer: LayerState) -> dict[str, Any]:
    settings = layer.settings or {}
    scale = scale_of(settings) if settings.get("lora_alpha") is not None and settings.get("lora_rank") else None
    rank = settings.get("lora_rank", _rank(layer.tensors))
    return {
        "path": path, "rank": rank, "alpha": settings.get("lora_alpha"), "scale": scale,
        "settings": {name: value for name, value in settings.items() if name not in _SHOWN and value},
        "shapes": {name: list(value.shape) for name, value in layer.tensors.items()},
        "dtypes": sorted({type_name(value.dtype) for value in layer.tensors.values()}),
        "parameters": sum(value.size for value in layer.tensors.values()),
        "finite": all(bool(np.isfinite(as_float(value)).all()) for value in layer.tensors.values()),
        "norm": None if scale is None else _norm(layer.tensors, scale)}


def _rank(tensors: Mapping[str, np.ndarray]) -> int | None:
    a = tensors.get(A, tensors.get(EMBEDDING_A))
    return None if a is None or not a.ndim else int(a.shape[0])


def _norm(tensors: Mapping[str, np.ndarray], scale: float) -> float | None:
    names = (A, B) if A in tensors else (EMBEDDING_A, EMBEDDING_B)
    if any(name not in tensors or tensors[name].ndim < 2 for name in names):
        return None
    a, b = (as_float(tensors[name]).astype(np.float64).reshape(tensors[name].shape[0], -1) for name in names)
    # A convolution with groups: each group of outputs has its share of the rank.
    if not b.shape[1] or a.shape[0] % b.shape[1]:
        return None
    groups = a.shape[0] // b.shape[1]
    a, b = a.reshape(groups, b.shape[1], -1), b.reshape(groups, -1, b.shape[1])
    squares = np.sum((b.transpose(0, 2, 1) @ b) * (a @ a.transpose(0, 2, 1)))
    return scale * math.sqrt(max(float(squares), 0.0)) if np.isfinite(squares) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:]))])
            for row in rows]
