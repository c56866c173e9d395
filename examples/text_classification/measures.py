"""What a process takes: its memory above what it had before the work, and the time of a step."""

import re
from pathlib import Path

import numpy as np

STATUS = Path("/proc/self/status")


def resident(name: str) -> int | None:
    """Bytes of VmRSS (now) or VmHWM (the most so far) of this process; None where the system does not tell."""
    found = re.search(name + r":\s*(\d+) kB", STATUS.read_text()) if STATUS.is_file() else None
    return int(found[1]) * 1024 if found else None


class Peak:
    """The largest resident size of this process above what it has when this is made."""

    def __init__(self) -> None:
        self.base = resident("VmRSS")

    def most(self) -> int | None:
        """Bytes; None where the system does not tell."""
        most = resident("VmHWM")
        return None if most is None or self.base is None else most - self.base


def step_seconds(seconds: list[float], lengths: list[int]) -> float | None:
    """The lower quartile of the steps of the most frequent length, without the first, which compiles.

    Other work on the machine makes steps slower, never faster: the lower quartile tells most of the step itself.
    """
    if not lengths:
        return None
    most = max(set(lengths), key=lambda length: (lengths.count(length), -length))
    steps = [second for second, length in zip(seconds, lengths) if length == most][1:]
    return float(np.percentile(steps, 25)) if steps else None
