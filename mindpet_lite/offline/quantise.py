"""A base held in few bits, file to file, without a net."""
from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindpet_lite.arguments import did_you_mean, some_of
from mindpet_lite.formats.checkpoint_file import to_parts
from mindpet_lite.formats.files import to_header, type_name
from mindpet_lite.formats.folder import new_directory, refuse_filled
from mindpet_lite.formats.gguf import EXACT, GgufFile, open_gguf
from mindpet_lite.formats.problems import listed
from mindpet_lite.formats.quantised import KINDS, parts_of, quantise
from mindpet_lite.names.expressions import compile_checked
from mindpet_lite.names.parameter_names import is_head, is_lookup
from mindpet_lite.offline.base import Base, open_base, open_file
from mindpet_lite.offline.numbers import FLOATS, widened
from mindpet_lite.offline.orientation import inputs_first
from mindpet_lite.offline.progress import Progress

# What GGUF calls the head and the table of words, and what heads of classifiers are called.
_NOT_LINEAR = re.compile(r"output|token_embd|(.*\.)?(score|classifier)")
_INDEX_END = ".safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class QuantisedFiles:
    """What was written.

    Args:
        out: the directory.
        errors: by the names of the weights that are quantised now, the norm of what that changed over the weight's.
        exact: those of them that were taken from blocks of a GGUF file as they are.
        rounded_again: the types of blocks of a GGUF file that were rounded anew, and how many tensors have each.
        tensors: how many the base has.
        before: bytes of its tensors.
        after: bytes of what was written.
        left_behind: files of the base that hold the model in another form, which were not copied.
    """

    out: Path
    errors: Mapping[str, float]
    exact: tuple[str, ...]
    rounded_again: Mapping[str, int]
    tensors: int
    before: int
    after: int
    left_behind: tuple[Path, ...]


class _Source:
    """The tensors of one file to be written, whatever it is.

    Args:
        names: of its tensors.
        shape: of one.
        dtype: of one, as it is written where it stays.
        read: its numbers.
        codes: int8 codes and float16 scales of blocks of 32, or None where it has none.
        kind: its type's name in messages.
    """

    def __init__(self, names: Sequence[str], shape: Callable[[str], tuple[int, ...]], dtype: Callable[[str], np.dtype],
                 read: Callable[[str], np.ndarray], codes: Callable[[str], Any], kind: Callable[[str], str]) -> None:
        self.names, self.shape, self.dtype, self.read = names, shape, dtype, read
        self.codes, self.kind = codes, kind


