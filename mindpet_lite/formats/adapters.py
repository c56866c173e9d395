"""Adapters on the disk in any format: the one place that knows how each is read and written."""
from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mindpet_lite.formats import diffusers, kohya, mindformers, mindpet, mlx, native, peft, peft_method
from mindpet_lite.formats.atomic import atomic_file, names_in, open_together, write_together
from mindpet_lite.formats.checkpoint_file import open_checkpoint, to_parts
from mindpet_lite.formats.detect import FORMATS, detect
from mindpet_lite.formats.directory import CONFIG_FILE, TENSOR_FILE, read_config
from mindpet_lite.formats.files import TensorFile, as_float, open_tensors, tensors_in, to_bytes, type_name
from mindpet_lite.formats.peft_config import kept_problems, remarks
from mindpet_lite.formats.peft_method import PeftMethod
from mindpet_lite.formats.problems import first_of
from mindpet_lite.formats.settings import settings_problems
from mindpet_lite.formats.state import AdapterState
from mindpet_lite.formats.stated_alpha import warn_of_contrary


class FileMethod(Protocol):
    """A method, as far as files know it: how PEFT's hold it, None where they cannot."""

    peft: PeftMethod | None


# The methods of a program, by name.
Methods = Mapping[str, FileMethod | None]
# LoRA's files are those of many tools, and read by `peft`, `diffusers` and others without a declaration.
LORA: Methods = {"lora": None}

TARGETS = ("peft", "diffusers", "kohya", "mindpet", "mindformers")
# The name by which diffusers finds the file in a directory.
_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
# The names, without their ending, of the tensors that a config beside them belongs to: PEFT's, mlx-lm's.
_WITH_CONFIG = (Path(TENSOR_FILE).stem, "adapters")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter as it was read.

    Args:
        state: what it is.
        kind: its format.
        files: what was read.
        remarks: a sentence each, what a user must know of it.
    """

    state: AdapterState
    kind: str
    files: tuple[Path, ...]
    remarks: tuple[str, ...] = ()


def read_adapter(path: Path, kind: str | None = None, methods: Methods = LORA,
                 paths: Iterable[str] | None = None) -> Adapter:
    """Read an adapter of any format.

    Args:
        path: a file, or a directory with one adapter.
        kind: its format; None to tell it by keys and files.
        methods: by name, those that the adapter may be of.
        paths: of the layers of the net it is for, where they are known: kohya's names alone may not tell a path.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: it is no adapter, not of the format `kind`, or damaged.
    """
    if kind is not None and kind not in FORMATS:
        raise ValueError(f"the format of an adapter is one of {', '.join(FORMATS)}, not {kind!r}.")
    config_file, tensor_file = _files(path)
    with _open(config_file, tensor_file) as (config, file):
        try:
            found = kind or detect(file.keys(), file.metadata, config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        tensors = {name: file.read(name) for name in file.keys()}
    if found in ("peft", "mlx", native.FORMAT) and config is None:
        raise FileNotFoundError(f"There is no {CONFIG_FILE} beside {tensor_file}, which holds the adapter's settings: "
                                f"give the directory with both.")
    try:
        if not _may_be_empty(config, methods):
            _check_sizes(tensors)
        state = _decode(found, tensors, file.metadata, config, methods, paths)
        problems = [*_type_problems(state), *settings_problems(state), *kept_problems(state.config, state.method)]
        if problems:
            raise ValueError("\n  ".join(problems))
    except ValueError as error:
        raise ValueError(f"The adapter in {path} cannot be used:\n  {first_of(error)}") from error
    return Adapter(state, found, tuple(filter(None, (config_file, tensor_file))),
                   _remarks(state, config or {}, methods) if found == "peft" else ())


def to_files(state: AdapterState, kind: str, path: Path, methods: Methods = LORA) -> dict[Path, bytes]:
    """Return what to write so that `path` holds the adapter in a format: contents by file.

    Args:
        state: the adapter.
        kind: the format, one of `TARGETS`.
        path: a directory or a file.
        methods: by name, those that it may be of.

    Raises:
        ValueError: `path` does not suit the format, or the format cannot hold the adapter.
    """
    if kind not in TARGETS:
        near = difflib.get_close_matches(str(kind), TARGETS, n=1)
        raise ValueError(f"format must be one of {', '.join(TARGETS)}, but got {kind!r:.100}."
                         f"{f' Did you mean {near[0]!r}?' if near else ''}")
    if kind in ("peft", "mindformers"):
        if path.suffix in (".safetensors", ".ckpt"):
            raise ValueError(f"{kind}'s adapters are directories, but {path} is a file's name.")
        tensors, config = as_peft(state, methods) if kind == "peft" else mindformers.encode(state)
        return {path / CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
                path / TENSOR_FILE: to_bytes(tensors)}
    if kind == "diffusers" and path.suffix != ".safetensors":
        path = path / _DIFFUSERS_FILE
    if kind == "mindpet" and path.suffix == ".ckpt":
        tensors, texts = mindpet.encode(state)
        return {path: b"".join(to_parts([*tensors.items(), *texts.items()]))}
    if path.suffix != ".safetensors":
        ends = ".ckpt or .safetensors" if kind == "mindpet" else ".safetensors"
        raise ValueError(f"{kind}'s adapters are single files: give a name that ends in {ends} instead of {path}.")
    tensors, texts = {"diffusers": diffusers, "kohya": kohya, "mindpet": mindpet}[kind].encode(state)
    return {path: to_bytes(tensors, texts)}


def as_peft(state: AdapterState, methods: Methods) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors and the config of PEFT's directory; what PEFT's files cannot hold has our own form there."""
    method = getattr(methods.get(state.method), "peft", None)
    if method is not None and peft_method.can_hold(state, method):
        return peft_method.encode(state, method)
    return (peft if peft.can_hold(state) else native).encode(state)


