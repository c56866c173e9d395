"""A command that a signal ends: what it has begun is removed first, and one sentence says why it ended."""
from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(BaseException):
    """A signal came. No Exception, so that nothing takes it for an error and goes on.

    Args:
        what: the command that it came to.
        number: of the signal.
    """

    def __init__(self, what: str, number: int) -> None:
        super().__init__(f"{what} was ended by {signal.Signals(number).name} before it was done; what it had begun is "
                         f"removed.")
        self.exit_code = 128 + number


@contextmanager
def ended_by_signals(what: str) -> Iterator[None]:
    """Inside the block SIGINT, SIGTERM and SIGHUP raise `Ended`, where they have their default meaning.

    After the first of them they are ignored until the block is left: it only removes what it has begun. Threads other
    than the main one get no signals, and there the block does nothing.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: handler for number in _NUMBERS
                  if (handler := signal.getsignal(number)) in (signal.SIG_DFL, signal.default_int_handler)}

    def end(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise Ended(what, number)

    try:
        for number in before:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
