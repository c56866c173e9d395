"""Runs the whole test suite: several processes side by side, each with a few files.

    python tests/suite.py                     # two processes at a time
    python tests/suite.py --processes 8
    python tests/suite.py -- -k lora -q       # what follows -- goes to pytest

MindSpore keeps the graphs of gradients until its process ends, and looks through all of them at every compile. One
process for all files takes twice as long as one for each few. A file alone: pytest tests/test_laws.py.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parent
# Files that take more than a minute, the longest first; each runs alone.
LONG = ("test_wukong_finetune", "test_laws", "test_methods", "test_peft_numbers", "test_wukong_models", "test_docs",
        "test_causal_lm_parallel", "test_prefix", "test_adapter", "test_asynchronous", "test_split", "test_causal_lm",
        "test_recompute_dropout", "test_ptuning2", "test_wukong_base", "test_several", "test_train_ranks")
TOGETHER = 6
NO_TESTS = 5  # what pytest returns where -k or -m leaves none


def batches() -> list[list[Path]]:
    """What each process runs, in the order in which they start."""
    others = [path for path in sorted(TESTS.glob("test_*.py")) if path.stem not in LONG]
    return [[TESTS / f"{name}.py"] for name in LONG] + [others[at:at + TOGETHER]
                                                       for at in range(0, len(others), TOGETHER)]


def run(files: list[Path], flags: list[str]) -> bool:
    """Runs files, prints what pytest says, and tells whether all passed."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "pytest", *flags, *map(str, files)], cwd=TESTS.parent, text=True,
                          env={"OMP_NUM_THREADS": "1", **os.environ}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    names = ", ".join(path.stem for path in files)
    print(f"--- {names}: {time.monotonic() - started:.0f} s\n{done.stdout}", flush=True)
    return done.returncode in (0, NO_TESTS)


def main() -> int:
    """Runs all files; returns 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="how many run at a time (default: %(default)s)")
    parser.add_argument("flags", nargs="*", help="flags of pytest, after --")
    arguments = parser.parse_args()
    started, parts = time.monotonic(), batches()
    with ThreadPoolExecutor(arguments.processes) as pool:
        passed = list(pool.map(lambda files: run(files, arguments.flags), parts))
    failed = [path.stem for files, good in zip(parts, passed) if not good for path in files]
    print(f"--- {len(parts)} processes, {(time.monotonic() - started) / 60:.1f} minutes; "
          + (f"failures in {', '.join(failed)}" if failed else "all passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
