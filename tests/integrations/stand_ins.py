"""What the libraries need and CPU, or the package registry, has not."""
from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types

# MindFormers writes its logs below the home folder, or here.
os.environ.setdefault("LOG_MF_PATH", "mindformers_logs")


class _Absent(types.ModuleType):
    """A module of which every name is a class that does nothing."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **settings: None})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "hyper_parallel":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Absent(spec.name)

    def exec_module(self, module):
        """Fill nothing in."""


def without_hyper_parallel() -> None:
    """Let MindFormers import `hyper_parallel`, which is for many devices and in no registry."""
    if not any(isinstance(item, _Finder) for item in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
