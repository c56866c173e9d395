"""What the commands of `mindpet-lite` are made of: their options, what they print, and how a signal ends them."""
from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from mindpet_lite.endings import ended_by_signals
from mindpet_lite.formats.folder import refuse_filled
from mindpet_lite.tasks.process import echo

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


class Place(click.Path):
    """A path that names something: an empty one would mean the working directory."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the path, having refused an empty one."""
        if value == "":
            self.fail("an empty path names nothing.", parameter, context)
        return super().convert(value, parameter, context)


class NewFolder(Place):
    """A path for a directory that a command makes."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """Return the path, having refused one where there is something."""
        path = super().convert(value, parameter, context)
        try:
            refuse_filled(path)
        except OSError as error:
            self.fail(str(error), parameter, context)
        return path


class FileCommand(click.Command):
    """A command that removes what it has begun where a signal ends it."""

    def invoke(self, context: click.Context) -> Any:
        """Call the command."""
        with ended_by_signals(str(context.info_name)):
            return super().invoke(context)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Show warnings as the errors of the command line are shown."""
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        sys.stderr.write(f"mindpet-lite: {message}\n")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def tell(text: str, report: Mapping[str, Any], as_json: bool) -> None:
    """Print what was done, as text for people or as JSON."""
    echo(json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n" if as_json else text)
