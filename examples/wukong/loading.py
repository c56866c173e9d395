"""Weights of strangers into our models, entry by entry, and the report of what was found.

`match` compares the names and shapes of a file with a model; `fill` then reads one entry after the other, so that no
second copy of all weights is ever held.
"""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import mindspore as ms
import numpy as np
from base import BaseError
from mindspore import Parameter, nn

from mindpet_lite.formats.files import as_float
from mindpet_lite.offline.base import Base as Entries

TITLES = {"matched": "matched", "reshaped": "matched in another form", "missing": "missing in the file",
          "misshapen": "of another size", "unexpected": "unexpected in the file"}
STOPS = ("missing", "misshapen", "unexpected")
SHOWN = 10

# Where a parameter's value lies: its parts along the first axis, each under one of several names.
Origin = tuple[tuple[str, ...], ...]


@dataclass
class Report:
    """The names of a file's entries by what became of them.

    Attributes:
        matched: Read as they are.
        reshaped: Read, but laid out in another shape, such as a dense layer's weight as a 1x1 convolution's.
        missing: Wanted by a model, and not in the file.
        misshapen: Wanted by a model, but of another shape; the text tells both.
        unexpected: In the file, and no model wants them.
    """

    matched: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def add(self, other: "Report", prefix: str = "") -> None:
        """Takes up the names of another report, each behind a prefix."""
        for one in fields(self):
            getattr(self, one.name).extend(prefix + name for name in getattr(other, one.name))

    def table(self, shown: int | None = SHOWN) -> str:
        """The number of names of each kind, and below it the first names of each kind but the matched.

        Args:
            shown: Most names of a kind; None for all of every kind, the matched too.
        """
        lines = [f"{len(getattr(self, kind)):6}  {title}" for kind, title in TITLES.items()]
        for kind, title in TITLES.items():
            if getattr(self, kind) and (shown is None or kind != "matched"):
                lines += ["", f"{title}:", *(f"  {name}" for name in shortened(getattr(self, kind), shown))]
        return "\n".join(lines)

    def check(self, source: object, allowed: Sequence[str]) -> None:
        """Refuses a file that does not fit its models.

        Args:
            source: The file or folder, for the message.
            allowed: Names or patterns (``*`` is any text) of entries that the file or the models may lack.

        Raises:
            MismatchError: An entry is of another shape, or is missing or unexpected and not allowed.
        """
        stops = {kind: [name for name in getattr(self, kind) if kind == "misshapen" or not named(name, allowed)]
                 for kind in STOPS}
        if any(stops.values()):
            found = "; ".join(f"{len(names)} {TITLES[kind]}: {', '.join(shortened(names, 3))}"
                              for kind, names in stops.items() if names)
            raise MismatchError(f"{source} does not fit its models (check their sizes, see all names with "
                                f"load_report.py --all, or name what may be missing with --allow-missing): {found}",
                                self)


class MismatchError(BaseError):
    """A file whose entries are not those of its models; `report` has all of them."""

    def __init__(self, text: str, report: Report) -> None:
        super().__init__(text)
        self.report = report


def shortened(names: Sequence[str], shown: int | None) -> list[str]:
    """The first names, and how many more there are."""
    if shown is None or len(names) <= shown:
        return list(names)
    return [*names[:shown], f"and {len(names) - shown} more"]


def named(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name is one of these or fits a pattern."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def found_in(held: set[str], origin: Origin) -> list[str | None]:
    """The file's name of each part of a parameter, None for a part that it lacks."""
    return [next((name for name in names if name in held), None) for names in origin]


def part_shape(parameter: Parameter, parts: int) -> tuple[int, ...]:
    """The shape of each of so many parts along the first axis."""
    return parameter.shape if parts == 1 else (parameter.shape[0] // parts, *parameter.shape[1:])


def match(net: nn.Cell, file: Entries, origin: Callable[[str], Origin], ours: Callable[[str], bool]) -> Report:
    """Compares the names and shapes of a file with those of a model; no value is read.

    Args:
        net: The model.
        file: The open file or files.
        origin: Gives the place in the file of the parameter at a path of the model.
        ours: Tells whether an entry of the file should be the model's.
    """
    report, wanted, held = Report(), set[str](), set(file.names())
    for path, parameter in net.parameters_and_names():
        parts = origin(path)
        shape = part_shape(parameter, len(parts))
        for name, names in zip(found_in(held, parts), parts):
            wanted.update(names)
            if name is None:
                report.missing.append(names[-1])
            elif file.shape(name) == shape:
                report.matched.append(name)
            elif squeezed(file.shape(name)) == squeezed(shape):
                report.reshaped.append(name)
            else:
                report.misshapen.append(f"{name} ({file.shape(name)} instead of {shape})")
    report.unexpected = [name for name in file.names() if name not in wanted and ours(name)]
    return report


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without ones at its end: a dense layer and a 1x1 convolution have the same."""
    return squeezed(shape[:-1]) if len(shape) > 1 and shape[-1] == 1 else shape


def fill(net: nn.Cell, file: Entries, origin: Callable[[str], Origin]) -> None:
    """Sets every parameter from the file, in float32; what `match` found missing begins as in a new model.

    Raises:
        BaseError: An entry cannot be read, holds no floats, or holds NaN or infinity.
    """
    held = set(file.names())
    for path, parameter in net.parameters_and_names():
        names = found_in(held, origin(path))
        if None in names:
            parameter.init_data()
        if any(names):
            parameter.set_data(ms.Tensor(value_of(parameter, file, names), parameter.dtype))
    net.set_train(False)


def value_of(parameter: Parameter, file: Entries, names: list[str | None]) -> np.ndarray:
    """A parameter's value, put together from its parts; a part without a name keeps the value that it has."""
    shape = part_shape(parameter, len(names))
    if None in names:
        old = np.split(parameter.asnumpy(), len(names))
    parts = [old[i] if name is None else read(file, name).reshape(shape) for i, name in enumerate(names)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def read(file: Entries, name: str) -> np.ndarray:
    """The numbers of one entry in float32.

    Raises:
        BaseError: It cannot be read, holds no floats, or holds NaN or infinity.
    """
    try:
        value = as_float(file.read(name))
    except (OSError, ValueError) as error:
        raise BaseError(f"{name} cannot be read: {error}") from None
    if value.dtype.kind != "f":
        raise BaseError(f"{name} holds {value.dtype}, but weights are floats")
    value = value.astype(np.float32, copy=False)
    if not np.isfinite(value).all():
        raise BaseError(f"{name} holds NaN or infinity: copy the file again")
    return value


def new(model: Callable[..., nn.Cell], *arguments: object, **options: object) -> nn.Cell:
    """Builds a model whose parameters take no memory before they are set."""
    with nn.utils.no_init_parameters():
        return model(*arguments, **options)
