"""Ends a script in one sentence where packages of the extra "examples" are missing. Scripts import it first."""

import sys
from importlib.util import find_spec
from pathlib import Path

# By the names that Python imports them under.
PACKAGES = ("PIL", "gguf", "jinja2", "matplotlib", "safetensors", "tokenizers", "tqdm")

REPOSITORY = Path(__file__).resolve().parents[2]

if missing := [name for name in PACKAGES if find_spec(name) is None]:
    print(f"{Path(sys.argv[0]).name}: error: the examples need packages that are not installed: {', '.join(missing)}; "
          f"call: {sys.executable} -m pip install '{REPOSITORY}[examples]'", file=sys.stderr)
    sys.exit(2)
