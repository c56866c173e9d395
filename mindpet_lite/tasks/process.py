"""One script in a session of its own: its output as it comes, its end, and the end of what it started."""
from __future__ import annotations

import codecs
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# Seconds that a script has to end by itself after the first signal, before SIGKILL.
GRACE = 5.0
_POLL = 0.1
_CHUNK = 1 << 16
# The largest pipe that Linux gives without asking holds 1 MiB: what a script wrote before it ended is at most that.
_PIPE = 1 << 20
# What a script starts inherits its environment: this variable finds those of them that left its session.
_MARK = "MINDPET_LITE_TASK"


@dataclass(frozen=True)
class Ending:
    """How a script ended.

    Args:
        exit_code: its exit code; -n if signal n ended it.
        timed_out: it was ended at its timeout.
        signal: it was ended because the caller got this signal.
    """

    exit_code: int
    timed_out: bool
    signal: int | None


def run_script(command: Sequence[str], seconds: float | None) -> Ending:
    """Run a command to its end, its output written to `sys.stdout` as it comes.

    It runs in a session of its own, without standard input. At the timeout, when the caller gets SIGINT, SIGTERM or
    SIGHUP with their default meaning, and when it fails by itself, all processes it started are ended: by a signal
    (the caller's, else SIGTERM), and after `GRACE` seconds by SIGKILL. Processes that it leaves behind when it
    succeeds are left alone.

    Args:
        command: program and arguments; no shell reads them.
        seconds: the timeout; None for none.

    Raises:
        OSError: the command cannot be started.
    """
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    with _caught_signals() as caught:
        script = _Script(command)
        try:
            while script.process.poll() is None and not caught and time.monotonic() < deadline:
                script.pump(_POLL)
            timed_out = script.process.poll() is None and not caught
            if script.process.poll() != 0:
                script.end(caught[0] if caught else signal.SIGTERM)
            script.drain()
        except BaseException:
            script.echo = _silent
            script.end(signal.SIGTERM)
            raise
        finally:
            script.close()
        code = script.process.poll()    # None: not even SIGKILL ends a process that waits for a broken device
        return Ending(-signal.SIGKILL if code is None else code, timed_out, caught[0] if caught else None)


def echo(text: str) -> None:
    """Write text to `sys.stdout` at once; what its encoding lacks becomes a question mark."""
    stream = sys.stdout
    if stream is None:
        return
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, errors="replace").decode(encoding))
    stream.flush()


class _Script:
    """A started script."""

    def __init__(self, command: Sequence[str]):
        token = uuid.uuid4().hex
        # A script that itself runs tasks hands both marks on, so that ending the outer one finds the inner one too.
        marks = ":".join(filter(None, [os.environ.get(_MARK), token]))
        self.token = token.encode()
        # The script's descendants by process number, with the time each started: numbers are used again.
        self.family: dict[int, str] = {}
        self.echo: Callable[[str], None] = echo
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
            start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1", _MARK: marks})
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.selector = selectors.DefaultSelector()
        if self.process.stdout is not None:
            self.selector.register(self.process.stdout, selectors.EVENT_READ)

    def pump(self, wait: float) -> int:
        """Echo what arrives within `wait` seconds, or wait for the end if the output is closed; return the bytes."""
        if not self.selector.get_map():
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(wait)
            return 0
        for key, _ in self.selector.select(wait):
            data = os.read(key.fd, _CHUNK)
            if not data:
                self.selector.unregister(key.fileobj)
            self.echo(self.decoder.decode(data, final=not data))
            return len(data)
        return 0

    def drain(self) -> None:
        """Echo what the script wrote before it ended, even where a process it left behind keeps the output open."""
        total = 0
        while total < _PIPE and (count := self.pump(0)):
            total += count
        self.echo(self.decoder.decode(b"", final=True))

    def end(self, first: int) -> None:
        """Send the script and all it started the signal `first`, after `GRACE` seconds SIGKILL; echo meanwhile."""
        for number in (first, signal.SIGKILL):
            deadline = time.monotonic() + GRACE
            members = self._members()
            _send(members, number)
            while members and time.monotonic() < deadline:
                self.pump(_POLL)
                members = self._members()
                if number == signal.SIGKILL:    # a process forked between the look and the signal
                    _send(members, number)

    def close(self) -> None:
        """Give the pipe back."""
        self.selector.close()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _members(self) -> list[int]:
        """Return the processes of the script's session, its descendants, and those that carry its mark.

        Zombies have ended. A descendant is known from the first look on, also when its parent is gone.
        """
        self.process.poll()
        leader = self.process.pid
        if not Path("/proc/self/stat").exists():
            with suppress(OSError):
                os.killpg(leader, 0)
                return [-leader]
            return []
        living = {int(entry.name): stat for entry in os.scandir("/proc") if entry.name.isdigit()
                  and (stat := _stat(entry.path)) is not None}
        self.family = {pid: start for pid, start in self.family.items() if pid in living and living[pid][2] == start}
        size = -1
        while size != len(self.family):
            size = len(self.family)
            self.family.update({pid: start for pid, (parent, _, start) in living.items()
                                if pid == leader or parent == leader or parent in self.family})
        return [pid for pid, (_, session, _) in living.items()
                if session == leader or pid in self.family or self._is_marked(pid)]

    def _is_marked(self, pid: int) -> bool:
        """Tell whether a process carries the script's mark in its environment."""
        try:
            return self.token in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:    # ended meanwhile, or somebody else's
            return False


def _stat(folder: str) -> tuple[int, int, str] | None:
    """Return parent, session and start time of the process of a folder in /proc; None if it has ended."""
    try:
        # The name in brackets may itself hold brackets and spaces; the fields follow it.
        fields = Path(folder, "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else (int(fields[1]), int(fields[3]), fields[19].decode())


def _send(members: list[int], number: int) -> None:
    for member in members:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(member, number)


def _silent(text: str) -> None:
    """Drop text: its reader is gone."""


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP where they have their default meaning; other threads cannot."""
    caught: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: handler for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
                  if (handler := signal.getsignal(number)) in (signal.SIG_DFL, signal.default_int_handler)}
    try:
        for number in before:
            signal.signal(number, lambda came, frame: caught.append(came))
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
