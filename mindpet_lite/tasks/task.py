"""finetune, evaluate and infer: check, start the user's script, keep what it wrote, read its result."""
from __future__ import annotations

import json
import os
import signal
import sys
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mindpet_lite.arguments import check_bool
from mindpet_lite.tasks.options import PATHS, seconds_of
from mindpet_lite.tasks.params import flags_of
from mindpet_lite.tasks.paths import absolute, loops_of, problems_of, risks_of
from mindpet_lite.tasks.process import Ending, run_script

_RESULT_FILES = {"evaluate": "eval_result.json", "infer": "infer_result.json"}
_PathLike = str | os.PathLike[str]


class TaskResult(int):
    """The exit code of the user's script, an int (0 is success), with what else the task came to.

    Args:
        exit_code: the script's; 128 + n if signal n ended it, as a shell says it.
        output_path: the folder that the script was given to write to.
        result: what the script wrote to `eval_result.json` or `infer_result.json`; None for finetune and failures.
            Default: None.

    Examples:
        >>> from pathlib import Path
        >>> from mindpet_lite.tasks import TaskResult
        >>> result = TaskResult(0, Path("out"), {"accuracy": 0.5})
        >>> result == 0, result.result
        (True, {'accuracy': 0.5})
    """

    output_path: Path
    result: Any

    def __new__(cls, exit_code: int, output_path: Path, result: Any = None) -> TaskResult:
        """Make the int and give it what else the task came to."""
        outcome = super().__new__(cls, exit_code)
        outcome.output_path, outcome.result = output_path, result
        return outcome

    @property
    def exit_code(self) -> int:
        """The exit code as a plain int."""
        return int(self)

    def __repr__(self) -> str:
        return f"TaskResult(exit_code={int(self)}, output_path={str(self.output_path)!r}, result={self.result!r})"


def finetune(data_path: _PathLike, output_path: _PathLike, boot_file_path: _PathLike,
             pretrained_model_path: _PathLike | None = None, model_config_path: _PathLike | None = None,
             timeout: str | None = None, *, quiet: bool = False, strict: bool = False,
             no_follow: bool = False) -> TaskResult:
    """Run your training script.

    The script runs under this Python and gets `--output_path <new folder> --data_path ...`, where given
    `--pretrained_model_path ...`, the entries of the config's `params` as flags, and for a `freeze` or
    `pet_config` block `--advanced_config <config>`. Its output is written to `sys.stdout` as it comes.

    Args:
        data_path: folder or file of the data.
        output_path: folder that exists; every run makes a new folder `MINDPET_<ID>` in it.
        boot_file_path: your script (.py).
        pretrained_model_path: folder or file of the pretrained model. Default: None.
        model_config_path: YAML file with `params`, `freeze` and `pet_config`, or MindFormers' own configuration.
            Default: None.
        timeout: end the script and its children after this time: `1d2h`, `30m`, `45s`. Default: None.
        quiet: no notes of our own; with `strict`, warn of owners and modes instead of refusing, but for the script.
            Default: False.
        strict: MindPet's rules: absolute paths, yours, mode 750 at most, no link, output not inside an input.
            Default: False.
        no_follow: refuse symlinks anywhere in a path. Default: False.

    Raises:
        OSError, ValueError, TypeError: a path, the config or the timeout is not as above; nothing was started.
        TimeoutError: the script was ended at its timeout; what it wrote stays, marked UNFINISHED.

    Examples:
        >>> from pathlib import Path
        >>> from mindpet_lite import tasks
        >>> _ = Path("data").mkdir(), Path("out").mkdir()
        >>> _ = Path("train.py").write_text("print('trained')")
        >>> result = tasks.finetune("data", "out", "train.py", quiet=True)
        trained
        >>> result.exit_code
        0
    """
    paths = {"data_path": data_path, "output_path": output_path, "boot_file_path": boot_file_path,
             "pretrained_model_path": pretrained_model_path, "model_config_path": model_config_path}
    return _run("finetune", paths, ("params", "freeze"), timeout, quiet, strict, no_follow)


