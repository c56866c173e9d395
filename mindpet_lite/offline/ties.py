"""A weight that a net uses as its embedding and as its output layer: merged for one of them, it would change both."""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mindpet_lite.arguments import warn_user
from mindpet_lite.formats.files import as_float
from mindpet_lite.formats.lora import EMBEDDING_A, EMBEDDING_B, A, B
from mindpet_lite.formats.peft_config import tokens_are_of_table_alone
from mindpet_lite.formats.state import AdapterState, LayerState
from mindpet_lite.names.placing import map_names
from mindpet_lite.names.table import Table, renamed
from mindpet_lite.offline.base import WEIGHTS, Base
from mindpet_lite.offline.model_config import architectures, model_types, ties, vocabularies
from mindpet_lite.offline.numbers import FLOATS, rounded, widened

# Hugging Face's classes without an output layer over the vocabulary; most others have one.
_WITHOUT_OUTPUT = re.compile(
    r".*(For\w*(Classification|QuestionAnswering\w*|MultipleChoice|NextSentencePrediction|CTC)|EncoderModel|RewardModel"
    r"|TextModel\w*|(?<!LMHead)(?<!DoubleHeads)(?<!EncoderDecoder)(?<!MT)(?<!Chat)(?<!GLM)Model)")
# PEFT's tasks of such classes.
_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_SAMPLE = 4096
_CURE = ("merging would change both. Use the adapter unmerged, or untie the base first: write the output layer's "
         "weight into it under its own name, and set tie_word_embeddings to false in its config.json.")


@dataclasses.dataclass(frozen=True)
class _Part:
    """What an adapter has for a layer outside of a net's blocks, where embeddings and output layers are.

    Args:
        name: of the layer or the trained parameter in the adapter.
        weight: the base's name of the weight, None where it has none.
        shape: of the weight; None where neither the adapter nor the base tells.
        value: that trained whole; None for a delta.
        is_table: the adapter has it as an embedding.
    """

    name: str
    weight: str | None
    shape: tuple[int, ...] | None
    value: np.ndarray | None = None
    is_table: bool = False


def settle_ties(state: AdapterState, base: Base, table: Table | None = None) -> AdapterState:
    """Return the adapter without what it holds of an output layer that is the base's embedding with the same values.

    Whether a net uses one weight for both is told by the base's config (``tie_word_embeddings``); where that is silent,
    by whether its files hold an output layer with values of its own.

    Args:
        state: the adapter, under its own names.
        base: the base.
        table: names of layers, see `names.placing.map_names`.

    Raises:
        ValueError: the net uses one weight for both, and the adapter changes one of them.
    """
    parts = _parts(state, base, table)
    tables = _tables(base, parts)
    is_tied = _is_tied(base, tables, state.config)
    if not parts or is_tied is False:
        _refuse_shared_tables(parts, base)
        return state
    own = [part for part in parts if part.weight in tables or part.weight is None and _fits(part, parts, tables, base)]
    unchanged = [part for part in own if _is_as_in_base(part, tables, base)]
    changed = [part for part in own if part not in unchanged]
    if is_tied is None:
        # Nothing tells; an output layer that the base lacks, though, has nowhere else to be.
        _warn_of_unknown(changed, base)
        changed = [part for part in changed if part.weight is None and not _has_twin(part, own)]
    elif _are_one(changed, tables) or _tokens_of_both(changed, tables, state, base) or (
            state.config.get("ensure_weight_tying") and all(part.value is not None for part in changed)):
        changed = []
    if changed and is_tied is None:
        raise ValueError("\n  ".join(
            f"{part.name}: the base has no such layer. Say with a name map (--names) which of its layers that is. If "
            f"it is the output layer of a net that uses its embedding's weight for it, {_CURE}" for part in changed))
    if changed:
        weights = ", ".join(tables[:3]) or "its embedding"
        raise ValueError("\n  ".join(
            f"{part.name}: the net uses one weight for its embedding and its output layer ({weights}; "
            f"tie_word_embeddings), so that {_CURE}" for part in changed))
    dropped = {part.name for part in own if part.weight is None}
    return dataclasses.replace(state, trained={name: value for name, value in state.trained.items()
                                               if name not in dropped})


def _parts(state: AdapterState, base: Base, table: Table | None) -> list[_Part]:
    """Return what may be of an embedding or an output layer."""
    found = []
    for path, layer in state.layers.items():
        if not _in_block(path):
            weight = _weight(path, "weight", base, table, state.component)
            shape = _shape(layer) or (base.shape(weight) if weight else None)
            found.append(_Part(path, weight, shape, None, A not in layer.tensors))
    for name, value in state.trained.items():
        path, _, last = name.rpartition(".")
        if last in WEIGHTS and value.ndim == 2 and not _in_block(path):
            found.append(_Part(name, _weight(path, last, base, table, state.component), value.shape, value))
    return found


def _in_block(path: str) -> bool:
    """Tell whether a layer is in one of a net's numbered blocks."""
    return any(part.isdecimal() for part in path.split("."))


def _shape(layer: LayerState) -> tuple[int, ...] | None:
    """Return the shape of the weight that a delta is for, (out, in) or that of the table."""
    tensors = layer.tensors
    one, other = (tensors.get(B), tensors.get(A)) if A in tensors else (tensors.get(EMBEDDING_A),
                                                                        tensors.get(EMBEDDING_B))
    if one is None or other is None or one.ndim != 2 or other.ndim != 2:
        return None
    return (one.shape[0], other.shape[1]) if A in tensors else (one.shape[1], other.shape[0])


