"""One LoRA adapter made of several: PEFT's ways of combining, on numbers."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mindpet_lite.arguments import check_int, did_you_mean
from mindpet_lite.formats.files import as_float
from mindpet_lite.formats.lora import EMBEDDING_A, EMBEDDING_B, A, B
from mindpet_lite.formats.state import AdapterState, LayerState

_PLAIN = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
WAYS = ("cat", "svd", *_PLAIN, *(f"{way}_svd" for way in _PLAIN[1:]))
SIGNS = ("total", "frequency")


def combine(states: Mapping[str, AdapterState], weights: Sequence[float], how: str, rank: int | None = None,
            density: float | None = None, majority_sign: str = "total", seed: int = 0) -> AdapterState:
    r"""Return an adapter that is a combination of several, of scale 1 (alpha = rank).

    With T_k the update s_k B_k A_k of an adapter, and w_k its weight:

    - cat: Σ w_k T_k exactly, the factors one below the other; the rank is the sum of the ranks.
    - svd: the nearest of `rank` to Σ w_k T_k.
    - linear: B and A are Σ √|w_k s_k| B_k and Σ ±√|w_k s_k| A_k each, which is not Σ w_k T_k; all of one rank.
    - magnitude_prune: as linear, of each factor only the share `density` of its largest numbers.
    - ties (Yadav et al., 2023, https://arxiv.org/abs/2306.01708): pruned likewise; where signs differ only the numbers
      of the stronger sign count, and their mean.
    - dare_linear, dare_ties (Yu et al., 2023, https://arxiv.org/abs/2311.03099): pruned at random instead, and
      divided by `density`.
    - each of these with _svd: on the updates T_k instead of the factors, and then as svd.

    Args:
        states: the adapters by name, under the same paths.
        weights: a number for each.
        how: one of `WAYS`.
        rank: of the result, for svd; the highest of the adapters' without it.
        density: in (0, 1], for what is pruned.
        majority_sign: what makes a sign the stronger: the "total" of the numbers, or their "frequency".
        seed: of dare's random numbers; 0 or more.

    Raises:
        ValueError: an argument is none of these; an adapter is not plain LoRA; ranks or shapes differ.
    """
    _check(states, weights, how, rank, density, majority_sign)
    check_int("seed", seed, 0)
    rng = np.random.default_rng(seed)
    by_path: dict[str, list[tuple[LayerState, float]]] = {}
    for state, weight in zip(states.values(), weights):
        for path, layer in state.layers.items():
            by_path.setdefault(path, []).append((layer, weight))
    highest = rank or max(int(layer.settings["lora_rank"]) for parts in by_path.values() for layer, _ in parts
                          if layer.settings)
    prune = _pruning(how, density, rng)
    layers = {}
    for path, parts in by_path.items():
        try:
            layers[path] = _layer(parts, how, highest, prune, majority_sign)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return AdapterState("lora", layers)


def _check(states: Mapping[str, AdapterState], weights: Sequence[float], how: str, rank: int | None,
           density: float | None, majority_sign: str) -> None:
    if how not in WAYS:
        raise ValueError(f"how must be one of {', '.join(WAYS)}, but got {how!r:.60}.{did_you_mean(how, WAYS)}")
    if len(weights) != len(states) or not states:
        raise ValueError(f"{len(states)} adapters need as many weights, but got {len(weights)}.")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"a weight must be a finite number, but got {weight!r:.60}.")
    prunes = how not in ("cat", "svd", "linear")
    if prunes and (density is None or not 0 < density <= 1):
        raise ValueError(f"{how!r} prunes: density must be above 0 and at most 1, but got {density!r:.60}.")
    if not prunes and density is not None:
        raise ValueError(f"{how!r} prunes nothing: leave density out.")
    if rank is not None and (not how.endswith("svd") or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank is for svd and at least 1, but got {rank!r:.60} for {how!r}.")
    if majority_sign not in SIGNS:
        raise ValueError(f"majority_sign must be one of {', '.join(SIGNS)}, but got {majority_sign!r:.60}.")
    for name, state in states.items():
        unfit = sorted({key for layer in state.layers.values() for key in layer.tensors} -
                       {A, B, EMBEDDING_A, EMBEDDING_B})
        unknown = [path for path, layer in state.layers.items() if layer.settings is None]
        if state.method != "lora" or unfit or state.trained or unknown:
            reason = f"is of the method {state.method!r}" if state.method != "lora" else \
                f"holds {', '.join(unfit)}" if unfit else \
                f"has trained parameters of the base, such as {next(iter(state.trained))}" if state.trained else \
                f"does not say rank and alpha of {unknown[0]}"
            raise ValueError(f"the adapter {name!r} {reason}: only plain LoRA can be combined.")


def _layer(parts: Sequence[tuple[LayerState, float]], how: str, rank: int, prune: Callable[[np.ndarray], np.ndarray],
           majority_sign: str) -> LayerState:
    """Return the combination of the adapters of one layer."""
    first = parts[0][0].tensors
    names = (EMBEDDING_A, EMBEDDING_B) if EMBEDDING_A in first else (A, B)
    pairs = [[as_float(layer.tensors[name]).astype(np.float32) for name in names] for layer, _ in parts]
    numbers = [np.float32(weight * _scale(layer)) for layer, weight in parts]
    shapes = {(a.shape[1:], b.shape[:1] + b.shape[2:]) for a, b in pairs}
    if len(shapes) > 1:
        raise ValueError(f"the adapters have other shapes there: {', '.join(map(str, sorted(shapes)))}.")
    if how == "cat":
        a = np.concatenate([number * a for number, (a, _) in zip(numbers, pairs)])
        b = np.concatenate([b for _, b in pairs], axis=1)
    elif how.endswith("svd"):
        a, b = _by_svd(parts, pairs, how, rank, prune, majority_sign)
    else:
        if len({a.shape for a, _ in pairs}) > 1:
            raise ValueError(f"{how!r} needs adapters of one rank, but theirs are "
                             f"{', '.join(str(len(a)) for a, _ in pairs)}: take cat or svd.")
        roots = [np.sqrt(np.abs(number)) for number in numbers]
        signed = [root * np.sign(number) if number else root for root, number in zip(roots, numbers)]
        a = _mixed([a for a, _ in pairs], signed, how, prune, majority_sign)
        b = _mixed([b for _, b in pairs], roots, how, prune, majority_sign)
    settings: dict[str, Any] = {**(parts[0][0].settings or {}), "lora_rank": len(a), "lora_alpha": len(a)}
    settings.pop("use_rslora", None)
    kept = {name: value for name, value in settings.items() if name in ("lora_rank", "lora_alpha", "lora_dropout")}
    return LayerState({names[0]: np.ascontiguousarray(a), names[1]: np.ascontiguousarray(b)}, kept, "lora")


def _by_svd(parts: Sequence[tuple[LayerState, float]], pairs: Sequence[Sequence[np.ndarray]], how: str, rank: int,
            prune: Callable[[np.ndarray], np.ndarray], majority_sign: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of `rank` nearest to a combination of the updates."""
    a_shape, b_shape = pairs[0][0].shape[1:], pairs[0][1].shape
    if any(b.shape[1] != len(a) for a, b in pairs):
        raise ValueError("the update of a convolution with groups is no matrix: take cat or linear.")
    # The scale is in the updates that are pruned and whose signs are elected, the weight is not.
    updates = [np.float32(_scale(layer)) * (b.reshape(len(b), -1) @ a.reshape(len(a), -1))
               for (layer, _), (a, b) in zip(parts, pairs)]
    whole = _mixed(updates, [weight for _, weight in parts], how, prune, majority_sign)
    u, s, vt = np.linalg.svd(whole.astype(np.float64), full_matrices=False)
    count = min(rank, len(s))
    a, b = np.zeros((rank, vt.shape[1]), np.float32), np.zeros((len(u), rank), np.float32)
    a[:count], b[:, :count] = vt[:count], u[:, :count] * s[:count]
    return a.reshape(rank, *a_shape), b.reshape(b_shape[0], rank, *b_shape[2:])


def _mixed(tensors: Sequence[np.ndarray], numbers: Sequence[Any], how: str,
           prune: Callable[[np.ndarray], np.ndarray], majority_sign: str) -> np.ndarray:
    """Return a weighted sum of tensors, or where signs are elected the mean of those that count."""
    pruned = np.stack([prune(tensor) for tensor in tensors])
    weighted = pruned * np.array(numbers, np.float32).reshape(-1, *[1] * (pruned.ndim - 1))
    if "ties" not in how:
        return weighted.sum(0)
    sign = np.sign(pruned)
    strength = pruned.sum(0) if majority_sign == "total" else sign.sum(0)
    counts = sign == np.where(strength >= 0, 1, -1)
    return (weighted * counts).sum(0) / np.maximum(counts.sum(0), 1)


def _pruning(how: str, density: float | None, rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """Return what keeps a share of a tensor's numbers: the largest, or random ones that are scaled up."""
    if density is None or density == 1:
        return lambda tensor: tensor
    share = density

    def largest(tensor: np.ndarray) -> np.ndarray:
        kept = np.zeros(tensor.size, bool)
        kept[np.argsort(-np.abs(tensor.reshape(-1)), kind="stable")[:int(share * tensor.size)]] = True
        return np.where(kept.reshape(tensor.shape), tensor, np.float32(0))

    def random(tensor: np.ndarray) -> np.ndarray:
        return np.where(rng.random(tensor.shape) < share, tensor / np.float32(share), np.float32(0))

    return random if how.startswith("dare") else largest


def _scale(layer: LayerState) -> float:
    settings = layer.settings or {}
    rank = settings["lora_rank"]
    return float(settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank))
