"""Parameter-efficient tuning native to MindSpore and Ascend."""
from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mindpet_lite.compat import install_as_mindpet as install_as_mindpet
    from mindpet_lite.delta import *  # noqa: F403
    from mindpet_lite.graph import *  # noqa: F403
    from mindpet_lite.train import *  # noqa: F403

__version__ = "0.1.0"

# The rooms with these names. They are opened when a name is first asked for, because they load MindSpore, for which
# what works on files alone (`mindpet-lite merge`, `run`, `--help`) need not wait.
_ROOMS = ("delta", "graph", "train", "compat")


# Of `delta`, what stands in no user's code: what other packages' methods would be made of.
_NOT_HERE = frozenset({"METHODS", "Delta", "DeltaConfig"})


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__all__":
        return sorted({item for room in map(__getattr__, _ROOMS) for item in room.__all__} - _NOT_HERE)
    # A module of the package is imported without loading MindSpore to look for its name.
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is None:
        for room in map(__getattr__, _ROOMS):
            if name in room.__all__:
                globals()[name] = getattr(room, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *__getattr__("__all__")})
