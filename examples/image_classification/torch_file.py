"""Reads the tensors of a file that torch.save wrote, without running anything that stands in it.

Such a file is a pickle: a program for a small stack machine, which may name any function of any module and call it.
Here the program is only looked at. The few instructions that make a dictionary of tensors are done by hand, a few names
mean something (`OrderedDict`, `_rebuild_tensor_v2`, `FloatStorage` and its like), and anything else is refused; no
module is imported and no function of the file's choice is called. Both formats of torch are read: zip (since 1.6) and
the older one, which is five pickles and the numbers after one another.
"""

import io
import math
import pickletools
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

OLD_MAGIC = 0x1950A86A20F9469CFC6C
TYPES = {"torch FloatStorage": "<f4", "torch DoubleStorage": "<f8", "torch HalfStorage": "<f2",
         "torch LongStorage": "<i8", "torch IntStorage": "<i4"}
ORDERED, REBUILD = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE"}
CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# What reading raises where a file is cut short or put together wrongly.
BROKEN = (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError,
          zipfile.BadZipFile, zlib.error)
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Refused(ValueError):
    """The file is none that holds tensors only; the text says why."""


class Name(NamedTuple):
    """What a pickle names: a module, a space, a name."""

    text: str


class Storage(NamedTuple):
    """A row of numbers of the file, by its key."""

    key: str
    dtype: str
    size: int


class Slices(NamedTuple):
    """A tensor: which of a storage's numbers are its own."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a state_dict by name.

    Args:
        path: A file of torch.save's, of either format.

    Raises:
        Refused: It is another file, is damaged, or says more than which tensors it holds.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        try:
            found, numbers = (_zip_file if start == b"PK\x03\x04" else _old_file)(file)
        except Refused:
            raise
        except BROKEN as error:
            raise Refused(f"the file is damaged or none of torch's ({type(error).__name__}: {error})") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found or not all(
            isinstance(name, str) and isinstance(value, Slices) for name, value in found.items()):
        raise Refused("the file holds something else than tensors by name: save a state_dict")
    return {name: _tensor(name, value, numbers) for name, value in found.items()}


def _zip_file(file: BinaryIO) -> tuple[Any, dict[str, bytes]]:
    """The object of a file of the new format, and the numbers of each storage."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        (pickled,) = [name for name in names if name.endswith("/data.pkl")]
        folder = pickled.removesuffix("data.pkl")
        if folder + "byteorder" in names and archive.read(folder + "byteorder") != b"little":
            raise Refused("the file's numbers have their bytes in the other order: save it on another machine")
        found = unpickled(io.BytesIO(archive.read(pickled)))
        keys = [name for name in names if name.startswith(folder + "data/")]
        return found, {name.removeprefix(folder + "data/"): archive.read(name) for name in keys}


def _old_file(file: BinaryIO) -> tuple[Any, dict[str, bytes]]:
    """The same of a file of the old format: magic number, version, sizes, the object, keys, then all numbers."""
    try:
        magic = unpickled(file)
    except (ValueError, IndexError):
        magic = None
    if magic != OLD_MAGIC:
        raise Refused("the file does not begin as torch.save's do")
    _, sizes = unpickled(file), unpickled(file)
    if sizes["little_endian"] is not True:
        raise Refused("the file's numbers have their bytes in the other order: save it on another machine")
    storages: dict[str, Storage] = {}
    found = unpickled(file, storages)
    numbers = {}
    for key in unpickled(file):
        length = int.from_bytes(file.read(8), "little") * np.dtype(storages[key].dtype).itemsize
        numbers[key] = file.read(length)
        if len(numbers[key]) != length:
            raise Refused("the file was cut short")
    return found, numbers


