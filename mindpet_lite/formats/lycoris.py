"""LoHa and LoKr in LyCORIS' files, whose shapes and alphas say what PEFT's config says.

LyCORIS: Yeh et al., 2024, https://arxiv.org/abs/2309.14859. What stands before the parts is for each format to read.
"""
from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mindpet_lite.formats.decomposed import factors_of, first_shapes, second_shapes
from mindpet_lite.formats.extras import scaled
from mindpet_lite.formats.files import as_float, type_name
from mindpet_lite.formats.lora import read_alpha
from mindpet_lite.formats.state import LayerState

# What stands behind a layer's name in LyCORIS' files, by the method.
_LOHA = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
_LOKR = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
PARTS = {**{f"hada_{name}": "loha" for name in _LOHA}, **{f"lokr_{name}": "lokr" for name in _LOKR}}
TITLES = {"loha": "LoHa", "lokr": "LoKr"}
# Besides those of the method; and what is read there but refused.
_ALPHA, _SCALAR, _DORA = "alpha", "scalar", "dora_scale"
BESIDE = (_ALPHA, _SCALAR, _DORA)
_PLAIN: dict[str, Any] = {"rank_dropout": 0.0, "module_dropout": 0.0}
# How many places a kernel may have where the shapes do not tell: those of 1 to 7 in one axis, two and three axes.
_PLACES = (1, *sorted({length ** axes for length in range(2, 8) for axes in (1, 2, 3)}))
# So many ways to cut are looked at, for a file may say anything.
_MOST_FACTORS = 512


def is_of_lycoris(parts: Iterable[str]) -> bool:
    """Tell whether a layer with these parts is of LoHa or LoKr."""
    return any(part in PARTS for part in parts)


def own_alphas(parts: Mapping[str, Mapping[str, np.ndarray]], layers: Mapping[str, LayerState],
               is_given: bool) -> dict[str, float]:
    """Return the alpha of each layer that has one in the file (`is_given`), or of each that has none.

    LoKr's layers with both factors whole have no use for one.
    """
    return {path: layer.settings["alpha"] for path, layer in layers.items()
            if path in parts and not {"lokr_w1", "lokr_w2"} <= parts[path].keys() and layer.settings
            and (_ALPHA in parts[path]) == is_given}


def read_layers(parts: Mapping[str, Mapping[str, np.ndarray]], problems: list[str]) -> dict[str, LayerState]:
    """Return the layers of LoHa and LoKr in a file of LyCORIS, with their methods.

    The scale is alpha / rank; without an alpha or with 0 it is 1, as it is where both factors of LoKr are whole.

    Args:
        parts: by path, and by what stands behind it in the file.
        problems: gets a sentence for each that cannot be read.
    """
    found: dict[str, LayerState] = {}
    cuts: dict[str, Cut] = {}
    for path, own in parts.items():
        try:
            method, tensors = _of_one_method(path, own)
            if method == "loha":
                found[path] = LayerState(tensors, _loha_settings(path, own), method)
            else:
                cuts[path] = _cut_of(path, own)
                found[path] = LayerState(tensors, None, method)
        except ValueError as error:
            problems.append(str(error))
    for path, fields in _lokr_fields(cuts, problems).items():
        alpha = fields["r"] if cuts[path].rank is None else _alpha(path, parts[path], fields["r"])
        if _SCALAR in parts[path]:
            alpha = scaled(path, alpha, parts[path][_SCALAR])
        found[path] = dataclasses.replace(found[path], settings={**fields, "alpha": alpha, **_PLAIN,
                                                                 "rank_dropout_scale": False})
    return _with_one_kind_of_kernel({path: layer for path, layer in found.items() if layer.settings is not None})


def of_methods(layers: Mapping[str, LayerState]) -> tuple[str, dict[str, LayerState]]:
    """Return the method of an adapter of these layers, and the layers, which say theirs where there are several."""
    methods = sorted({layer.method or "lora" for layer in layers.values()}) or ["lora"]
    return "+".join(methods), {path: dataclasses.replace(layer, method=(layer.method or "lora") if len(methods) > 1
                                                         else "") for path, layer in layers.items()}


