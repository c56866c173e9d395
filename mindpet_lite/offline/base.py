"""A base model on the disk: a file of tensors, or a directory with shards, an index and whatever else belongs to it."""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mindpet_lite.formats.adapters import open_file
from mindpet_lite.formats.base_hash import sample_places, weight_hash
from mindpet_lite.formats.files import Entry, TensorFile
from mindpet_lite.formats.problems import listed
from mindpet_lite.formats.strict_json import parse_object
from mindpet_lite.offline.numbers import widened

# What a layer's weight is called: by PyTorch and most of MindSpore, by nn.Embedding, by MindSpore's norms.
WEIGHTS = ("weight", "embedding_table", "gamma")
_BIASES = ("bias", "beta")
_INDEX = ".safetensors.index.json"
_PIPELINE = "model_index.json"
# Libraries that find it beside a model load the adapter, too.
_ADAPTER = "adapter_config.json"
_ENDINGS = (".safetensors", ".ckpt")
# The model again in a form that is not merged: left behind, lest somebody load it for the merged one.
_COPIES = (".safetensors", ".ckpt", ".gguf", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".pt", ".pth", ".bin")
_NOT_MODELS = ("optimizer", "scheduler", "training_args", "rng_state", "tokenizer", "vocab")
_MAX_INDEX = 100_000_000


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which files a base has.

    Args:
        root: the directory, or that of the file.
        weights: files of tensors below it, and what stands before their tensors' names in the net.
        others: files that belong to it.
        copies: files that hold the model again, or an adapter, which nobody merges.
    """

    root: Path
    weights: Mapping[Path, str]
    others: tuple[Path, ...]
    copies: tuple[Path, ...]


class Base:
    """The open tensors of a base, by their names in the net.

    Args:
        layout: its files.
        files: the open files of `layout.weights`.
    """

    def __init__(self, layout: Layout, files: Mapping[Path, TensorFile]) -> None:
        self.layout, self.files = layout, files
        self._home: dict[str, tuple[TensorFile, str]] = {}
        for path, file in files.items():
            for name in file.keys():
                full = layout.weights[path] + name
                if full in self._home:
                    raise ValueError(f"{full} stands in {self._home[full][0].path} and in {file.path}: name the file "
                                     f"to use, or remove the other.")
                self._home[full] = file, name
        self.owners: dict[str, dict[str, str]] = {}
        for full in self._home:
            owner, _, last = full.rpartition(".")
            self.owners.setdefault(owner, {})[last] = full

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        file, own = self._home[name]
        return file.shape(own)

    def dtype(self, name: str) -> np.dtype:
        """Return the type of a tensor."""
        file, own = self._home[name]
        return file.dtype(own)

    def read(self, name: str) -> np.ndarray:
        """Return a tensor, in memory of its own."""
        file, own = self._home[name]
        return file.read(own)

    def sample(self, name: str, places: np.ndarray) -> np.ndarray:
        """Return the values of a tensor at these places of its flat form; nothing else is read."""
        file, own = self._home[name]
        entry = spans(file)[own]
        found = np.empty(len(places), entry.dtype)
        with file.path.open("rb", buffering=0) as handle:
            for number, place in enumerate(places * entry.dtype.itemsize):
                begin, before = entry.parts[0][0], 0
                for start, stop in entry.parts:
                    if before <= place < before + stop - start:
                        begin = start + int(place) - before
                    before += stop - start
                handle.seek(begin)
                found[number:number + 1] = np.frombuffer(handle.read(entry.dtype.itemsize), entry.dtype)
        return found

    def layer_hash(self, layer: str) -> str:
        """Return the hash of a layer, made of its largest tensor: see `formats.base_hash`."""
        name = max(self.owners[layer].values(), key=lambda name: math.prod(self.shape(name)))
        shape = self.shape(name)
        with np.errstate(over="ignore"):
            return weight_hash(shape, widened(self.sample(name, sample_places(math.prod(shape)))))

    def in_file(self, path: Path) -> dict[str, str]:
        """Return the names of a file's tensors in the net, by their names in the file."""
        prefix = self.layout.weights[path]
        return {name: prefix + name for name in self.files[path].keys()}

    def weight_of(self, layer: str) -> str | None:
        """Return the name of a layer's weight, None where it has none."""
        own = self.owners.get(layer, {})
        return next((own[name] for name in WEIGHTS if name in own), None)

    def parameter(self, name: str) -> str | None:
        """Return the base's name of a parameter that may have PyTorch's or MindSpore's last name."""
        owner, _, last = name.rpartition(".")
        own = self.owners.get(owner, {})
        same = next((group for group in (WEIGHTS, _BIASES) if last in group), ())
        return own.get(last) or next((own[item] for item in same if item in own), None)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Return the object in the ``config.json`` beside the weights, empty where there is none.

        Raises:
            ValueError: it holds no JSON object.
        """
        path = self.layout.root / "config.json"
        if not path.is_file():
            return {}
        try:
            # Models' configs hold infinite numbers, which no adapter's may.
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path} must hold a JSON object, but holds a {type(found).__name__}.")
        return found

    def is_pipeline(self) -> bool:
        """Tell whether it is a pipeline of diffusers, a folder for each of its models."""
        return Path(_PIPELINE) in self.layout.others


@contextlib.contextmanager
def open_base(path: Path) -> Iterator[Base]:
    """Open a base; nothing but the headers of its files is read.

    Raises:
        OSError: there is no base, or it cannot be read.
        ValueError: a file is damaged, the index and the shards disagree, or it is not clear which files are meant.
    """
    layout = find_layout(path)
    with contextlib.ExitStack() as stack:
        yield Base(layout, {item: stack.enter_context(open_file(layout.root / item)) for item in layout.weights})


def spans(file: TensorFile) -> dict[str, Entry]:
    """Return where each tensor lies in its file."""
    return dict(file._entries)


def find_layout(path: Path) -> Layout:
    """Return the files of a base; errors as `open_base`."""
    if not path.exists():
        raise FileNotFoundError(f"There is no base at {path}: check the path.")
    if path.name.endswith(_INDEX):
        return find_layout(path.parent)
    if path.is_file():
        return Layout(path.parent, {Path(path.name): ""}, (), ())
    found = _below(path)
    if Path(_PIPELINE) in found:
        components = sorted({item.parent for item in found if len(item.parts) == 2 and item.suffix == ".safetensors"})
        weights = {item: f"{folder}." for folder in components for item in _weights(path, folder, found)}
    else:
        weights = {item: "" for item in _weights(path, Path(), found)}
    if not weights:
        raise FileNotFoundError(f"{path} holds no weights that can be merged: a .safetensors file, shards with a "
                                f"{_INDEX} or a .ckpt file are needed.")
    copies = [item for item in found if item not in weights and _is_copy(item)]
    others = [item for item in found if item not in weights and item not in copies]
    return Layout(path, weights, tuple(others), tuple(copies))


def _below(root: Path) -> list[Path]:
    """Return all files below a directory, links to files too; not those in hidden folders, such as ``.git``."""
    found = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith("."))
        found += [(Path(folder) / name).relative_to(root) for name in sorted(files)]
    return found


def _weights(root: Path, folder: Path, found: list[Path]) -> list[Path]:
    """Return the files with the weights of one model."""
    here = [item for item in found if item.parent == folder]
    indexes = [item for item in here if item.name.endswith(_INDEX)]
    if len(indexes) > 1:
        raise ValueError(f"{root / folder} has {len(indexes)} indexes ({', '.join(map(str, indexes))}): remove those "
                         f"that are not meant.")
    if indexes:
        return _shards(root, indexes[0], set(here))
    for ending in _ENDINGS:
        files = [item for item in here if item.suffix == ending and item.stem != "adapter_model"]
        named = [item for item in files if item.stem in ("model", "diffusion_pytorch_model")]
        if files:
            return named if len(named) == 1 else files
    return []


def _shards(root: Path, index: Path, here: set[Path]) -> list[Path]:
    """Return the files that an index names, having compared it with what they hold."""
    path = root / index
    if path.stat().st_size > _MAX_INDEX:
        raise ValueError(f"{path} is larger than {_MAX_INDEX} bytes, which no index is.")
    try:
        table = parse_object(path.read_bytes()).get("weight_map")
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise ValueError(f"{path} must hold a 'weight_map' with the file of each tensor.")
    shards = sorted(index.parent / name for name in set(table.values()))
    missing = [str(item) for item in shards if item not in here]
    if missing:
        raise FileNotFoundError(f"{path} names files that are not beside it: {', '.join(missing[:3])}.")
    problems = []
    for shard in shards:
        with open_file(root / shard) as file:
            held = set(file.keys())
        named = {name for name, file in table.items() if index.parent / file == shard}
        problems += [f"{name} is not in {shard}, though the index says so." for name in sorted(named - held)]
        problems += [f"{name} is in {shard}, but not in the index." for name in sorted(held - named)]
    if problems:
        raise ValueError(f"{path} does not fit its shards:\n  " + listed(problems))
    return shards


def _is_copy(item: Path) -> bool:
    """Tell whether a file looks like the model in another form, a part or index of it, or an adapter of it."""
    if item.name.endswith(".index.json"):
        return not item.name.endswith(_INDEX)
    if item.name == _ADAPTER:
        return True
    return item.suffix in _COPIES and not item.stem.startswith(_NOT_MODELS)
