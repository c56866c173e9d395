"""Saves that are killed: run as a script, without MindSpore, so that a process is forked in no time.

`python saving.py <what> <how many>` works in the current folder and prints a JSON object of counts; an adapter that is
neither the old one nor the new one ends it with an error.
"""
from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import bare  # noqa: F401
import files
import numpy as np

from mindpet_lite.formats import directory
from mindpet_lite.formats.files import read_tensors
from mindpet_lite.formats.state import AdapterState, LayerState

FOLDER = Path("adapter")
WIDTH = 400


def version(number: int) -> AdapterState:
    """Return an adapter whose rank, alpha and values all tell its number."""
    rank = 1 + number % 7
    return AdapterState("lora", {"layer": LayerState(
        {"mindpet_delta_lora_a": np.full((rank, WIDTH), number, np.float32),
         "mindpet_delta_lora_b": np.full((WIDTH, rank), number, np.float32)},
        {"lora_rank": rank, "lora_alpha": number, "lora_dropout": 0.0})})


def number_of(state: AdapterState) -> int:
    """Return the number of the version that an adapter is, as a whole."""
    layer = state.layers["layer"]
    number = layer.settings["lora_alpha"]
    assert layer.settings["lora_rank"] == 1 + number % 7
    for name, value in version(number).layers["layer"].tensors.items():
        assert np.array_equal(layer.tensors[name], value), f"{name} is not of version {number}"
    return number


def number_for_others() -> int:
    """Return the version in the two files as any other tool reads them."""
    config = json.loads((FOLDER / directory.CONFIG_FILE).read_text())
    values = {int(item) for tensor in read_tensors(FOLDER / directory.TENSOR_FILE).values() for item in tensor.flat}
    assert values == {config["lora_alpha"]}, f"config of version {config['lora_alpha']}, tensors of {values}"
    return config["lora_alpha"]


def leftovers() -> list[str]:
    return [str(path) for path in sorted(Path(".").rglob("*")) if ".sav" in path.name]


def killed_at_random(kills: int, seed: int) -> Counter:
    """Kill saves with SIGKILL at moments spread over the time that a save takes."""
    rng, counts, now = random.Random(seed), Counter(), 1
    files.save(version(now), FOLDER)
    duration = 0.01
    while counts["killed"] < kills:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.write(writing, b"!")
            files.save(version(now + 1), FOLDER)
            os._exit(0)
        os.read(reading, 1)
        time.sleep(rng.random() * duration)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
        # So that the longest wait stays about as long as a save takes, however busy the disk is.
        duration *= 1.2 if os.WIFSIGNALED(status) else 0.7
        found = number_of(files.load(FOLDER))
        assert found == number_for_others() and found in (now, now + 1), f"{found} after {now}"
        counts["killed" if os.WIFSIGNALED(status) else "finished"] += 1
        if os.WIFSIGNALED(status):
            counts["new" if found > now else "old"] += 1
            counts["with leftovers"] += bool(leftovers())
        now = found
    return counts


def killed_at_every_line(in_place: bool) -> Counter:
    """Kill a save before each line that it runs in `atomic.py`, the first save too; go on with the next line."""
    counts, now, line = Counter(), 0, 0
    if in_place:
        (FOLDER / "other").mkdir(parents=True)
        (FOLDER / "other" / "file").write_text("mine")
    finished = 0
    while finished < 2:
        child = os.fork()
        if not child:
            kill_before(line)
            files.save(version(now + 1), FOLDER)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        try:
            found = number_of(files.load(FOLDER))
        except FileNotFoundError:
            found = 0
        assert found in (now, now + 1), f"{found} after {now}, killed before line {line}"
        if found and not in_place:
            assert number_for_others() == found
        counts[("first " if not now else "") + ("new" if found > now else "old")] += 1
        assert not in_place or (FOLDER / "other" / "file").read_text() == "mine"
        # From the start again where there is an adapter now.
        line, now = (0, found) if found and not now else (line + 1, found)
        finished += not os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status):
            assert not leftovers(), leftovers()
            line, now = 0, max(now, 1)
    return counts


def kill_before(line: int) -> None:
    """Kill this process before it runs the line of this number, counted over all that it runs in `atomic.py`."""
    passed = 0

    def trace(frame, event, _):
        nonlocal passed
        if not frame.f_code.co_filename.endswith("atomic.py"):
            return None
        if event == "line":
            if passed == line:
                os.kill(os.getpid(), signal.SIGKILL)
            passed += 1
        return trace

    sys.settrace(trace)


def read_while_written(versions: int, in_place: bool) -> Counter:
    """Read while another process saves again and again, until so many versions were seen."""
    if in_place:
        (FOLDER / "other").mkdir(parents=True)
    files.save(version(1), FOLDER)
    child = os.fork()
    if not child:
        number = 1
        while True:
            number += 1
            files.save(version(number), FOLDER)
    found: list[int] = []
    try:
        while len(set(found)) < versions:
            found.append(number_of(files.load(FOLDER)))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert found == sorted(found)
    return Counter(read=len(found), versions=len(set(found)))


if __name__ == "__main__":
    what, count = sys.argv[1], int(sys.argv[2])
    print(json.dumps({"random": lambda: killed_at_random(count, seed=1),
                      "lines": lambda: killed_at_every_line(in_place=False),
                      "lines in place": lambda: killed_at_every_line(in_place=True),
                      "read": lambda: read_while_written(count, in_place=False),
                      "read in place": lambda: read_while_written(count, in_place=True)}[what]()))
