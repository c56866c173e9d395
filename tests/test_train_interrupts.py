"""SIGINT and SIGTERM in a training loop."""
from __future__ import annotations

import ctypes
import os
import signal
import time

import pytest

from mindpet_lite.train import Interrupts


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_and_the_handlers_come_back(number, code):
    before = [signal.getsignal(item) for item in (signal.SIGINT, signal.SIGTERM)]
    with Interrupts() as interrupts:
        assert interrupts.number == 0 and interrupts.exit_code == 0
        os.kill(os.getpid(), number)
        assert interrupts.number == number and interrupts.exit_code == code
    assert [signal.getsignal(item) for item in (signal.SIGINT, signal.SIGTERM)] == before
    assert interrupts.exit_code == code


def test_the_second_signal_ends_the_program_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_that_another_library_puts_in_is_replaced():
    with Interrupts() as interrupts:
        ctypes.CDLL(None).signal(signal.SIGINT, 1)       # SIG_IGN, below Python, as a library would
        for _ in range(500):
            os.kill(os.getpid(), signal.SIGINT)
            if interrupts.number:
                break
            time.sleep(0.01)
        assert interrupts.number == signal.SIGINT