def _of_one_method(path: str, own: Mapping[str, np.ndarray]) -> tuple[str, dict[str, np.ndarray]]:
    """Return the method of a layer, and its tensors by our names.

    Raises:
        ValueError: it has parts of several methods, or one that cannot be read.
    """
    methods = sorted({PARTS[part] for part in own if part in PARTS})
    other = [part for part in own if part not in PARTS and part not in BESIDE]
    if len(methods) > 1 or other:
        raise ValueError(f"{path} has parts of several methods: {', '.join(own)}.")
    (method,) = methods
    if _DORA in own:
        raise ValueError(f"{path}: dora_scale beside {TITLES[method]} (weight_decompose) cannot be read here: the "
                         f"weight itself would be scaled.")
    tensors = {part: value for part, value in own.items() if part in PARTS}
    wrong = [part for part, value in tensors.items() if as_float(value).dtype.kind != "f" or value.ndim < 2]
    if wrong:
        raise ValueError(f"{path}.{wrong[0]} of type {type_name(tensors[wrong[0]].dtype)} and shape "
                         f"{tensors[wrong[0]].shape} is no factor: expected floats with two axes or more.")
    # PEFT gives the tensor of a kernel with one axis a second one.
    return method, {f"mindpet_delta_{method}_{part.partition('_')[2]}":
                    value[..., None] if value.ndim == 3 and part.rpartition("_")[2] in ("t1", "t2") else value
                    for part, value in tensors.items()}


def _alpha(path: str, own: Mapping[str, np.ndarray], rank: int) -> float:
    return read_alpha(path, own[_ALPHA], rank) if _ALPHA in own else rank


