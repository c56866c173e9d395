"""The options of a task: their names, what they must point to, and how a timeout is spelt."""
from __future__ import annotations

import re
from dataclasses import dataclass

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_TIMEOUT = re.compile("".join(f"(?:([0-9]{{1,9}}){unit})?" for unit in _UNITS))


@dataclass(frozen=True)
class Option:
    """One option: the letters of its short spelling, its help, and for a path what it must be.

    Args:
        short: short spelling without the dash; none if empty.
        help: what the command line shows.
        suffixes: the path must be a file whose name ends with one of them; empty: a folder or any file.
        writable: the path must be a folder to write into.
    """

    short: str
    help: str
    suffixes: tuple[str, ...] = ()
    writable: bool = False


PATHS = {
    "data_path": Option("dp", "Folder or file of the data."),
    "output_path": Option("op", "Folder that exists; every run makes a new folder MINDPET_<ID> in it.", writable=True),
    "boot_file_path": Option("bp", "Your Python script (.py).", suffixes=(".py",)),
    "model_config_path": Option("mc", "YAML file with params (flags for the script), freeze and pet_config.",
                                (".yaml", ".yml")),
    "pretrained_model_path": Option("pm", "Folder or file of the pretrained model."),
    "ckpt_path": Option("cp", "Folder or file of the checkpoint."),
}
SETTINGS = {
    "timeout": Option("t", "End the script and its children after this time: 1d2h, 30m, 1h30m, 45s."),
    "quiet": Option("q", "Print only the script's output, the result and errors; ask for nothing: with --strict, "
                         "an owner or mode that it forbids is then a warning, except for the script."),
    "strict": Option("", "MindPet's rules: absolute paths, yours, mode 750 at most, no link, output not inside an "
                         "input."),
    "no_follow": Option("", "Refuse symlinks anywhere in a path; they are followed otherwise."),
}
# The script gets the YAML file with a `freeze` or `pet_config` block under this name.
FREEZE_FLAG = "advanced_config"
# MindPet's options: `params` must not hold them. Its other names are free, for the script never sees ours.
RESERVED = {FREEZE_FLAG} | {name for long, option in {**PATHS, **SETTINGS}.items() if option.short
                            for name in (long, option.short)}


def seconds_of(timeout: str | None) -> int | None:
    """Return the seconds that `1d2h`, `30m`, `1h30m` or `45s` stands for; None for None.

    Raises:
        TypeError: `timeout` is no text.
        ValueError: it is spelt otherwise, or comes to nothing.
    """
    if timeout is None:
        return None
    if not isinstance(timeout, str):
        raise TypeError(f"timeout must be text such as '1d2h' or '30m', but got {timeout!r:.100} of type "
                        f"{type(timeout).__name__}.")
    match = _TIMEOUT.fullmatch("".join(timeout.split()).lower())
    total = sum(int(count or 0) * unit for count, unit in zip(match.groups(), _UNITS.values())) if match else 0
    if not total:
        raise ValueError(f"timeout must be days, hours, minutes and seconds, in this order and more than none, such "
                         f"as 1d2h, 30m or 45s, but got {timeout!r:.100}.")
    return total
