"""What a path must be before a task starts, in plain words."""
from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from mindpet_lite.tasks.options import Option

# MindPet's: the owner may do all, the group may not write, others nothing.
_STRICT_MODE = 0o750


def absolute(name: str, path: object) -> Path:
    """Return `path` as an absolute path, links kept.

    Raises:
        TypeError: `path` is no path.
        ValueError: it is empty or holds a NUL character.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise TypeError(f"{name} must be a path, but got {path!r:.100} of type {type(path).__name__}.")
    text = os.fspath(path)
    if not text or "\0" in text:
        raise ValueError(f"{name} must be a path, but got {text!r:.100}.")
    return Path(text).absolute()


def problems_of(name: str, path: Path, option: Option, links_allowed: bool) -> Iterator[Exception]:
    """Yield an error for each of these that `path` is not: there, free of links if asked, of its kind, accessible."""
    link = None if links_allowed else _first_link(path)
    if link is not None:
        yield ValueError(f"{name}: {link} is a symlink, which strict and no-follow forbid; give the path without "
                         f"links, {os.path.realpath(path)}.")
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        where = f"{path} is a link to {os.path.realpath(path)}, which" if path.is_symlink() else path
        yield FileNotFoundError(f"{name}: {where} does not exist; check the path.")
        return
    except OSError as error:
        yield type(error)(f"{name}: {path} cannot be looked up: {error.strerror}.")
        return
    is_folder, is_file = stat.S_ISDIR(mode), stat.S_ISREG(mode)
    if option.writable and not is_folder:
        yield NotADirectoryError(f"{name} must be a folder, but {path} is none.")
    elif option.suffixes and not (is_file and path.name.endswith(option.suffixes)):
        yield ValueError(f"{name} must be a {' or '.join(option.suffixes)} file, but {path} is "
                         f"{'a folder' if is_folder else 'none'}.")
    elif not (is_folder or is_file):
        yield ValueError(f"{name} must be a folder or a file, but {path} is neither.")
    needed = os.W_OK if option.writable else os.R_OK
    if not os.access(path, needed | (os.X_OK if is_folder else 0)):
        yield PermissionError(f"{name}: you may not {'write to' if option.writable else 'read'} {path}; change its "
                              f"mode or ask its owner.")


def risks_of(name: str, path: Path) -> Iterator[PermissionError]:
    """Yield an error if `path` exists and belongs to somebody else, or is open to more than strict allows."""
    try:
        status = path.stat()
    except OSError:
        return
    if status.st_uid != os.geteuid():
        yield PermissionError(f"{name}: {path} belongs to user {status.st_uid}, not to you ({os.geteuid()}), which "
                              f"strict forbids.")
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o777 & ~_STRICT_MODE:
        yield PermissionError(f"{name}: {path} has mode {mode:o}, but strict allows {_STRICT_MODE:o} at most; call "
                              f"chmod {mode & _STRICT_MODE:o}.")


def loops_of(paths: dict[str, Path]) -> Iterator[ValueError]:
    """Yield an error for each input that `output_path` equals or lies in."""
    output = Path(os.path.realpath(paths["output_path"]))
    for name in ("data_path", "pretrained_model_path", "ckpt_path"):
        if name in paths and Path(os.path.realpath(paths[name])) in (output, *output.parents):
            yield ValueError(f"output_path: {paths['output_path']} is or lies in {name} ({paths[name]}), which strict "
                             f"forbids.")


def _first_link(path: Path) -> Path | None:
    """Return the first part of an absolute path that is a link, or None."""
    return next((part for part in (*reversed(path.parents), path) if part.is_symlink()), None)
