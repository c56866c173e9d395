"""Ctrl-C and SIGTERM end a training loop after a whole step."""
from __future__ import annotations

import ctypes
import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# More than any system's struct sigaction takes.
_SIGACTION_BYTES = 256
_SECONDS = 0.002


class Interrupts:
    """Notes SIGINT (Ctrl-C) and SIGTERM, so that a training loop can save before it ends.

    Inside the block the first of them is only noted; the loop asks for it after each step. A second one ends the
    program, as KeyboardInterrupt. Afterwards the handlers are what they were.

    Whenever MindSpore runs a graph, it puts a handler of its own in the place of Python's, which makes a SIGTERM of
    Ctrl-C. Inside the block a thread takes SIGINT back, at the latest when the compiler, which lets no thread run, is
    done.

    Use it in the main thread, which alone gets signals.

    Attributes:
        number: the number of the signal that came, or 0.

    Examples:
        >>> import mindpet_lite as mp
        >>> with mp.Interrupts() as interrupts:
        ...     for step in range(3):              # a training loop
        ...         if interrupts.number:          # Ctrl-C came: save, and leave the loop
        ...             break
        >>> interrupts.number
        0
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}
        self._ended = threading.Event()

    def __enter__(self) -> Interrupts:
        """Begin to note the signals."""
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        handler = ctypes.create_string_buffer(_SIGACTION_BYTES)
        ctypes.CDLL(None).sigaction(signal.SIGINT, None, handler)
        threading.Thread(target=self._keep, args=(handler,), daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        """Give the signals back to whoever had them."""
        self._ended.set()
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def exit_code(self) -> int:
        """The exit code of a program that a signal ended, 130 or 143; 0 if none came."""
        return 128 + self.number if self.number else 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number

    def _keep(self, handler: ctypes.Array[ctypes.c_char]) -> None:
        """Put Python's handler of SIGINT back again and again; Python itself lets only the main thread do that."""
        sigaction = ctypes.CDLL(None).sigaction
        while not self._ended.wait(_SECONDS):
            sigaction(signal.SIGINT, handler, None)