def _weight(path: str, last: str, base: Base, table: Table | None, component: str) -> str | None:
    """Return the base's name of a layer's weight, None where it lacks the layer or its weight."""
    try:
        # An entry of the table that is about another layer is none too many.
        place = renamed([path], table)[0].get(path) or map_names([path], base.owners, component=component)[path]
    except ValueError:
        return None
    return base.parameter(f"{place}.{last}")


def _tables(base: Base, parts: list[_Part]) -> list[str]:
    """Return the base's weights with a row for each token outside of its blocks, as embeddings and output layers have.

    Where the config names no vocabulary, what the adapter has as an embedding, or whole, tells how many rows these are;
    else an adapted layer whose shape another weight has, too.
    """
    weights = [name for name in base.names() if base.dtype(name) in FLOATS and len(base.shape(name)) == 2
               and not _in_block(name)]
    shapes = [base.shape(name) for name in weights]

    def of(sizes: set[int]) -> list[str]:
        return [name for name in weights if base.shape(name)[0] in sizes]

    sure = {part.shape[0] for part in parts if part.shape
            and (part.is_table or part.value is not None or part.weight is None)}
    return of(vocabularies(base.config)) or of(sure) or of({part.shape[0] for part in parts if part.shape
                                                            and shapes.count(part.shape) > 1})


def _is_tied(base: Base, tables: list[str], adapter: Mapping[str, Any]) -> bool | None:
    """Tell whether the net has one weight for its embedding and its output layer; None where nothing says."""
    config, kinds = base.config, architectures(base.config)
    if base.is_pipeline() or kinds and all(_WITHOUT_OUTPUT.fullmatch(kind) for kind in kinds) \
            and adapter.get("task_type") not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return False
    if not kinds and adapter.get("task_type") in _TASKS:
        return False
    said = ties(config)
    if said:
        return True in said
    has_own = any(not _same_sample(tables[0], other, base) for other in tables[1:])
    if has_own:
        return False
    return True if model_types(config) else None


def _same_sample(one: str, other: str, base: Base) -> bool:
    if base.shape(one) != base.shape(other):
        return False
    size = int(np.prod(base.shape(one)))
    places = np.unique(np.linspace(0, size - 1, min(_SAMPLE, size)).astype(np.int64))
    return np.array_equal(widened(base.sample(one, places)), widened(base.sample(other, places)))


def _fits(part: _Part, parts: list[_Part], tables: list[str], base: Base) -> bool:
    """Tell whether what the base lacks is another side of its embedding, by its shape or by a twin in the adapter."""
    return any(part.shape == base.shape(name) for name in tables) or _has_twin(part, parts)


def _has_twin(part: _Part, parts: list[_Part]) -> bool:
    """Tell whether the adapter holds the same values for a weight that the base has."""
    return part.value is not None and any(
        other.weight is not None and other.value is not None and np.array_equal(other.value, part.value)
        for other in parts)


def _is_as_in_base(part: _Part, tables: list[str], base: Base) -> bool:
    """Tell whether the values of a parameter are the base's: PEFT writes embeddings along that did not train."""
    name = part.weight or (tables[0] if tables else None)
    if part.value is None or name is None or part.shape != base.shape(name) \
            or not np.isfinite(as_float(part.value)).all():
        return False
    return np.array_equal(as_float(rounded(part.value, base.dtype(name))), as_float(base.read(name)))


def _are_one(changed: list[_Part], tables: list[str]) -> bool:
    """Tell whether all sides of a tied weight trained whole to the same values."""
    values = [part.value for part in changed if part.value is not None]
    return len(changed) == len(values) > 1 and set(tables) <= {part.weight for part in changed} and all(
        np.array_equal(value, values[0]) for value in values)


def _tokens_of_both(changed: list[_Part], tables: list[str], state: AdapterState, base: Base) -> bool:
    """Tell whether only tokens trained, and where the output layer has the trained rows too."""
    return (len(changed) == len(tables) == 1 and changed[0].name in state.layers
            and "token_indices" in (state.layers[changed[0].name].settings or {})
            and not tokens_are_of_table_alone(state.config)
            and not base.config.get("is_encoder_decoder"))


def _refuse_shared_tables(parts: list[_Part], base: Base) -> None:
    """Refuse the delta of a table that an encoder and a decoder both use, which their own embeddings do not have."""
    if not base.config.get("is_encoder_decoder"):
        return
    problems = [f"{part.name}: the net uses one weight for the embeddings of its encoder and its decoder, of which the "
                f"adapter changed one module only: use it unmerged." for part in parts
                if part.is_table and part.weight and not {"encoder", "decoder"} & set(part.weight.split("."))]
    if problems:
        raise ValueError("\n  ".join(problems))


def _warn_of_unknown(changed: list[_Part], base: Base) -> None:
    """Say that a merged embedding may be an output layer's weight, too."""
    names = [part.name for part in changed if part.is_table and part.weight]
    if names:
        warn_user(f"Merging into the embedding {', '.join(names[:3])}: there is no config.json in {base.layout.root} "
                  f"that tells whether the net uses the same weight for its output layer, which would then change "
                  f"too. If it does, use the adapter unmerged.")
