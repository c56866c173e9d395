"""A new directory that is there with all its files or not at all."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mindpet_lite.formats.atomic import _explained, _folder_for, _work_folder


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Give a directory to fill; when the block ends well, it becomes `path`.

    What was written is not forced to the disk, which can take longer than all else: after a crash of the system, unlike
    one of this process, it may have to be made again from what it was made of.

    Raises:
        FileExistsError: `path` holds something already, or is the working directory.
        OSError: the directory cannot be written, or the disk is full.
    """
    refuse_filled(path)
    target = Path(os.path.realpath(path))
    with _explained(path), _folder_for(target), _work_folder(target.parent, target.name) as folder:
        # One level further down: who writes into it locks the folder that it is in, which is locked here already.
        new = folder / "new" / target.name
        new.mkdir(parents=True)
        yield new
        os.rename(new, target)


def refuse_filled(path: Path) -> None:
    """Refuse a place for a new directory where there is something already.

    Raises:
        FileExistsError: `path` holds something, or is the working directory.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: give a directory that is empty or not there yet.")
    if path.exists() and (any(path.iterdir()) or path.samefile(".")):
        raise FileExistsError(f"{path} holds something already, or is where you are: give a directory that is empty "
                              f"or not there yet.")
