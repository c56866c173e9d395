"""What this example shares with the Wukong example: users' errors and the packages that both need."""

import sys
from pathlib import Path

# At the end, so that a module of this folder comes before one of the same name there.
sys.path.append(str(Path(__file__).resolve().parent.parent / "wukong"))
import extras  # noqa: E402, F401
from errors import Parser, UserError, run_script, sentence  # noqa: E402

__all__ = ["Parser", "UserError", "run_script", "sentence"]