def evaluate(data_path: _PathLike, ckpt_path: _PathLike, output_path: _PathLike, boot_file_path: _PathLike,
             model_config_path: _PathLike | None = None, timeout: str | None = None, *, quiet: bool = False,
             strict: bool = False, no_follow: bool = False) -> TaskResult:
    """Run your evaluation script and return what it wrote to `eval_result.json` in its output folder.

    Args:
        data_path: folder or file of the data.
        ckpt_path: folder or file of the checkpoint, which the script gets as `--ckpt_path`.
        output_path: folder that exists; every run makes a new folder `MINDPET_<ID>` in it.
        boot_file_path: your script (.py).
        model_config_path: YAML file with `params` and `pet_config`. Default: None.
        timeout: end the script and its children after this time: `1d2h`, `30m`, `45s`. Default: None.
        quiet: no notes of our own; with `strict`, warn of owners and modes instead of refusing, but for the script.
            Default: False.
        strict: MindPet's rules: absolute paths, yours, mode 750 at most, no link, output not inside an input.
            Default: False.
        no_follow: refuse symlinks anywhere in a path. Default: False.

    Raises:
        OSError, ValueError, TypeError: as `finetune`; or the script succeeded but its result is missing or no JSON.
        TimeoutError: the script was ended at its timeout; a result it began is renamed to `eval_result.json.partial`.

    Examples:
        >>> from pathlib import Path
        >>> from mindpet_lite import tasks
        >>> _ = Path("data").mkdir(), Path("out").mkdir(), Path("net.ckpt").touch()
        >>> write = "import sys; open(sys.argv[2] + '/eval_result.json', 'w').write('[0.5]')"
        >>> _ = Path("evaluate.py").write_text(write)
        >>> tasks.evaluate("data", "net.ckpt", "out", "evaluate.py", quiet=True).result
        [0.5]
    """
    paths = {"data_path": data_path, "ckpt_path": ckpt_path, "output_path": output_path,
             "boot_file_path": boot_file_path, "model_config_path": model_config_path}
    return _run("evaluate", paths, ("params",), timeout, quiet, strict, no_follow)


def infer(data_path: _PathLike, ckpt_path: _PathLike, output_path: _PathLike, boot_file_path: _PathLike,
          model_config_path: _PathLike | None = None, timeout: str | None = None, *, quiet: bool = False,
          strict: bool = False, no_follow: bool = False) -> TaskResult:
    """Run your inference script and return what it wrote to `infer_result.json`; all else is as in `evaluate`.

    Args:
        data_path: folder or file of the data.
        ckpt_path: folder or file of the checkpoint, which the script gets as `--ckpt_path`.
        output_path: folder that exists; every run makes a new folder `MINDPET_<ID>` in it.
        boot_file_path: your script (.py).
        model_config_path: YAML file with `params` and `pet_config`. Default: None.
        timeout: end the script and its children after this time: `1d2h`, `30m`, `45s`. Default: None.
        quiet: no notes of our own; with `strict`, warn of owners and modes instead of refusing, but for the script.
            Default: False.
        strict: MindPet's rules: absolute paths, yours, mode 750 at most, no link, output not inside an input.
            Default: False.
        no_follow: refuse symlinks anywhere in a path. Default: False.

    Examples:
        >>> from pathlib import Path
        >>> from mindpet_lite import tasks
        >>> _ = Path("data").mkdir(), Path("out").mkdir(), Path("net.ckpt").touch()
        >>> write = "import sys; open(sys.argv[2] + '/infer_result.json', 'w').write('[7]')"
        >>> _ = Path("infer.py").write_text(write)
        >>> tasks.infer("data", "net.ckpt", "out", "infer.py", quiet=True).result
        [7]
    """
    paths = {"data_path": data_path, "ckpt_path": ckpt_path, "output_path": output_path,
             "boot_file_path": boot_file_path, "model_config_path": model_config_path}
    return _run("infer", paths, ("params",), timeout, quiet, strict, no_follow)


class _Folder:
    """The output folder of one run: `<name>.running` beside it while it runs, `UNFINISHED` in it if it failed."""

    def __init__(self, parent: Path):
        self.path = parent / f"MINDPET_{uuid.uuid4().hex.upper()}"
        self.running = self.path.with_name(f"{self.path.name}.running")
        self.path.mkdir(mode=0o750)
        self.running.write_text(f"Process {os.getpid()} runs the script that writes to {self.path.name}. If there is "
                                f"no such process, the script did not finish.\n", encoding="utf-8")

    def finished(self) -> None:
        self.running.unlink(missing_ok=True)

    def unfinished(self, reason: str, result_file: str | None) -> None:
        """Say in the folder why it is not complete, and take the name of a result from what may be half of one."""
        with suppress(OSError):    # a full disk or a removed folder must not hide the reason
            self.running.write_text(f"{reason}\n", encoding="utf-8", errors="backslashreplace")
            os.replace(self.running, self.path / "UNFINISHED")
        if result_file is not None:
            with suppress(OSError):
                os.replace(self.path / result_file, self.path / f"{result_file}.partial")


