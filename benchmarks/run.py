"""All benchmarks one after the other, and their rows in one table.

    python benchmarks/run.py                          # what needs this package alone: `make bench`
    python benchmarks/run.py --full                   # with the peers that have to be installed: `make bench-full`
    python benchmarks/run.py --only step memory       # some sections

Each command runs in a process of its own, in a temporary folder. Of what it prints, the lines that start with "| " are
rows for the table, written by `row`.
"""
from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

# (section, command): what needs this package alone, in both tables.
OWN: list[tuple[str, str]] = [
    ("memory", "memory.py"),
    ("memory", "estimate.py"),
    ("quantised", "quantised.py"),
    ("first step", "first_step.py"),
    ("files", "files.py"),
    ("growth", "growth.py"),
]
# `make bench`.
PLAIN: list[tuple[str, str]] = [
    ("step", "step.py"),
    ("step", "step.py --mode pynative"),
    ("kernels", "kernel_counts.py --table"),
    *OWN,
]
# `make bench-full`; {torch} is the Python that has torch and PEFT.
FULL: list[tuple[str, str]] = [
    ("step", "step.py --peers all --torch {torch}"),
    ("step", "step.py --mode pynative --peers all"),
    ("kernels", "kernel_counts.py --table --peers all"),
    ("profile", "profile_step.py --table --torch {torch}"),
    *OWN,
]


def row(*cells: str) -> None:
    """Print a row of the table: what is measured, the value, what it is beside, the bar."""
    print("| " + " | ".join([*cells, *[""] * (4 - len(cells))]) + " |", flush=True)


def run(command: str, folder: str) -> tuple[list[str], bool]:
    """Run a command, show what it prints, and return the rows among it and whether it went well."""
    process = subprocess.Popen([sys.executable, str(FOLDER / command.split()[0]), *command.split()[1:]], cwd=folder,
                               stdout=subprocess.PIPE, text=True)
    rows = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith("| "):
            rows.append(line)
    return rows, process.wait() == 0


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="with the peers that have to be installed")
    parser.add_argument("--only", nargs="+", choices=sorted({section for section, _ in PLAIN + FULL}))
    parser.add_argument("--torch", default=sys.executable, help="the Python with torch and PEFT; default: this one")
    args = parser.parse_args(given)
    table, failed = [], []
    for section, command in FULL if args.full else PLAIN:
        if args.only and section not in args.only:
            continue
        command = command.format(torch=args.torch)
        print(f"\n## {command}", flush=True)
        # MindSpore drops folders where it runs.
        with tempfile.TemporaryDirectory() as folder:
            rows, good = run(command, folder)
        table += [f"| {section} {line}" for line in rows]
        failed += [] if good else [command]
    print(f"\n# {os.cpu_count()} processors, {platform.machine()}\n")
    print("| section | what | value | beside | bar |\n|---|---|---|---|---|\n" + "".join(table))
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
