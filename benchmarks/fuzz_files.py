"""Damaged adapter files by the thousand: `python benchmarks/fuzz_files.py --cases 10000`.

Needs `pip install .[test] tqdm`. Every file is either read as its format's own library reads it or refused with a
ValueError or OSError that names it, in bounded time and memory; the first that is not ends the run with the file's
bytes. Works in a temporary folder.
"""
from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzz import KINDS, fuzz  # noqa: E402

# Those that build a net are slower: fewer of them.
SHARES = {"safetensors": 0.35, "ckpt": 0.3, "adapter_config": 0.25, "load_adapter": 0.1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, help="how many files in all (default 10000)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2 ** 32, help="to run the same files again")
    arguments = parser.parse_args()
    if arguments.cases < 10:
        parser.error(f"--cases must be at least 10, but got {arguments.cases}.")
    print(f"seed {arguments.seed}")
    print("| file | cases | read | refused | seconds | slowest case, ms |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for kind in KINDS:
            row(kind, round(SHARES[kind] * arguments.cases), arguments.seed)
        os.chdir("/")


def row(kind: str, cases: int, seed: int) -> None:
    """Run the cases of one kind and print the row of the table."""
    strategy, check = KINDS[kind]
    times: list[float] = []
    with tqdm(total=cases, desc=kind, leave=False) as bar:
        def timed(case) -> str:
            started = time.perf_counter()
            result = check(case)
            times.append(time.perf_counter() - started)
            bar.update()
            return result

        started = time.perf_counter()
        counts = fuzz(strategy, timed, cases, seed)
    print(f"| {kind} | {len(times)} | {counts['read']} | {counts['refused']} | {time.perf_counter() - started:.0f} | "
          f"{1000 * max(times):.0f} |", flush=True)


if __name__ == "__main__":
    main()
