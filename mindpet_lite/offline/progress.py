"""How far a long command is, on standard error."""
from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_EVERY = 5.0


class Progress:
    """Counts to a total: tqdm's bar on a terminal where it is installed, else a line every five seconds.

    Args:
        what: stands before the numbers.
        total: in bytes.
        quiet: show nothing.
    """

    def __init__(self, what: str, total: int, quiet: bool) -> None:
        self.what, self.total, self.quiet, self.done = what, total, quiet, 0
        self._shown = time.monotonic()
        self._bar = None if quiet else _bar(what, total)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int) -> None:
        """Add to what is done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self.quiet and time.monotonic() - self._shown > _EVERY:
            self._shown = time.monotonic()
            sys.stderr.write(f"mindpet-lite: {self.what} {self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB\n")


def _bar(what: str, total: int) -> Any:
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        return None
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, leave=False, file=sys.stderr)