def quantise_files(base: Path, kind: str, out: Path, targets: str | Sequence[str] = "all-linear",
                   quiet: bool = False) -> QuantisedFiles:
    """Write to `out` the base with its linear layers' weights in few bits, as a net of `quantize_base` loads them.

    Beside each `<layer>.weight`, now codes, stand `<layer>.weight_scale` and what else `formats.quantised.parts_of`
    says; every other tensor stays as it is. One weight is in memory at a time. Files keep their names; of a GGUF file
    a ``.safetensors`` is made. `out` appears when all of it is written and was opened again; after an error there is
    nothing.

    Blocks of a GGUF file in Q8_0 and Q4_0 go into ``"q8_0"`` as they are, without loss. Every other way rounds what
    was rounded before: Q4_1's blocks have a minimum besides, for which no kind has a place. Names and the order of
    rows stay llama.cpp's, and what is not quantised is written in float32 or float16.

    Args:
        base: a file (safetensors, MindSpore's ``.ckpt`` or ``.gguf``), or a directory with one or more of the first
            two and what belongs to them.
        kind: "int8", "q8_0" or "nf4".
        out: a directory that is empty or not there yet.
        targets: names of layers (each equal to a path or its last parts), or one regular expression of whole paths, or
            ``"all-linear"``: all with a matrix called `weight` but tables and output heads, by their names.
            Default: "all-linear".
        quiet: show no progress. Default: False.

    Raises:
        OSError: a file is missing or cannot be read; `out` holds something, or the disk is full.
        ValueError: the kind is unknown; a name means no layer; a weight has no two axes, is no float, has NaN or
            infinite numbers, or a shape that the kind does not take.

    Examples:
        >>> from pathlib import Path
        >>> import mindpet_lite as mp
        >>> import mindspore as ms
        >>> from mindspore import nn
        >>> from mindpet_lite.offline.quantise import quantise_files
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> _ = ms.save_checkpoint(net, "base.ckpt")
        >>> done = quantise_files(Path("base.ckpt"), "int8", Path("few"), targets=["0"], quiet=True)
        >>> list(done.errors), done.tensors
        (['0.weight'], 4)
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, but got {kind!r:.100}.{did_you_mean(kind, KINDS)}")
    refuse_filled(out)
    with _opened(base) as (sources, folder, others, left_behind, config):
        owners = {name.rpartition(".")[0]: name for source in sources.values() for name in source.names
                  if name.endswith(".weight")}
        by_name = {name: source for source in sources.values() for name in source.names}
        chosen = _chosen(owners, by_name, targets)
        _check(chosen, by_name, kind, config)
        before = sum(math.prod(source.shape(name)) * source.dtype(name).itemsize
                     for source in sources.values() for name in source.names)
        errors: dict[str, float] = {}
        work = sum(math.prod(source.shape(name)) * 4 for source in sources.values() for name in source.names)
        with new_directory(out) as new, Progress("quantize", work, quiet) as progress:
            for path in others:
                (new / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / path, new / path)
            for path, source in sources.items():
                (new / path).parent.mkdir(parents=True, exist_ok=True)
                _write(new / path, source, kind, chosen, errors, progress)
            _write_indexes(new, others, sources, kind, chosen)
            after = sum((new / path).stat().st_size for path in sources)
        exact = tuple(name for name in chosen if kind == "q8_0" and by_name[name].kind(name) in EXACT)
        again = [by_name[name].kind(name) for name in chosen if name not in exact
                 and by_name[name].kind(name).startswith("Q")]
        return QuantisedFiles(out, errors, exact, {item: again.count(item) for item in dict.fromkeys(again)},
                              len(by_name), before, after, left_behind)


@contextlib.contextmanager
def _opened(base: Path) -> Iterator[tuple[dict[Path, _Source], Path, tuple[Path, ...], tuple[Path, ...],
                                          Mapping[str, Any]]]:
    """Give the files to write by their new names, the base's folder, its other files, and its config."""
    if base.suffix == ".gguf" and base.is_file():
        with open_gguf(base) as file:
            yield {Path(base.stem + ".safetensors"): _of_gguf(file)}, base.parent, (), (), {}
        return
    with open_base(base) as found:
        if found.is_pipeline():
            raise ValueError(f"{base} is a pipeline of several models: give the folder of one of them.")
        yield ({path: _of_base(found, path) for path in found.files}, found.layout.root, found.layout.others,
               found.layout.copies, found.config)


def _of_base(base: Base, path: Path) -> _Source:
    file = base.files[path]
    return _Source(file.keys(), file.shape, file.dtype, file.read, lambda name: None,
                   lambda name: type_name(file.dtype(name)))


def _of_gguf(file: GgufFile) -> _Source:
    def dtype(name: str) -> np.dtype:
        return np.dtype("<f2" if file.kind(name) == "F16" else "<f4")

    return _Source(list(file.spans), lambda name: file.spans[name].shape, dtype, file.read,
                   lambda name: file.codes(name) if file.kind(name) in EXACT else None, file.kind)


def _chosen(owners: Mapping[str, str], by_name: Mapping[str, _Source], targets: str | Sequence[str]) -> list[str]:
    """Return the names of the weights to quantise."""
    linear = {path: name for path, name in owners.items() if len(by_name[name].shape(name)) == 2
              and not is_lookup(path) and not is_head(path) and not _NOT_LINEAR.fullmatch(path)}
    example = next(iter(linear), None)
    known = [item for path in owners for item in (path, path.rpartition(".")[2])]
    if targets == "all-linear":
        found = linear
    elif isinstance(targets, str):
        try:
            expression = compile_checked(targets)
        except ValueError as error:
            raise ValueError(f"targets {targets!r:.100} {error}") from error
        found = {path: name for path, name in owners.items() if expression.fullmatch(path)}
    else:
        found = {}
        for entry in targets:
            own = {path: name for path, name in owners.items() if path == entry or path.endswith(f".{entry}")}
            if not own:
                raise ValueError(f"targets entry {entry!r:.100} hits nothing; it must equal a layer's path or its last "
                                 f"parts, such as {example!r}.{did_you_mean(entry, known)}")
            found.update(own)
    if not found:
        raise ValueError(f"targets {targets!r:.100} hits no layer of the base; its linear layers are "
                         f"{some_of(linear, 3)}.")
    return list(found.values())


