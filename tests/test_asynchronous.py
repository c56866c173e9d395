"""PyNative launches operators asynchronously where nobody says otherwise, as the other tests do."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import mindpet_lite as mp

FILES = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("laws", "recompute_dropout")]


def test_laws_of_values_hold_under_asynchronous_launch(tmp_path):
    """The output, the gradients, merge and its undoing, of the first layer of each kind; the masks of dropout."""
    chosen = "pynative and (hand and (test_1_ or test_5_ or test_7_ or test_15_) or mask or recompute)"
    done = subprocess.run([sys.executable, "-m", "pytest", *FILES, "-k", chosen, "-p", "no:cacheprovider"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "MINDPET_LITE_TESTS_ASYNCHRONOUS": "1",
                               "PYTHONPATH": str(Path(mp.__file__).parents[1])})
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 4 * 9, done.stdout