def _tensor(name: str, slices: Slices, numbers: dict[str, bytes]) -> np.ndarray:
    """The numbers of a tensor, in its shape."""
    storage, offset, shape, strides = slices
    row = np.frombuffer(numbers[storage.key], storage.dtype) if storage.key in numbers else np.empty(0)
    whole = [offset, *shape, *strides]
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides)) if all(shape) else -1
    if len(shape) != len(strides) or min(whole) < 0 or last >= row.size or (
            row.size != storage.size or math.prod(shape) > row.size):
        raise Refused(f"the tensor {name} reaches beyond its numbers")
    bytes_of = tuple(stride * row.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(row[offset:], shape, bytes_of, writeable=False).copy()


def unpickled(stream: BinaryIO, storages: dict[str, Storage] | None = None) -> Any:
    """Reads one pickle by hand, up to its end.

    Args:
        stream: Where it begins; afterwards at what follows it.
        storages: Gets every storage that the pickle speaks of, by key.

    Returns:
        Numbers, texts, tuples, lists, dictionaries, and a `Slices` for each tensor.

    Raises:
        Refused: It has an instruction or a name that a dictionary of tensors does not need.
    """
    machine = _Machine({} if storages is None else storages)
    for code, argument, _ in pickletools.genops(stream):
        if code.name == "STOP":
            return machine.stack.pop()
        machine.step(code.name, argument)
    raise Refused("a pickle has no end")


class _Machine:
    """The stack machine of pickles, with the instructions of tensors alone."""

    def __init__(self, storages: dict[str, Storage]) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memory: dict[int, Any] = {}
        self.storages = storages
        self.steps: dict[str, Callable[[], Any]] = {
            "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_LIST": list, "TUPLE": lambda: tuple(self.above()),
            "BINPERSID": self.storage, "REDUCE": self.call}

    def step(self, name: str, argument: Any) -> None:
        """Does one instruction."""
        stack = self.stack
        if name in NUMBERS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in TUPLES:
            stack[-TUPLES[name]:] = [tuple(stack[-TUPLES[name]:])]
        elif name in self.steps:
            stack.append(self.steps[name]())
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memory[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memory[argument])
        elif name == "GLOBAL":
            if argument not in (ORDERED, REBUILD, *TYPES):
                raise Refused(f"the file names {argument.replace(' ', '.')!r:.80}, which no tensor needs: it is not "
                              "read")
            stack.append(Name(argument))
        elif name in ("SETITEM", "SETITEMS"):
            items = self.above() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            self.last(dict).update(zip(items[::2], items[1::2]))
        elif name in ("APPEND", "APPENDS"):
            items = self.above() if name == "APPENDS" else [stack.pop()]
            self.last(list).extend(items)
        elif name == "BUILD":  # what torch notes beside a state_dict: versions of its modules
            stack.pop()
            self.last(dict)
        elif name != "PROTO":
            raise Refused(f"the file has the instruction {name}, which no tensor needs: it is not read")

    def above(self) -> list[Any]:
        """Takes what lies above the last mark."""
        mark = self.marks.pop()
        taken = self.stack[mark:]
        del self.stack[mark:]
        return taken

    def last(self, kind: type) -> Any:
        """What lies on top, which must be of this kind."""
        if type(self.stack[-1]) is not kind:
            raise Refused(f"the file changes something that is no {kind.__name__}: it is not read")
        return self.stack[-1]

    def storage(self) -> Storage:
        """What a storage is: the pickle names it by its type, key, place and size."""
        kind, dtype, key, _, size, *_ = self.stack.pop()
        if kind != "storage" or dtype.text not in TYPES:
            raise Refused(f"the file speaks of {kind!r:.40}, which is no storage: it is not read")
        self.storages[key] = Storage(key, TYPES[dtype.text], size)
        return self.storages[key]

    def call(self) -> Any:
        """What a call gives: an empty dictionary or a tensor."""
        arguments, name = self.stack.pop(), self.stack.pop()
        if name == Name(ORDERED) and arguments == ():
            return {}
        if name != Name(REBUILD):
            raise Refused("the file calls something that makes no tensor: it is not read")
        storage, offset, shape, strides, *_ = arguments
        if not isinstance(storage, Storage) or not all(type(n) is int for n in (offset, *shape, *strides)):
            raise Refused("the file has a tensor that is none: it is not read")
        return Slices(storage, offset, shape, strides)
