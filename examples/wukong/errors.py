"""Users' errors in one place: one sentence on stderr, exit code 2, no traceback."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

LONGEST = 700


class UserError(Exception):
    """Something the user can mend; the text is one sentence that says how."""


class Stopped(Exception):
    """A signal ended the work after what was done was saved; the text says where.

    Args:
        text: One sentence.
        code: The exit code.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def sentence(error: BaseException) -> str:
    """What an error says, on one line and not without end."""
    text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


@contextlib.contextmanager
def explained(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Inside the block, errors of these kinds become users' errors: "what: their text"."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{what}: {sentence(error)}") from error


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors look like all others."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Ends the script with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def run_script(script: str, function: Callable[[], object], *kinds: type[Exception]) -> int:
    """Runs a script's work and returns its exit code: 0, or 2 after an error that the user can mend.

    Args:
        script: The script's name, for the message.
        function: The work.
        kinds: What counts as a user's error besides UserError and OSError; anything else is a bug and keeps its trace.
    """
    try:
        function()
    except (UserError, OSError, *kinds) as error:
        print(f"{script}: error: {sentence(error)}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"{script}: {stopped}", file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        return 130
    return 0
