"""Ctrl-C and SIGTERM end a training loop after a whole step."""
from __future__ import annotations

import signal
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Notes SIGINT (Ctrl-C) and SIGTERM, so that a training loop can save before it ends.

    Inside the block the first of them is only noted; the loop asks for it after each step. A second one ends the
    program at once, as KeyboardInterrupt. Afterwards the handlers are what they were.

    MindSpore puts a handler of its own in the place of Python's when its first operator runs. Each question takes the
    signals back, so ask once before the loop if an operator ran in the block.

    >>> with Interrupts() as interrupts:
    >>>     for rows in sampler:
    >>>         step(*batch(rows))
    >>>         if interrupts.number:
    >>>             state.save()
    >>>             break
    >>> raise SystemExit(interrupts.exit_code)

    Use it in the main thread, which alone gets signals.
    """

    def __init__(self) -> None:
        self._number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        """Begin to note the signals."""
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self._take()
        return self

    def __exit__(self, *raised: object) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def number(self) -> int:
        """The number of the signal that came, or 0."""
        self._take()
        return self._number

    @property
    def exit_code(self) -> int:
        """The exit code of a program that a signal ended, 130 or 143; 0 if none came."""
        return 128 + self._number if self._number else 0

    def _take(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number:
            raise KeyboardInterrupt
        self._number = number
