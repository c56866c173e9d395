"""The pages on the tools show what the commands print, and their Python runs."""
from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from mindpet_lite.cli import main

pytest.importorskip("click")
ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
# Grows with what the configs say, which is not what the page is about.
SIZE = re.compile(r"[\d.]+ kB")
# The last digits of an error of rounding depend on the machine.
ROUNDING = re.compile(r"[\d.]+e-0[78]")


def of_command(line: str) -> str:
    """Return what `mindpet-lite` prints, in this process: MindSpore, which some commands need, takes long to load."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
        warnings.simplefilter("error")
        main(shlex.split(line)[1:])
    return printed.getvalue()


def test_the_page_shows_what_the_commands_print(tmp_path):
    text = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    for name, body in re.findall(r"^```(?:python|yaml)\n# (\S+\.(?:py|yaml))\n(.*?)^```", text, re.S | re.M):
        (tmp_path / name).write_text(body, encoding="utf-8")
    shell = f"python() {{ {sys.executable} \"$@\"; }}\n"
    commands = [pair for console in re.findall(r"^```console\n(.*?)^```", text, re.S | re.M)
                for pair in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", console, re.M)]
    assert len(commands) > 9
    for command, shown in commands:
        output = of_command(command) if command.startswith("mindpet-lite ") else subprocess.run(
            ["bash", "-c", shell + command], cwd=tmp_path, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=120).stdout
        printed, shown = (ROUNDING.sub("tiny", SIZE.sub("kB", text)) for text in (output, shown))
        assert printed == shown, command
    last = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)[-1]
    done = subprocess.run([sys.executable, "-c", last], cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True,
                          timeout=120)
    assert done.stdout == "8\n2 tensors changed\n", done.stderr


@pytest.mark.parametrize("page, parts", [("tools", 9), ("formats", 7)])
def test_both_pages_show_the_same_code(page, parts):
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in (f"{page}.md", f"{page}_CN.md")]
    one, other = (re.findall(r"^```.*?^```", text, re.S | re.M) for text in pages)
    assert one == other
    for what in (r"^## ", r"^\| ", r"^- "):
        assert len({len(re.findall(what, text, re.M)) for text in pages}) == 1
    assert len(re.findall(r"^## ", pages[0], re.M)) == parts
