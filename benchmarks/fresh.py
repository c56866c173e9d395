"""Work in a process of its own, and the memory that it takes there."""
from __future__ import annotations

import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fresh(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `work` returns in a new process, which imports the module of `work` before it runs."""
    spawn = multiprocessing.get_context("spawn")
    result = spawn.SimpleQueue()
    process = spawn.Process(target=_run, args=(work, arguments, result))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{work.__name__}{arguments} failed")
    return result.get()


def _run(work: Callable[..., Any], arguments: tuple, result: Any) -> None:
    # MindSpore drops folders where it runs.
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        result.put(work(*arguments))
        os.chdir("/")


class Peak:
    """The largest resident size of this process in bytes above what it has when this is made."""

    def __init__(self) -> None:
        self.base = _bytes("VmRSS")
        self.forget()

    def forget(self) -> None:
        """Let the peak be what is resident now."""
        Path("/proc/self/clear_refs").write_text("5")

    def now(self) -> int:
        """Return what is resident."""
        return _bytes("VmRSS") - self.base

    def most(self) -> int:
        """Return the most that was resident since this was made, or since `forget`."""
        return _bytes("VmHWM") - self.base


def _bytes(name: str) -> int:
    found = re.search(name + r":\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024