def _run(task: str, given: Mapping[str, _PathLike | None], blocks: tuple[str, ...], timeout: str | None, quiet: bool,
         strict: bool, no_follow: bool) -> TaskResult:
    """Check everything, run the script, and settle what it left."""
    paths, config_flags, seconds = _checked(given, blocks, timeout, quiet, strict, no_follow)
    result_file = _RESULT_FILES.get(task)
    folder = _Folder(paths["output_path"])
    inputs = [name for name in ("pretrained_model_path", "data_path", "ckpt_path") if name in paths]
    # The task's own flags come last: argparse takes the last of two.
    command = [sys.executable, str(paths["boot_file_path"]), *config_flags, "--output_path", str(folder.path),
               *(text for name in inputs for text in (f"--{name}", str(paths[name])))]
    _note(f"{task} writes to {folder.path}", quiet)
    try:
        ending = run_script(command, seconds)
        reason = _reason(task, ending, timeout)
        result = _read_result(folder.path / result_file) if result_file and not reason else None
    except BaseException as error:
        folder.unfinished(f"{task} was broken off: {error or type(error).__name__}", result_file)
        raise
    if not reason:
        folder.finished()
        return TaskResult(0, folder.path, result)
    folder.unfinished(reason, result_file)
    reason += f"; what it wrote is in {folder.path}, marked UNFINISHED."
    if ending.signal is not None:
        _note(reason, quiet)
        _die_of(ending.signal)
    if ending.timed_out:
        raise TimeoutError(reason)
    _note(reason, quiet)
    return TaskResult(ending.exit_code if ending.exit_code > 0 else 128 - ending.exit_code, folder.path)


def _checked(given: Mapping[str, _PathLike | None], blocks: tuple[str, ...], timeout: str | None, quiet: bool,
             strict: bool, no_follow: bool) -> tuple[dict[str, Path], list[str], int | None]:
    """Return the absolute paths, the config's flags and the seconds, or raise one error that says all problems."""
    for name, flag in (("quiet", quiet), ("strict", strict), ("no_follow", no_follow)):
        check_bool(name, flag)
    problems: list[Exception] = []
    paths: dict[str, Path] = {}
    flags: list[str] = []
    seconds = None
    for name, path in given.items():
        if path is None and name in ("pretrained_model_path", "model_config_path"):
            continue
        try:
            paths[name] = absolute(name, path)
        except (TypeError, ValueError) as error:
            problems.append(error)
            continue
        if strict and paths[name] != Path(path or ""):
            problems.append(ValueError(f"{name} must be absolute with strict, but got {path}."))
        problems += problems_of(name, paths[name], PATHS[name], links_allowed=not (strict or no_follow))
        for risk in risks_of(name, paths[name]) if strict else ():
            if quiet and name != "boot_file_path":
                _note(f"warning: {risk}", quiet=False)
            else:
                problems.append(risk)
    if strict and "output_path" in paths:
        problems += loops_of(paths)
    try:
        seconds = seconds_of(timeout)
    except (TypeError, ValueError) as error:
        problems.append(error)
    if not problems and "model_config_path" in paths:
        flags = flags_of(paths["model_config_path"], blocks)
    if problems:
        kinds = {type(problem) for problem in problems}
        raise (kinds.pop() if len(kinds) == 1 else ValueError)(" ".join(map(str, problems)))
    return paths, flags, seconds


def _reason(task: str, ending: Ending, timeout: str | None) -> str:
    """Return why a script did not finish, or nothing if it did."""
    if ending.signal is not None:
        return f"{task} was ended by {signal.Signals(ending.signal).name} sent to its caller"
    if ending.timed_out:
        return f"{task} did not end within its timeout of {timeout} and was ended"
    if ending.exit_code < 0:
        return f"{task} was ended by {signal.strsignal(-ending.exit_code)} (signal {-ending.exit_code})"
    return f"{task} failed with exit code {ending.exit_code}" if ending.exit_code else ""


def _read_result(path: Path) -> Any:
    """Return the JSON value that a script wrote."""
    if not path.is_file():
        raise FileNotFoundError(f"The script succeeded but wrote no {path.name} to {path.parent}.")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The script succeeded but {path.name} in {path.parent}, now {path.name}.partial, is no valid "
                         f"JSON: {error}.") from error


def _note(text: str, quiet: bool) -> None:
    """Write a line of our own; standard output belongs to the script."""
    if not quiet and sys.stderr is not None:
        sys.stderr.write(f"mindpet-lite: {text}\n")
        sys.stderr.flush()


def _die_of(number: int) -> None:
    """Do what the signal would have done to the caller had there been no task."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    os.kill(os.getpid(), number)
