"""Writing files so that a process killed at any moment leaves what was there or what it wrote, never a mixture."""
from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from mindpet_lite.formats.files import open_regular

# Where two folders cannot change places: the folder, inside the one written to, that holds the files of a save from
# the moment it counts until each of them has taken its place.
_COMMITTED = ".saved"
# The file by which a work folder is known for ours; a folder of the user's may have any name.
_MARK = "mindpet_lite-saving"
_TRIES = 100
_ALL_THE_TIME = "{} is being written to all the time: wait until that is over and read it again."
_HERE, _EXCHANGE = -100, 2


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give the path of a file to write; when the block ends well, it takes the place of `path`.

    Raises:
        OSError: the directory cannot be made or written to, or the disk is full; `path` is as before.
    """
    with _explained(path), _folder_for(path):
        _refuse_directory(path)
        # A folder, because some writers leave files of their own beside a file they could not finish.
        with _work_folder(path.parent, path.name) as folder:
            temporary = folder / path.name
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)


def write_together(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files that belong together: at any moment the directory holds all of the old ones or all of the new ones.

    A directory with the new files and links to the others of the old one takes the old one's place in a single step.
    That needs Linux, a file system that can do it, and a directory that is no mount point, nobody else's, not the
    working directory, and without directories in it. Elsewhere the new files are put into a folder ``.saved`` inside,
    whole, and then take their places one after the other; `open_together` reads them from ``.saved`` until they have.

    Several processes may write to one directory at a time: each waits until the one before it is done.

    Args:
        directory: made if missing; a link to a directory is followed.
        files: contents by name.

    Raises:
        OSError: as `atomic_file`.
    """
    with _explained(directory):
        target = Path(os.path.realpath(directory))
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(f"there is a file at {target}")
        for name in files:
            _refuse_directory(target / name)
        with _folder_for(target), _one_at_a_time(target.parent):
            if not _change_places(target, files):
                _replace_one_by_one(target, files)


@contextlib.contextmanager
def open_together(directory: Path, names: Iterable[str]) -> Iterator[dict[str, BinaryIO]]:
    """Open files of a directory that `write_together` may be writing to: all are of one and the same save.

    Raises:
        OSError: a file is missing or cannot be read, or the directory is written to all the time.
    """
    names = list(names)
    for _ in range(_TRIES):
        with contextlib.ExitStack() as stack:
            places = _places(directory, names)
            try:
                found = {name: stack.enter_context(open_regular(places[name])) for name in names}
                whole = places == _places(directory, names) and all(
                    os.path.samestat(os.fstat(found[name].fileno()), os.stat(places[name])) for name in names)
            except FileNotFoundError:
                if places == _places(directory, names) and not all(place.exists() for place in places.values()):
                    raise
                continue
            if whole:
                yield found
                return
    raise OSError(_ALL_THE_TIME.format(directory))


def names_in(directory: Path) -> set[str]:
    """Return the names of the files of a directory, as `open_together` finds them.

    Raises:
        OSError: it cannot be read, or is written to all the time.
    """
    for _ in range(_TRIES):
        committed: list[str] = []
        # First, for files leave it for the directory.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            committed = os.listdir(directory / _COMMITTED)
        with _opened(directory) as handle:
            # Those of the directory that was opened: it may have lost its place, and its files, since.
            names = {entry.name for entry in os.scandir(handle) if entry.is_file()}
            if os.path.samestat(os.fstat(handle), os.stat(directory)):
                return {*committed, *names}
    raise OSError(_ALL_THE_TIME.format(directory))


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[int]:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield handle
    finally:
        os.close(handle)


def _places(directory: Path, names: Iterable[str]) -> dict[str, Path]:
    """Return where the files of the last save that counts are."""
    committed = directory / _COMMITTED
    return {name: committed / name if (committed / name).exists() else directory / name for name in names}