def _check(chosen: Sequence[str], by_name: Mapping[str, _Source], kind: str, config: Mapping[str, Any]) -> None:
    """Refuse weights that cannot be quantised, all of them in one message, before anything is written."""
    problems = []
    for name in chosen:
        source = by_name[name]
        shape, layer = source.shape(name), name.rpartition(".")[0]
        if len(shape) != 2:
            problems.append(f"{name} of shape {shape} is no matrix.")
        elif source.dtype(name) not in FLOATS:
            problems.append(f"{name} is of type {source.kind(name)}: only floats are quantised. (Is the base quantised "
                            f"already?)")
        elif inputs_first(layer, config):
            problems.append(f"{name} lies as (inputs, outputs), in a layer of GPT-2's kind, which quantize_base does "
                            f"not take.")
        else:
            try:
                parts_of(kind, (shape[0], shape[1]))
            except ValueError as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise ValueError("The base cannot be quantised so:\n  " + listed(problems))


def _form(source: _Source, name: str, kind: str, chosen: Sequence[str]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Return type and shape of what is written for a tensor, by name."""
    shape = source.shape(name)
    if name not in chosen:
        return {name: (source.dtype(name), shape)}
    layer = name.removesuffix("weight")
    return {layer + part: (np.dtype(item.dtype), item.shape)
            for part, item in parts_of(kind, (shape[0], shape[1])).items()}


def _tensors(source: _Source, name: str, kind: str, chosen: Sequence[str], errors: dict[str, float]
             ) -> dict[str, np.ndarray]:
    """Return what is written for a tensor, by name."""
    if name not in chosen:
        return {name: source.read(name)}
    codes = source.codes(name) if kind == "q8_0" else None
    if codes is not None:
        found = {"weight": codes[0], "weight_scale": codes[1], "weight_error": np.zeros((), np.float32)}
    else:
        weight = widened(source.read(name))
        if not np.isfinite(weight.max(initial=0)) or not np.isfinite(weight.min(initial=0)):
            raise ValueError(f"{name} holds NaN or infinite numbers, which have no place on a scale.")
        try:
            found = quantise(kind, weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    errors[name] = float(found["weight_error"])
    layer = name.removesuffix("weight")
    return {layer + part: value for part, value in found.items()}


def _write(path: Path, source: _Source, kind: str, chosen: Sequence[str], errors: dict[str, float],
           progress: Progress) -> None:
    """Write a file, one tensor at a time, and open it again."""
    forms = {name: _form(source, name, kind, chosen) for name in source.names}
    all_forms = {part: form for own in forms.values() for part, form in own.items()}
    if len(all_forms) != sum(map(len, forms.values())):
        raise ValueError(f"{path.name} has a tensor whose name a scale would get: is it quantised already?")
    if path.suffix == ".ckpt":
        def values() -> Iterator[tuple[str, np.ndarray | str]]:
            for name in source.names:
                yield from _tensors(source, name, kind, chosen, errors).items()
                progress.advance(math.prod(source.shape(name)) * 4)

        with path.open("xb") as file:
            for piece in to_parts(values()):
                file.write(piece)
    else:
        header, order = to_header(all_forms)
        places, place = {}, len(header)
        for part in order:
            dtype, shape = all_forms[part]
            places[part], place = place, place + math.prod(shape) * dtype.itemsize
        with path.open("xb") as file:
            file.write(header)
            file.truncate(place)
            for name in source.names:
                for part, value in _tensors(source, name, kind, chosen, errors).items():
                    file.seek(places[part])
                    file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
                progress.advance(math.prod(source.shape(name)) * 4)
    with open_file(path) as written:
        same = {name: (written.dtype(name), written.shape(name)) for name in written.keys()} == all_forms
    if not same:
        raise ValueError(f"{path.name} does not hold what was written to it: the disk or the memory is faulty.")


def _write_indexes(new: Path, others: Sequence[Path], sources: Mapping[Path, _Source], kind: str,
                   chosen: Sequence[str]) -> None:
    """Write the index of shards anew, with the names that are there now."""
    for index in (path for path in others if path.name.endswith(_INDEX_END)):
        files = {part: path.name for path, source in sources.items() if path.parent == index.parent
                 for name in source.names for part in _form(source, name, kind, chosen)}
        size = sum((new / path).stat().st_size for path in sources if path.parent == index.parent)
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}, indent=2)
        (new / index).write_text(text + "\n", encoding="utf-8")
