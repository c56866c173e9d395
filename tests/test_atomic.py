"""Writes that are killed, fail or meet odd folders: what was there stays, or what was written is there, as a whole."""
from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mindpet_lite.formats import atomic
from mindpet_lite.formats.atomic import atomic_file, open_together, write_together

OLD, NEW = {"one": b"old", "two": b"old" * 10}, {"one": b"new", "two": b"new" * 7}
SAVING = Path(__file__).with_name("saving.py")


@pytest.fixture(params=["in one step", "in place"])
def adapter(request) -> Path:
    """A folder with the old files, either such that another can take its place or such that none can."""
    folder = Path("adapter")
    write_together(folder, OLD)
    if request.param == "in place":
        Path("adapter/below").mkdir()
    return folder


def held(folder: Path) -> dict[str, bytes]:
    with open_together(folder, OLD) as files:
        return {name: file.read() for name, file in files.items()}


def everything(folder: str = ".") -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*")}


# Killed

@pytest.mark.parametrize("what, number", [("random", 100), ("lines", 0), ("lines in place", 0), ("read", 50),
                                          ("read in place", 50)])
def test_killed_and_interrupted_saves_leave_the_old_adapter_or_the_new_one(what, number):
    result = subprocess.run([sys.executable, str(SAVING), what, str(number)], capture_output=True, text=True,
                            timeout=300)
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout)
    if what == "random":
        assert counts["killed"] == 100 and counts["old"] > 5 and counts["new"] > 0
    elif "read" not in what:
        assert counts["first old"] > 20 and counts["old"] > 50 and counts["new"] > 10


def test_what_a_killed_save_left_is_gone_after_the_next_and_a_living_ones_is_not(adapter):
    parent = Path(".") if not Path("adapter/below").exists() else adapter
    dead, living = (parent / f".{'adapter' if parent == Path('.') else 'save'}.saving-{name}" for name in ("a", "b"))
    for folder in (dead, living):
        shutil.copytree("adapter", folder / "adapter")
        (folder / atomic._MARK).touch()
    handle = os.open(living, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    write_together(adapter, NEW)
    assert not dead.exists() and (living / "adapter/one").exists()
    os.close(handle)
    write_together(adapter, NEW)
    assert everything() - {"adapter/below"} == {"adapter", "adapter/one", "adapter/two"}


@pytest.mark.parametrize("make", [
    lambda path: (path.mkdir(), (path / "mine").write_bytes(b"mine")), os.mkfifo,
    lambda path: path.symlink_to("elsewhere"), lambda path: path.write_bytes(b"mine")],
    ids=["folder", "fifo", "link", "file"])
def test_what_is_not_ours_stays_whatever_it_is_called(make):
    for name in (".adapter.saving-notes", ".adapter.saving-abcdefgh", ".one.saving-notes"):
        make(Path(name))
    before = everything()
    write_together(Path("adapter"), OLD)
    write_together(Path("adapter"), NEW)
    with atomic_file(Path("one")) as path:
        path.write_bytes(b"1")
    assert everything() == before | {"adapter", "adapter/one", "adapter/two", "one"}


_WRITER = """
import sys, time
from pathlib import Path
import bare
from mindpet_lite.formats.atomic import atomic_file, open_together, write_together
number, rounds = int(sys.argv[1]), int(sys.argv[2])
for turn in range(rounds):
    text = b"%d %d" % (number, turn)
    write_together(Path("adapter"), {"one": text, "two": text * 50})
    with atomic_file(Path("single")) as path:
        path.write_bytes(text)
    with open_together(Path("adapter"), ("one", "two")) as files:
        one, two = files["one"].read(), files["two"].read()
    assert two == one * 50, (one, two[:20])
"""


@pytest.mark.parametrize("is_new", [True, False])
def test_several_processes_save_to_one_place_at_once(is_new):
    if not is_new:
        write_together(Path("adapter"), OLD)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SAVING.parent), str(SAVING.parents[1])])}
    running = [subprocess.Popen([sys.executable, "-c", _WRITER, str(number), "100"], env=environment,
                                stderr=subprocess.PIPE, text=True) for number in range(4)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert everything() == {"adapter", "adapter/one", "adapter/two", "single"}


def test_a_directory_that_another_process_made_meanwhile_is_written_to(monkeypatch):
    write = atomic._write

    def write_slowly(folder, files):
        write(folder, files)
        if not Path("adapter").exists():
            Path("adapter").mkdir()
            write(Path("adapter"), {**OLD, "mine": b"mine"})

    monkeypatch.setattr(atomic, "_write", write_slowly)
    write_together(Path("adapter"), NEW)
    assert held(Path("adapter")) == NEW and everything() == {"adapter", "adapter/one", "adapter/two", "adapter/mine"}


# Failing

@pytest.mark.parametrize("owner, broken", [(Path, "write_bytes"), (os, "fsync"), (os, "rename"), (os, "replace"),
                                           (os, "link"), (atomic, "_exchange"), (tempfile, "mkdtemp"), (Path, "mkdir"),
                                           (shutil, "copystat")])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_failing_disk_leaves_the_old_files_or_writes_the_new_ones(owner, broken, nth, adapter, monkeypatch):
    Path("adapter/mine").write_bytes(b"mine")
    before, calls, original = everything(), [], getattr(owner, broken)

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, broken, failing)
        try:
            write_together(adapter, NEW)
            expected = NEW
        except OSError as error:
            assert "adapter could not be written (No space left on device): check that" in str(error)
            expected = OLD
    if held(adapter) != expected:
        # The files count, but not each has taken its place yet.
        assert held(adapter) == NEW and Path("adapter/.saved").is_dir()
    write_together(adapter, NEW)
    assert held(adapter) == NEW and everything() == before and Path("adapter/mine").read_bytes() == b"mine"