def _loha_settings(path: str, own: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the settings of a layer of LoHa.

    Raises:
        ValueError: a part is missing, or they do not belong together.
    """
    missing = [f"hada_{name}" for name in _LOHA[:4] if f"hada_{name}" not in own]
    has_core = "hada_t1" in own or "hada_t2" in own
    missing += [f"hada_{name}" for name in _LOHA[4:] if has_core and f"hada_{name}" not in own]
    if missing:
        raise ValueError(f"{path} lacks {' and '.join(missing)}.")
    shapes = {name: own[f"hada_{name}"].shape for name in _LOHA if f"hada_{name}" in own}
    rank = shapes["w1_b"][0]
    outputs = shapes["w1_a"][1 if has_core else 0]
    a = (rank, outputs) if has_core else (outputs, rank)
    wanted: dict[str, tuple[int, ...]] = {
        "w1_a": a, "w2_a": a, "w1_b": (rank, shapes["w1_b"][1]), "w2_b": (rank, shapes["w1_b"][1])}
    if has_core:
        wanted |= {name: (rank, rank, *shapes["t1"][2:]) for name in ("t1", "t2")}
    if wanted != shapes:
        raise ValueError(f"{path}: its parts of shapes {_listed(shapes)} do not belong together.")
    alpha = _alpha(path, own, rank)
    if _SCALAR in own:
        alpha = scaled(path, alpha, own[_SCALAR])
    return {"r": rank, "alpha": alpha, **_PLAIN, "use_effective_conv2d": has_core}


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _with_one_kind_of_kernel(layers: Mapping[str, LayerState]) -> dict[str, LayerState]:
    """Return the layers with `use_effective_conv2d` for all of a method where one of them has it.

    It changes nothing for the others, and PEFT's config has one for all.
    """
    effective = {layer.method for layer in layers.values() if (layer.settings or {})["use_effective_conv2d"]}
    return {path: dataclasses.replace(layer, settings={**(layer.settings or {}),
                                                       "use_effective_conv2d": layer.method in effective})
            for path, layer in layers.items()}


@dataclasses.dataclass(frozen=True)
class Cut:
    """What the shapes of a LoKr layer tell.

    Args:
        shapes: of its parts.
        first: rows and columns of the first factor.
        rows: of the second factor.
        columns: that the second factor may have, each with the kernel that it has then.
        core: the axes of the kernel in a tensor of its own.
        rank: None where both factors are whole.
    """

    shapes: Mapping[str, tuple[int, ...]]
    first: tuple[int, int]
    rows: int
    columns: Mapping[int, tuple[int, ...]]
    core: tuple[int, ...]
    rank: int | None

    def least_rank(self) -> int:
        """Return the rank from which on both factors are whole; both are then, whichever columns are meant."""
        return max(1, *(-(-max(*self.first, self.rows, columns) // 2) for columns in self.columns))

    def fits(self, factor: int, is_split: bool, rank: int) -> bool:
        """Tell whether PEFT's settings give these shapes."""
        return factors_of(self.first[0] * self.rows, factor) == (self.first[0], self.rows) and any(
            factors_of(self.first[1] * columns, factor) == (self.first[1], columns) and self.shapes == {
                **first_shapes(*self.first, rank, is_split),
                **second_shapes(self.rows, columns, rank, kernel, self.core)} for columns, kernel in
            self.columns.items())


def _cut_of(path: str, own: Mapping[str, np.ndarray]) -> Cut:
    """Return what a layer's shapes tell.

    Raises:
        ValueError: a part is missing, or they do not belong together.
    """
    shapes = {name: own[f"lokr_{name}"].shape for name in _LOKR if f"lokr_{name}" in own}
    core: tuple[int, ...] = shapes["t2"][2:] if "t2" in shapes else ()
    halves = [[name for name in shapes if name.startswith("w1")], [name for name in shapes if name[1] == "2"]]
    if halves[0] not in (["w1"], ["w1_a", "w1_b"]) or halves[1] not in (["w2"], ["w2_a", "w2_b"],
                                                                       ["w2_a", "w2_b", "t2"]):
        raise ValueError(f"{path} has {', '.join(f'lokr_{name}' for name in shapes)}: expected lokr_w1, or lokr_w1_a "
                         f"and lokr_w1_b; and lokr_w2, or lokr_w2_a and lokr_w2_b, with or without lokr_t2.")
    is_whole = {number: f"w{number}" in shapes for number in (1, 2)}
    ranks = set() if is_whole[1] else {shapes["w1_a"][1], shapes["w1_b"][0]}
    ranks |= set() if is_whole[2] else {shapes["w2_a"][0 if core else 1], shapes["w2_b"][0], *shapes.get("t2", ())[:2]}
    flat = [name for name, shape in shapes.items() if len(shape) != 2 and name not in ("w2", "t2")]
    if len(ranks) > 1 or flat:
        raise ValueError(f"{path}: its parts of shapes {_listed(shapes)} do not belong together.")
    first = shapes["w1"] if is_whole[1] else (shapes["w1_a"][0], shapes["w1_b"][1])
    if is_whole[2]:
        rows, columns = shapes["w2"][0], {shapes["w2"][1]: shapes["w2"][2:]}
    elif core:
        rows, columns = shapes["w2_a"][1], {shapes["w2_b"][1]: ()}
    else:
        width = shapes["w2_b"][1]
        rows, columns = shapes["w2_a"][0], {width // places: (places,) for places in _PLACES if width % places == 0}
    return Cut(shapes, (first[0], first[1]), rows, columns, core, next(iter(ranks), None))


def _lokr_fields(cuts: Mapping[str, Cut], problems: list[str]) -> dict[str, dict[str, Any]]:
    """Return r, decompose_both, decompose_factor and use_effective_conv2d by path: the same for all where that goes."""
    if not cuts:
        return {}
    known = Counter(cut.rank for cut in cuts.values() if cut.rank is not None)
    common = known.most_common(1)[0][0] if known else 1
    for_whole = max([common, *(cut.least_rank() for cut in cuts.values() if cut.rank is None)])
    ranks = {path: for_whole if cut.rank is None else cut.rank for path, cut in cuts.items()}
    longest = max(max(cut.first) for cut in cuts.values())
    factors = [-1, *range(1, min(2 * longest + 2, _MOST_FACTORS)), longest]
    is_split = any("w1_a" in cut.shapes for cut in cuts.values())
    factor = next((item for item in factors if all(cut.fits(item, is_split, ranks[path])
                                                   for path, cut in cuts.items())), None)
    found = {}
    for path, cut in cuts.items():
        own = (factor, is_split) if factor is not None else next((
            (item, split) for split in (is_split, "w1_a" in cut.shapes) for item in (*factors, max(cut.first))
            if cut.fits(item, split, ranks[path])), None)
        if own is None:
            problems.append(f"{path}: its parts of shapes {_listed(cut.shapes)} are those of no LoKr with PEFT's "
                            f"settings (r, decompose_both, decompose_factor; LyCORIS' unbalanced_factorization has "
                            f"none there), which cannot be expressed.")
            continue
        found[path] = {"r": ranks[path], "decompose_both": own[1], "decompose_factor": own[0],
                       "use_effective_conv2d": bool(cut.core)}
    return found
