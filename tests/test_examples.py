"""What holds of every example's scripts."""
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*/*.py") if "__main__" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_without_the_extra_a_script_ends_in_one_sentence(script):
    # -S: Python finds no package that pip installed
    ended = subprocess.run([sys.executable, "-S", script, "--help"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == (f"{script.name}: error: the examples need packages that are not installed: PIL, gguf, "
                            f"jinja2, matplotlib, safetensors, tokenizers, tqdm; call: {sys.executable} -m pip "
                            f"install '{EXAMPLES.parent}[examples]'\n")