def from_peft(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], methods: Methods = LORA) -> AdapterState:
    """Return the adapter that PEFT's tensors by key, and its config, describe.

    Raises:
        ValueError: they do not belong together, or to a method that is known.
    """
    return _decode("peft", tensors, {}, dict(config), methods, None)


def _remarks(state: AdapterState, config: Mapping[str, Any], methods: Methods) -> tuple[str, ...]:
    if state.method == "lora":
        return tuple(remarks(config, state))
    method = getattr(methods.get(state.method), "peft", None)
    return (method.remark,) if method is not None and method.remark else ()


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write the files of one adapter, whole or not at all."""
    first, *others = files
    if others:
        write_together(first.parent, {path.name: data for path, data in files.items()})
        return
    with atomic_file(first) as temporary:
        temporary.write_bytes(files[first])


def open_file(path: Path) -> TensorFile:
    """Open a file of tensors: MindSpore's checkpoint by its ending, else safetensors."""
    return open_checkpoint(path) if path.suffix == ".ckpt" else open_tensors(path)


def _decode(kind: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], config: dict[str, Any] | None,
            methods: Methods, paths: Iterable[str] | None) -> AdapterState:
    declared = {kind.peft.peft_type: (name, kind.peft) for name, kind in methods.items()
                if kind is not None and kind.peft is not None}
    if kind == "peft" and config is not None and config.get("peft_type") != "LORA":
        found = declared.get(str(config.get("peft_type")))
        if found is None:
            raise ValueError(f"peft_type must be one of {', '.join(['LORA', *declared])}, but the config says "
                             f"{config.get('peft_type')!r:.100}.")
        return peft_method.decode(tensors, config, *found)
    if kind in ("peft", "mlx"):
        state = (peft if kind == "peft" else mlx).decode(tensors, config or {})
        warn_of_contrary(metadata, {path: layer.settings["lora_alpha"] for path, layer in state.layers.items()
                                    if layer.settings and "lora_alpha" in layer.settings}, "the config counts")
        return state
    if kind == native.FORMAT:
        return native.decode(tensors, config or {})
    if kind == "diffusers":
        return diffusers.decode(tensors, metadata)
    if kind == "kohya":
        return kohya.decode(tensors, metadata, paths)
    if kind == "mindpet":
        return mindpet.decode(tensors, metadata.get(mindpet.SETTINGS_KEY), methods)
    return mindformers.decode(tensors, config)


def _may_be_empty(config: Mapping[str, Any] | None, methods: Methods) -> bool:
    """Tell whether the files of the config's method may hold tensors without a value."""
    return any(kind.peft.may_be_empty for kind in methods.values() if kind is not None and kind.peft is not None
               and kind.peft.peft_type == (config or {}).get("peft_type"))


def _check_sizes(tensors: Mapping[str, np.ndarray]) -> None:
    """Refuse tensors without a value."""
    empty = [f"{name} has the shape {value.shape}, which holds no value: DeepSpeed's ZeRO-3 leaves such tensors where "
             f"the shards were not gathered before saving (stage3_gather_16bit_weights_on_model_save, or "
             f"zero_to_fp32.py); save the adapter again." for name, value in tensors.items() if not value.size]
    if empty:
        raise ValueError("\n  ".join(empty))


def _type_problems(state: AdapterState) -> list[str]:
    """Return a sentence for each factor of LoRA that is no number with a fraction.

    8 bit floats are read, so that they can be copied; `eight_bit_problems` refuses them where they would be used.
    """
    return [f"{path}.{name} is of type {type_name(value.dtype)}, but LoRA's tensors are F32, F16, BF16 or F64."
            for path, layer in state.layers.items() for name, value in layer.tensors.items()
            if (layer.method or state.method) == "lora" and as_float(value).dtype.kind != "f"]


def _files(path: Path) -> tuple[Path | None, Path]:
    """Return the config of an adapter, None where there is none, and its tensors."""
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}: check the path.")
    folder = path if path.is_dir() else path.parent
    names = names_in(folder)
    config = folder / CONFIG_FILE if CONFIG_FILE in names else None
    found = [folder / name for name in sorted(names) if name.endswith((".safetensors", ".ckpt"))]
    if not path.is_dir():
        # A config beside several files of tensors may be another's.
        # mlx-lm calls what it saves in between 0000100_adapters.
        mine = path.stem in _WITH_CONFIG or path.stem.endswith("_adapters") or found == [path]
        return (config if mine else None), path
    named = next(filter(None, ([item for item in found if item.stem == stem] for stem in _WITH_CONFIG)), found)
    if len(named) != 1:
        pickled = " Its adapter_model.bin is a pickle, which can run code when it is read and is never read: save it " \
                  "with safe_serialization=True." if (folder / "adapter_model.bin").exists() else ""
        raise FileNotFoundError(f"{path} is no directory of one adapter: it holds {len(named) or 'no'} files of "
                                f"tensors ({TENSOR_FILE}, or another .safetensors or .ckpt).{pickled}")
    return config, named[0]


@contextlib.contextmanager
def _open(config_file: Path | None, tensor_file: Path) -> Iterator[tuple[dict[str, Any] | None, TensorFile]]:
    """Give the config and the open tensors, both of one save."""
    if config_file is None or tensor_file.suffix == ".ckpt":
        with open_file(tensor_file) as file:
            if config_file is None:
                yield None, file
                return
            with config_file.open("rb") as handle:
                yield read_config(handle, config_file), file
        return
    with open_together(tensor_file.parent, (config_file.name, tensor_file.name)) as files:
        config = read_config(files[config_file.name], config_file)
        with tensors_in(files[tensor_file.name], tensor_file) as file:
            yield config, file
