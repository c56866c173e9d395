"""What users can get wrong, in one place: one sentence on stderr, exit code 2, no traceback."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

LONGEST = 700


class UserError(Exception):
    """Something the user can mend; the text is one sentence that says how."""


def sentence(error: BaseException) -> str:
    """What an error says, on one line and not without end."""
    text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors look like all others."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Ends the script with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def run_script(script: str, function: Callable[[], object]) -> int:
    """Runs a script's work and returns its exit code: 0, 2 after a user's error, 130 after Ctrl-C."""
    try:
        function()
    except (UserError, OSError) as error:
        print(f"{script}: error: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        return 130
    return 0
