"""Kills a fine-tuning of the Wukong example at random steps, goes on, and compares its adapter with an unbroken one's.

    python benchmarks/wukong_kills.py                      # 20 kills; half an hour on 2 cores
    python benchmarks/wukong_kills.py --kills 5 --steps 60

Each kill is SIGKILL after a random number of steps. The run saves a checkpoint every few steps and is started again
with --resume until it ends. The script prints each kill and ends with 1 if a byte of the adapter or a loss of the log
differs.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WUKONG = Path(__file__).resolve().parents[1] / "examples" / "wukong"


def start(out: Path, steps: int, *flags: str) -> subprocess.Popen[bytes]:
    """Starts a run that writes into `out`."""
    command = [sys.executable, str(WUKONG / "finetune.py"), "--config", str(WUKONG / "configs" / "wukong_tiny.yaml"),
               "--steps", str(steps), "--batch", "4", "--save-every", "3", "--ema-decay", "0.9", "--heldout-draws", "1",
               "--latent-cache", str(out.parent / "latents"), "--out", str(out), *flags]
    return subprocess.Popen(command, cwd=out.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            env={**os.environ, "GLOG_v": "3"})


def steps_in(log: Path, since: int) -> int:
    """The steps that a log has, if it was written since a time; 0 if not."""
    return log.read_text().count("\n") if log.exists() and log.stat().st_mtime_ns > since else 0


def kill_after(out: Path, steps: int, more: int, *flags: str) -> int:
    """Kills a run when it has made some steps more than its newest checkpoint; returns the steps in its log."""
    checkpoints = (out / "checkpoints").glob("checkpoint-*")
    first, began = max((int(path.name[11:]) for path in checkpoints), default=0), time.time_ns()
    process = start(out, steps, *flags)
    while process.poll() is None and steps_in(out / "log.jsonl", began) < first + more:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return steps_in(out / "log.jsonl", began)


def losses(out: Path) -> list[float]:
    """The loss of every step of a run."""
    return [json.loads(row)["loss"] for row in (out / "log.jsonl").read_text().splitlines()]


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps of the run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the steps that it is killed after (%(default)s)")
    args = parser.parse_args()
    numbers = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as work:
        whole, killed = Path(work, "whole"), Path(work, "killed")
        if start(whole, args.steps).wait():
            print("the unbroken run failed")
            return 1
        for number in range(args.kills):
            more = numbers.randint(1, max(1, args.steps // args.kills))
            step = kill_after(killed, args.steps, more, *(["--resume"] if killed.exists() else []))
            print(f"kill {number + 1:2d}: after step {step}", flush=True)
        code = start(killed, args.steps, "--resume").wait()
        files = [f"{folder}/adapter_model.safetensors" for folder in ("adapter", "ema/adapter")]
        equal = code == 0 and all((whole / name).read_bytes() == (killed / name).read_bytes() for name in files)
        same_losses = code == 0 and losses(whole) == losses(killed)
    print(f"exit code {code}; adapter and averages {'equal byte for byte' if equal else 'DIFFER'}; losses of "
          f"{args.steps} steps {'equal' if same_losses else 'DIFFER'}")
    return 0 if equal and same_losses else 1


if __name__ == "__main__":
    sys.exit(main())
