"""An adapter from one format to another."""
from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from mindpet_lite.arguments import warn_user
from mindpet_lite.formats.adapters import LORA, Adapter, Methods, read_adapter, to_files, write_files
from mindpet_lite.formats.component import part
from mindpet_lite.formats.files import as_float
from mindpet_lite.formats.placed import placed
from mindpet_lite.formats.problems import first_of, listed
from mindpet_lite.formats.state import AdapterState
from mindpet_lite.names.table import Table, check_table, renamed
from mindpet_lite.offline.base import open_base


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Args:
        kind: the format it was in.
        layers: how many.
        files: what was written.
    """

    kind: str
    layers: int
    files: tuple[Path, ...]


def convert(source: Path, target: Path, to: str, kind: str | None = None, table: Table | None = None,
            base: Path | None = None, methods: Methods = LORA, component: str | None = None) -> Converted:
    """Write an adapter in another format, with its tensors bit for bit and all its settings, or not at all.

    The new files are read again before they take their place.

    Args:
        source: the adapter; it is never written to.
        target: a directory or a file, as the format has it; what was there by the names of the new files is replaced.
        to: "peft", "diffusers", "kohya", "mindpet" or "mindformers".
        kind: the format of `source`; None to detect it. Default: None.
        table: new names of layers: by the old ones, or pairs of a regular expression and its replacement.
            Default: None.
        base: the base whose names the layers get; a name that `table` gives is one of the base then. Default: None.
        methods: by name, see `adapters.read_adapter`. Default: LoRA alone.
        component: of a diffusion pipeline: its part of an adapter of several; else that which the adapter is of.
            Default: None.

    Raises:
        OSError: there is no adapter, or the target cannot be written.
        ValueError: the adapter is damaged or holds values that are not finite, or the format cannot hold all of it:
            the message says what; a name has no place in the base; or the target is the source.

    Examples:
        >>> from pathlib import Path
        >>> import mindpet_lite as mp
        >>> from mindspore import nn
        >>> from mindpet_lite.offline.convert import convert
        >>> net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 2))
        >>> net = mp.get_pet_model(net, mp.LoraConfig(2, 4, target_modules=["0"]))
        >>> _ = mp.save_adapter(net, "adapter")
        >>> done = convert(Path("adapter"), Path("adapter.ckpt"), "mindpet")
        >>> done.kind, done.layers, [path.name for path in done.files]
        ('peft', 1, ['adapter.ckpt'])
    """
    check_table(table)
    found, state = _read(source, kind, table, base, methods, component, to)
    broken = [f"{name} holds NaN or infinite values." for name, value in _values(state) if not np.isfinite(value).all()]
    if broken:
        raise ValueError(f"The adapter in {source} is damaged:\n  {listed(broken)}")
    try:
        files = to_files(state, to, target, methods)
    except ValueError as error:
        raise ValueError(f"The adapter in {source} cannot be written as {to}:\n  {first_of(error)}") from error
    _refuse_source(source, found.files, files)
    for text in found.remarks:
        warn_user(f"{source}: {text}")
    with tempfile.TemporaryDirectory() as folder:
        copies = {Path(folder, path.name): data for path, data in files.items()}
        write_files(copies)
        again = read_adapter(next(iter(copies)) if len(copies) == 1 else Path(folder), None, methods, state.layers)
    problems = differences(state, again.state)
    if problems:
        raise ValueError(f"The adapter in {source} would not be the same as {to}, so it was not written:\n  "
                         + listed(problems))
    write_files(files)
    if any(path.read_bytes() != data for path, data in files.items()):
        raise ValueError(f"{target} does not hold what was written to it: the disk or the memory is faulty.")
    return Converted(found.kind, len(state.layers), tuple(files))


def differences(one: AdapterState, other: AdapterState) -> list[str]:
    """Return, a sentence each, what of an adapter is not the same in the other one."""
    problems = [] if one.method == other.method else [f"method {one.method} became {other.method}."]
    problems += _changed_values("", one.trained, other.trained)
    problems += [f"{path} is in one of them only." for path in one.layers.keys() ^ other.layers.keys()]
    for path in one.layers.keys() & other.layers.keys():
        problems += _changed_values(f"{path}.", one.layers[path].tensors, other.layers[path].tensors)
        ours, theirs = (state.layers[path].settings or {} for state in (one, other))
        problems += [f"{path}: {name}={ours.get(name)!r} became {theirs.get(name)!r}."
                     for name in {**ours, **theirs} if (ours.get(name) or 0) != (theirs.get(name) or 0)]
    return problems


def _values(state: AdapterState) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the numbers of each tensor."""
    yield from ((name, as_float(value)) for name, value in state.trained.items())
    for path, layer in state.layers.items():
        yield from ((f"{path}.{name}", as_float(value)) for name, value in layer.tensors.items())


def _changed_values(path: str, one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> list[str]:
    problems = [f"{path}{name} is in one of them only." for name in one.keys() ^ other.keys()]
    return problems + [
        f"{path}{name} changed." for name in one.keys() & other.keys()
        if (one[name].dtype, one[name].shape) != (other[name].dtype, other[name].shape)
        or one[name].tobytes() != other[name].tobytes()]


def _read(source: Path, kind: str | None, table: Table | None, base: Path | None,
          methods: Methods, component: str | None, to: str) -> tuple[Adapter, AdapterState]:
    """Return the adapter as it is, and the wanted part of it with its new names."""
    if base is not None:
        with open_base(base) as tensors:
            found = read_adapter(source, kind, methods, tensors.owners)
            try:
                return found, placed(part(found.state, component, to), tensors.owners, table, component)
            except ValueError as error:
                raise ValueError(f"The adapter in {source} does not fit {base}:\n  {first_of(error)}") from error
    wanted = table.values() if isinstance(table, Mapping) else ()
    found = read_adapter(source, kind, methods, wanted)
    try:
        state = part(found.state, component, to)
        owners = [*state.layers, *(owner for name in state.trained if (owner := name.rpartition(".")[0]))]
        names, problems = renamed(owners, table)
        if problems:
            raise ValueError("\n  ".join(problems))
        own = {path: path for path in owners} | names
        return found, placed(state, own.values(), own) if table is not None else state
    except ValueError as error:
        raise ValueError(f"The adapter in {source} cannot get its new names:\n  {first_of(error)}") from error


def _refuse_source(source: Path, read: Iterable[Path], written: Iterable[Path]) -> None:
    """Refuse to write over what was read, or beside it into its own directory."""
    for path in written:
        same = any(path.exists() and path.samefile(item) for item in read)
        if same or source.is_dir() and path.parent.exists() and path.parent.samefile(source):
            raise ValueError(f"{path} would be written into the adapter that is converted: give another place.")
