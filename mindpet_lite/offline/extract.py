"""A LoRA adapter from the difference of two models: the nearest one of a rank, and the error it leaves."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mindpet_lite.arguments import check_int
from mindpet_lite.formats import peft
from mindpet_lite.formats.adapters import to_files, write_files
from mindpet_lite.formats.base_hash import FIELD
from mindpet_lite.formats.folder import refuse_filled
from mindpet_lite.formats.lora import EMBEDDING_A, EMBEDDING_B, A, B
from mindpet_lite.formats.problems import listed
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.names.parameter_names import is_lookup
from mindpet_lite.offline.base import WEIGHTS, Base, open_base
from mindpet_lite.offline.numbers import FLOATS, widened
from mindpet_lite.offline.orientation import has_inputs_first, inputs_first
from mindpet_lite.offline.progress import Progress

# Above this size a decomposition is approximated by random projections.
_LARGE = 512
_OVERSAMPLING, _ITERATIONS = 16, 4
_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Extracted:
    """What was found between two models.

    Args:
        state: the adapter.
        errors: what is left of each layer's difference, as a part of it.
        error: what is left of all these layers' differences together.
        trained: parameters that changed and are in the adapter as they are.
        left_out: tensors that changed and have no place in an adapter.
    """

    state: AdapterState
    errors: dict[str, float]
    error: float
    trained: tuple[str, ...]
    left_out: tuple[str, ...]


def extract(base: Path, tuned: Path, rank: int, out: Path | None = None, seed: int = 0,
            quiet: bool = False) -> Extracted:
    """Return the LoRA adapter that comes nearest to what tuning changed, and write it as PEFT does.

    Each weight's difference D is cut to its largest singular values (Eckart and Young, 1936): B A = U_r S_r V_rᵀ, with
    √S in both factors and alpha = rank, so that the scale is 1. Large matrices are decomposed by random projection
    (Halko, Martinsson and Tropp, 2011, https://arxiv.org/abs/0909.4061, algorithm 4.4 with 4 iterations), which comes
    within a few percent of the least error. Convolutions are taken as matrices (out, in · kernel). Biases and norms
    that changed are in the adapter as they are; layers that did not change are left out.

    Args:
        base: a file or directory, as `merge` takes it.
        tuned: the same net after tuning.
        rank: at most so many singular values for each layer; positive.
        out: directory for the adapter, empty or not there yet; None to write nothing. Default: None.
        seed: of the random projections; 0 or more. Default: 0.
        quiet: show no progress. Default: False.

    Raises:
        OSError: a model cannot be read, or `out` cannot be written.
        ValueError: the models are not of one net, are quantised, hold values that are not finite, or are the same; or
            the rank is not positive.

    Examples:
        >>> from pathlib import Path
        >>> import mindpet_lite as mp
        >>> import mindspore as ms
        >>> from mindspore import nn
        >>> from mindpet_lite.offline.extract import extract
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> _ = ms.save_checkpoint(net, "base.ckpt")
        >>> _ = net[0].weight.set_data(net[0].weight + 1)         # as if it had been tuned
        >>> _ = ms.save_checkpoint(net, "tuned.ckpt")
        >>> found = extract(Path("base.ckpt"), Path("tuned.ckpt"), rank=1, out=Path("adapter"), quiet=True)
        >>> list(found.errors), found.error < 1e-5
        (['0'], True)
    """
    if rank < 1:
        raise ValueError(f"the rank must be a positive number, but got {rank}.")
    check_int("seed", seed, 0)
    if out is not None:
        refuse_filled(out)
    with open_base(base) as one, open_base(tuned) as other:
        _check_same_net(one, other, base, tuned)
        found = _extract(one, other, rank, seed, quiet)
    if not found.state.layers:
        raise ValueError(f"{tuned} has no layer whose weight differs from {base}"
                         f"{f', only {found.left_out[0]} and the like' if found.left_out else ''}: there is nothing to "
                         f"extract.")
    if out is not None:
        write_files(to_files(found.state, "peft", out))
    return found


def _extract(base: Base, tuned: Base, rank: int, seed: int, quiet: bool) -> Extracted:
    config = base.config
    rng = np.random.default_rng(seed)
    layers: dict[str, LayerState] = {}
    squares: dict[str, tuple[float, float]] = {}
    trained: dict[str, np.ndarray] = {}
    left_out = []
    total = sum(math.prod(base.shape(name)) * base.dtype(name).itemsize for name in base.names())
    with Progress("extract", total, quiet) as progress:
        for name, difference in _differences(base, tuned, progress):
            path, _, last = name.rpartition(".")
            if last not in WEIGHTS or difference.ndim < 2 or not path:
                if path and base.dtype(name) in FLOATS:
                    trained[name] = tuned.read(name)
                else:
                    left_out.append(name)
                continue
            is_table = difference.ndim == 2 and (last == "embedding_table" or is_lookup(path))
            turned = is_table or bool(inputs_first(path, config))
            layers[path], squares[path] = _layer(difference, rank, rng, is_table, turned)
    trained.update(_siblings(trained, layers, tuned))
    whole = sum(square for square, _ in squares.values())
    left = sum(rest for _, rest in squares.values())
    hashes = {path: base.layer_hash(path) for path in layers}
    state = AdapterState("lora", layers, trained, {FIELD: hashes})
    if has_inputs_first(config):
        state = _with_flag(state)
    return Extracted(state, {path: math.sqrt(rest / square) for path, (square, rest) in squares.items()},
                     math.sqrt(left / whole) if whole else 0.0, tuple(trained), tuple(left_out))


def table(found: Extracted) -> str:
    """Return what was extracted as text for people."""
    width = max(map(len, found.errors))
    ranks = {path: layer.settings["lora_rank"] for path, layer in found.state.layers.items() if layer.settings}
    lines = [f"{'layer'.ljust(width)}  rank  error left"]
    lines += [f"{path.ljust(width)}  {ranks[path]:>4}  {error:>10.3g}" for path, error in found.errors.items()]
    lines += [f"{'all'.ljust(width)}        {found.error:>10.3g}"]
    lines += [f"changed, and in the adapter as it is: {name}" for name in found.trained]
    lines += [f"changed, and not in the adapter: {name}" for name in found.left_out]
    return "\n".join(lines) + "\n"


def as_dict(found: Extracted) -> dict[str, Any]:
    """Return what was extracted as plain data that JSON can hold."""
    layers = [{"path": path, "rank": layer.settings["lora_rank"], "error": found.errors[path]}
              for path, layer in found.state.layers.items() if layer.settings]
    return {"error": found.error, "layers": layers, "trained": list(found.trained), "left_out": list(found.left_out)}


def _check_same_net(base: Base, tuned: Base, first: Path, second: Path) -> None:
    ours, theirs = set(base.names()), set(tuned.names())
    problems = [f"{name} is in {first} only." for name in sorted(ours - theirs)]
    problems += [f"{name} is in {second} only." for name in sorted(theirs - ours)]
    problems += [f"{name} has the shape {base.shape(name)} in {first}, {tuned.shape(name)} in {second}."
                 for name in sorted(ours & theirs) if base.shape(name) != tuned.shape(name)]
    problems += [f"{name} is quantised, or no number with a fraction, in one of them."
                 for name in sorted(ours & theirs) if (base.dtype(name) in FLOATS) != (tuned.dtype(name) in FLOATS)]
    if problems:
        raise ValueError(f"{first} and {second} are not of one net:\n  " + listed(problems))


def _differences(base: Base, tuned: Base, progress: Progress) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what tuning added to each tensor that it changed."""
    for name in base.names():
        one, other = base.read(name), tuned.read(name)
        if one.dtype != other.dtype or one.tobytes() != other.tobytes():
            difference = widened(other) - widened(one) if one.dtype in FLOATS else np.ones(one.shape, np.float32)
            if not np.isfinite(difference).all():
                raise ValueError(f"{name} holds NaN or infinite values, or differs by more than float32 can hold.")
            # The same numbers may be stored in two types, and zero has two signs.
            if difference.any():
                yield name, difference
        progress.advance(one.nbytes)


def _layer(difference: np.ndarray, rank: int, rng: np.random.Generator, is_table: bool,
           turned: bool) -> tuple[LayerState, tuple[float, float]]:
    """Return the delta of a layer, the square of its difference's norm, and what the delta leaves of it."""
    matrix = difference.reshape(len(difference), -1)
    matrix = np.ascontiguousarray(matrix.T) if turned else matrix
    rank = min(rank, *matrix.shape)
    # Away from what float32 cannot square.
    largest = float(np.abs(matrix).max())
    b, a = _factors(matrix / largest, rank, rng)
    a, b = (part * np.sqrt(largest) for part in (a, b))
    a, b = a.astype(np.float32), b.astype(np.float32)
    square = rest = 0.0
    for begin in range(0, len(matrix), _ROWS):
        rows = matrix[begin:begin + _ROWS].astype(np.float64)
        square += float(np.square(rows).sum())
        rest += float(np.square(rows - b[begin:begin + _ROWS].astype(np.float64) @ a).sum())
    settings = {"lora_rank": rank, "lora_alpha": rank, **({} if is_table else {"lora_dropout": 0.0})}
    if is_table:
        return LayerState({EMBEDDING_A: a, EMBEDDING_B: b}, settings), (square, rest)
    kernel = () if turned else difference.shape[1:]
    return LayerState({A: a.reshape(rank, *kernel) if kernel else a,
                       B: b.reshape(*b.shape, *[1] * (len(kernel) - 1))}, settings), (square, rest)


def _factors(matrix: np.ndarray, rank: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return B (out, rank) and A (rank, in) whose product comes nearest to a matrix."""
    size = rank + _OVERSAMPLING
    if min(matrix.shape) <= max(_LARGE, 2 * size):
        u, sizes, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    else:
        basis = np.linalg.qr(matrix @ rng.standard_normal((matrix.shape[1], size), np.float32))[0]
        for _ in range(_ITERATIONS):
            basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
        u, sizes, v = np.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    root = np.sqrt(sizes[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]


def _siblings(trained: dict[str, np.ndarray], layers: dict[str, LayerState], tuned: Base) -> dict[str, np.ndarray]:
    """Return what belongs to the same modules: PEFT saves a module other than a bias whole."""
    owners = {name.rpartition(".")[0] for name in trained if name.rpartition(".")[2] not in ("bias", "beta")}
    return {name: tuned.read(name) for owner in sorted(owners - layers.keys())
            for name in tuned.owners[owner].values() if name not in trained}


def _with_flag(state: AdapterState) -> AdapterState:
    """Return the adapter with a whole config of PEFT's that says that its layers are transposed."""
    return dataclasses.replace(state, config={**peft.encode(state)[1], "fan_in_fan_out": True})