def as_nobody(work) -> None:
    """Run `work` in a process without the rights of root."""
    child = os.fork()
    if not child:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def open_folder(monkeypatch):
    """A folder that every user can write to."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        monkeypatch.chdir(folder)
        yield
        os.chmod(folder, 0o777)


def test_a_read_only_folder_is_an_error_and_left_as_it_is(open_folder):
    def work():
        write_together(Path("adapter"), OLD)
        os.chmod("adapter", 0o555)
        with pytest.raises(PermissionError, match="adapter could not be written .Permission denied.: check"):
            write_together(Path("adapter"), NEW)
        with pytest.raises(PermissionError, match="could not be written"):
            with atomic_file(Path("adapter/one")):
                pass
        assert held(Path("adapter")) == OLD and everything() == {"adapter", "adapter/one", "adapter/two"}
        os.chmod("adapter", 0o777)

    as_nobody(work)


def test_a_folder_in_one_that_is_read_only_is_written_in_place(open_folder):
    def work():
        Path("outer").mkdir()
        write_together(Path("outer/adapter"), OLD)
        os.chmod("outer", 0o555)
        write_together(Path("outer/adapter"), NEW)
        assert held(Path("outer/adapter")) == NEW and everything("outer") == {"adapter", "adapter/one", "adapter/two"}
        with pytest.raises(PermissionError, match="could not be written"):
            write_together(Path("outer/other"), NEW)
        os.chmod("outer", 0o777)

    as_nobody(work)


def test_a_folder_of_another_user_keeps_its_owner(open_folder):
    if os.geteuid() != 0:
        pytest.skip("only root can give folders to others")
    write_together(Path("adapter"), OLD)
    os.chown("adapter", 65534, 65534)
    write_together(Path("adapter"), NEW)
    assert os.stat("adapter").st_uid == 65534
    os.chown("adapter", 0, 0)
    os.chmod("adapter", 0o777)
    as_nobody(lambda: write_together(Path("adapter"), OLD))
    assert os.stat("adapter").st_uid == 0 and held(Path("adapter")) == OLD


def test_a_full_disk_leaves_the_old_files(adapter):
    def work():
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError, match="adapter could not be written .File too large.: check that the disk"):
            write_together(adapter, {"one": b"new", "two": b"x" * 2000})

    before = everything()
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert held(adapter) == OLD and everything() == before


@pytest.mark.parametrize("owner, broken", [(Path, "write_bytes"), (os, "fsync"), (tempfile, "mkdtemp")])
def test_a_full_disk_leaves_no_new_directories(owner, broken, monkeypatch):
    Path("there").mkdir()
    before = everything()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def file():
        with atomic.atomic_file(Path("there/new/deeper/file")) as temporary:
            temporary.write_bytes(b"half")

    monkeypatch.setattr(owner, broken, full)
    for save in (file, lambda: write_together(Path("there/new/adapter"), NEW),
                 lambda: write_together(Path("new"), NEW)):
        with pytest.raises(OSError, match="No space left on device"):
            save()
        assert everything() == before


# Odd folders

def test_other_files_stay_and_modes_are_kept(adapter):
    Path("adapter/mine").write_bytes(b"mine")
    os.chmod("adapter/mine", 0o640)
    os.symlink("mine", "adapter/link")
    os.chmod(adapter, 0o750)
    umask = os.umask(0o027)
    try:
        write_together(adapter, NEW)
    finally:
        os.umask(umask)
    assert held(adapter) == NEW and Path("adapter/mine").read_bytes() == b"mine"
    assert os.readlink("adapter/link") == "mine"
    assert [stat.S_IMODE(os.stat(path).st_mode) for path in ("adapter", "adapter/mine", "adapter/one")] \
        == [0o750, 0o640, 0o640]


def test_links_to_a_folder_are_followed(adapter):
    os.symlink("adapter", "link")
    write_together(Path("link"), NEW)
    assert os.readlink("link") == "adapter" and held(Path("link")) == held(adapter) == NEW
    os.symlink("missing", "dangling")
    write_together(Path("dangling"), NEW)
    assert held(Path("missing")) == NEW


def test_the_working_directory_stays_the_same(monkeypatch):
    write_together(Path("adapter"), OLD)
    monkeypatch.chdir("adapter")
    for path in (".", "../adapter", Path.cwd()):
        write_together(Path(path), NEW)
        assert set(os.listdir(".")) == {"one", "two"} and Path("one").read_bytes() == b"new"


def test_files_that_others_make_during_a_save_stay(monkeypatch):
    write_together(Path("adapter"), OLD)
    original = atomic._exchange

    def exchange(one, other):
        Path("adapter/late").write_text("late")
        original(one, other)

    monkeypatch.setattr(atomic, "_exchange", exchange)
    write_together(Path("adapter"), NEW)
    assert Path("adapter/late").read_text() == "late" and held(Path("adapter")) == NEW


@pytest.mark.parametrize("name", ["one", "two"])
def test_what_is_no_folder_or_no_file_is_refused(name, adapter):
    Path("file").write_text("mine")
    for place in ("file", "file/adapter", "/dev/null/adapter"):
        with pytest.raises(OSError, match="could not be written"):
            write_together(Path(place), NEW)
    os.remove(adapter / name)
    (adapter / name).mkdir()
    before = everything()
    with pytest.raises(IsADirectoryError, match="there is a directory at"):
        write_together(adapter, NEW)
    assert everything() == before and Path("file").read_text() == "mine"


def test_only_regular_files_are_opened():
    os.mkfifo("one")
    Path("two").write_bytes(b"")
    with pytest.raises(OSError, match="one is no regular file"):
        held(Path("."))


# One file

def test_one_file_is_written_whole_or_not_at_all():
    for content in ("old", "new"):
        with atomic_file(Path("below/file")) as path:
            path.write_text(content)
        assert Path("below/file").read_text() == content
    with pytest.raises(ZeroDivisionError), atomic_file(Path("below/file")) as path:
        path.write_text("half")
        1 / 0  # noqa: B018
    assert Path("below/file").read_text() == "new" and os.listdir("below") == ["file"]


def test_two_files_of_one_folder_can_be_open_at_once():
    with atomic_file(Path("a")) as one, atomic_file(Path("b")) as two, atomic_file(Path("a")) as three:
        for path in (one, two, three):
            path.write_text("x")
    assert set(os.listdir(".")) == {"a", "b"}
