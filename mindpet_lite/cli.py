"""`mindpet-lite`: hands the arguments to the commands and turns errors into one sentence and an exit code."""
from __future__ import annotations

import sys
from collections.abc import Sequence

from mindpet_lite.endings import Ended
from mindpet_lite.formats.problems import first_of

USER_ERROR, TIMED_OUT, INTERRUPTED = 2, 124, 130
# Of an error: room for a sentence, the problems that the tools list, and how many more there are.
_LINES = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mindpet-lite` and return its exit code.

    The code is that of the user's script for `run`; 2 for an error in what was asked; 124 at a timeout, as timeout(1);
    130 after Ctrl-C; 128 + n where signal n ended it (129 for SIGHUP, 143 for SIGTERM).
    """
    try:
        import click
    except ModuleNotFoundError:
        return _fail("the command line needs click, which is not installed; call: pip install 'click>=8'", USER_ERROR)
    from mindpet_lite.commands import mindpet_lite
    try:
        # Without standalone mode click returns what a command returns, and leaves errors to us.
        return mindpet_lite.main(arguments, prog_name="mindpet-lite", standalone_mode=False) or 0
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "mindpet-lite"
        return _fail(f"{error.format_message().rstrip('.')}; see {where} --help.", USER_ERROR)
    except TimeoutError as error:
        return _fail(str(error), TIMED_OUT)
    except (OSError, ValueError) as error:
        return _fail(first_of(error, _LINES), USER_ERROR)
    except Ended as error:
        return _fail(str(error), error.exit_code)
    except click.Abort:
        return INTERRUPTED


def _fail(sentence: str, code: int) -> int:
    sys.stderr.write(f"mindpet-lite: {' '.join(line.strip() for line in sentence.splitlines())}\n")
    return code
