"""Starts a script as the processes of one job."""
from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import mindpet_lite as mp


def run_job(script: str, folder: Path, count: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in `count` processes, in `folder`, with msrun; in one process without it.

    Returns:
        The exit code, and in its stdout all that was printed.
    """
    (folder / "job.py").write_text(script, encoding="utf-8")
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "GLOG_v": "3",
                   "PYTHONPATH": str(Path(mp.__file__).parents[1]), "HOME": str(folder)}
    command = [sys.executable]
    if count > 1:
        msrun = shutil.which("msrun", path=str(Path(sys.executable).parent)) or shutil.which("msrun")
        if msrun is None:
            pytest.skip("msrun, which starts several processes, is not there")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [msrun, f"--worker_num={count}", f"--local_worker_num={count}", f"--master_port={port}",
                   "--join=True"]
    done = subprocess.run([*command, "job.py", *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=300, check=False)
    done.stdout += "".join(path.read_text(errors="replace") for path in folder.glob("worker_*.log"))
    return done