def _change_places(target: Path, files: Mapping[str, bytes]) -> bool:
    """Put a directory with the new files in the place of `target`; return False where that cannot be done."""
    if not _replaceable(target):
        return False
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(_work_folder(target.parent, target.name))
        except OSError:
            # The directory can be written to, the one that holds it cannot.
            return False
        new = folder / target.name
        new.mkdir()
        _write(new, files)
        is_new = not target.exists()
        try:
            if is_new:
                os.rename(new, target)
            else:
                _take_over(target, new, files)
                _exchange(new, target)
        except OSError:
            return False
        _sync(target.parent)
        # What others put there since.
        for entry in () if is_new else os.scandir(new):
            if entry.name not in files and not os.path.lexists(target / entry.name):
                os.rename(entry.path, target / entry.name)
        return True


def _replaceable(target: Path) -> bool:
    """Return whether nobody would miss the directory itself if another took its place."""
    if not target.exists():
        return True
    return (os.access(target, os.R_OK | os.W_OK | os.X_OK) and not os.path.ismount(target)
            and not os.path.samestat(os.stat(target), os.stat("."))
            and not any(entry.is_dir(follow_symlinks=False) for entry in os.scandir(target)))


def _take_over(old: Path, new: Path, files: Iterable[str]) -> None:
    """Give `new` the owner and mode of `old`, and links to its files other than `files`."""
    status = os.stat(old)
    if (status.st_uid, status.st_gid) != (os.stat(new).st_uid, os.stat(new).st_gid):
        os.chown(new, status.st_uid, status.st_gid)
    for entry in os.scandir(old):
        if entry.name not in files:
            os.link(entry.path, new / entry.name, follow_symlinks=False)
    shutil.copystat(old, new)
    _sync(new)


def _exchange(one: Path, other: Path) -> None:
    """Let two paths change places in one step: Linux's renameat2."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError as error:
        raise OSError("this system cannot let two folders change places") from error
    if renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _replace_one_by_one(target: Path, files: Mapping[str, bytes]) -> None:
    with _folder_for(target / _COMMITTED), _work_folder(target, "save") as folder:
        new = folder / "new"
        new.mkdir()
        _write(new, files)
        # A save that was killed after it counted comes first.
        _settle(target, folder / "earlier")
        os.rename(new, target / _COMMITTED)
        _sync(target)
        _settle(target, folder / "done")


def _settle(target: Path, done: Path) -> None:
    """Let the files of a save that counts take their places; `done` is where their folder goes in the end."""
    committed = target / _COMMITTED
    if not committed.is_dir():
        return
    for path in committed.iterdir():
        link = done.parent / path.name
        try:
            os.link(path, link)
        except OSError:
            shutil.copyfile(path, link)
            _sync(link)
        os.replace(link, target / path.name)
    _sync(target)
    os.rename(committed, done)


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)
        _sync(folder / name)
    _sync(folder)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep other processes out of this block for the same folder; the lock ends with the process."""
    with contextlib.ExitStack() as stack:
        # Not every folder may be read, and not every network file system has locks.
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _work_folder(parent: Path, name: str) -> Iterator[Path]:
    """Give a new folder in `parent` that is gone after the block, and remove those that killed processes left.

    A lock on the folder tells the two apart: it ends with the process.
    """
    prefix = f".{name}.saving-"
    for entry in os.scandir(parent):
        if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False):
            _remove_left_over(Path(entry.path))
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.exists():
                (folder / _MARK).touch()
                break
            os.close(handle)
        # Another process took it for left over before it was locked.
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


@contextlib.contextmanager
def _folder_for(path: Path) -> Iterator[None]:
    """Make the directories above `path`; where the block fails, those that are new and empty are removed again."""
    new = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in new:
                folder.rmdir()
        raise


def _remove_left_over(folder: Path) -> None:
    """Remove a folder that carries our mark, or is empty, if no process has it locked."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (folder / _MARK).exists():
                shutil.rmtree(folder, ignore_errors=True)
            else:
                folder.rmdir()
        finally:
            os.close(handle)


def _refuse_directory(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"there is a directory at {path}")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say in an OSError of the block what could not be written and what to do."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"{path} could not be written ({error.strerror or error}): check that the disk has space "
                          f"and that the folder can be written to. What was there is unchanged.") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
