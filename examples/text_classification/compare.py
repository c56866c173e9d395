"""Trains with every method and seed, each in a process of its own, and makes one table and one plot of them.

    python prepare.py                                        # once
    python compare.py                                        # every method, three seeds, English: hours on 2 cores
    python compare.py --methods frozen,lora,full --seeds 1   # a part of it
    python compare.py --lang zh --methods frozen,lora --out out/compare-zh
    python compare.py --out results                          # the table and the plot again from the runs that are there

Each finished run is a line of runs.jsonl in --out; a run that is there, with the same settings, is not made again. So a
comparison that was stopped goes on where it was, and the same seed gives the same numbers, but for time and memory (on
one kind of machine, with the same number of threads). The seeds come one after the other, each with all methods: what
is there first is a whole table of one seed. Beside runs.jsonl are table.md, table.json and plot.png.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from user_errors import Parser, UserError, run_script  # isort: skip  # first, to say which packages are missing
from comparison import write_plot, write_tables
from method_table import CHOICES, choice_of
from prepare import HERE
from tqdm import tqdm
from train import add_common_flags, positive

RUNS, SAID = "runs.jsonl", 600
PASSED = ("method", "seed", "lang", "batch", "epochs", "train_count", "test_count", "validation_count")


def run_settings(arguments: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """What decides a run's accuracy; a run with other settings is another run."""
    choice = choice_of(method)
    return {"method": method, "seed": seed, "lang": arguments.lang, "batch": arguments.batch,
            "epochs": arguments.epochs, "train_count": arguments.train_count, "test_count": arguments.test_count,
            "validation_count": arguments.validation_count, "on_validation": arguments.on_validation,
            "rate": choice.rate, "targets": choice.targets, "fields": choice.fields}


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The lines of runs.jsonl; a last line that was not written whole is left out.

    Raises:
        UserError: Another line is broken.
    """
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number}, is no JSON ({error}): delete the line, and its run is made "
                                "again") from error
    return rows


def add_run(path: Path, row: dict[str, Any]) -> None:
    """Adds a line, after the whole lines that are there."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    whole = text[:text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def make_run(arguments: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Makes one run in a process of its own; returns its settings and what was measured.

    Raises:
        UserError: It failed; the text has what it said last.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, str(HERE / "train.py"), "--out", str(out), "--no-before",
                   "--cache", str(arguments.cache.resolve()), *(["--on-validation"] if arguments.on_validation else [])]
        for name in PASSED:
            command += [f"--{name.replace('_', '-')}", str(settings[name])]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              errors="replace")
        if done.returncode:
            raise UserError(f"{settings['method']}, seed {settings['seed']}: {done.stdout.strip()[-SAID:]}")
        return {**settings, **json.loads((out / "results.json").read_text(encoding="utf-8"))}


def compare(arguments: argparse.Namespace) -> None:
    """Makes the runs that are missing, and the table and plot of all.

    Raises:
        UserError: A method is unknown, or runs failed; the others are in the table.
    """
    wanted = [run_settings(arguments, method, seed) for seed in range(arguments.seeds) for method in arguments.methods]
    arguments.out.mkdir(parents=True, exist_ok=True)
    path, failed = arguments.out / RUNS, []
    with tqdm(wanted, "comparing", unit="run") as bar:
        for settings in bar:
            bar.set_postfix_str(f"{settings['method']}, seed {settings['seed']}")
            if found_for(settings, read_runs(path)) is not None:
                continue
            try:
                add_run(path, make_run(arguments, settings))
            except UserError as error:
                failed.append(str(error))
                bar.write(f"failed: {error}", file=sys.stderr)
                continue
            report(arguments.out, wanted)
    report(arguments.out, wanted)
    if failed:
        raise UserError(f"{len(failed)} runs failed, and are made again by the next call; the first: {failed[0]}")
    print((arguments.out / "table.md").read_text(encoding="utf-8"))


def found_for(settings: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The run with these settings, if there is one."""
    plain = json.loads(json.dumps(settings))
    return next((run for run in runs if all(run.get(name) == value for name, value in plain.items())), None)


def report(out: Path, wanted: list[dict[str, Any]]) -> None:
    """Writes the table and the plot of the runs that are wanted and there."""
    runs = read_runs(out / RUNS)
    found = [run for run in (found_for(settings, runs) for settings in wanted) if run is not None]
    if found:
        rows = write_tables(found, out)
        write_plot(rows, found[0], out / "plot.png")


def methods(text: str) -> list[str]:
    """Names of methods with commas between; argparse shows what is wrong with them."""
    try:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            choice_of(name)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return list(dict.fromkeys(names))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--methods", type=methods, default=list(CHOICES),
                        help="names with commas between (default: all)")
    parser.add_argument("--seeds", type=positive, default=3, help="how many seeds, from 0 (default: 3)")
    parser.add_argument("--out", type=Path, default=HERE / "out" / "compare", help="folder (default: out/compare here)")
    add_common_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parse(argv)
    return run_script("compare.py", lambda: compare(arguments))


if __name__ == "__main__":
    sys.exit(main())
