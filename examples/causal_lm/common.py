"""What this example shares with the Wukong example: users' errors, the folder of a run, parts of the report."""

import sys
from pathlib import Path

# At the end, so that a module of this folder comes before one of the same name there.
sys.path.append(str(Path(__file__).resolve().parent.parent / "wukong"))
import extras  # noqa: E402, F401
from errors import Parser, Stopped, UserError, explained, run_script, sentence  # noqa: E402
from report import STYLE, inline, table  # noqa: E402
from run_folder import CHECKPOINTS, Log, check, clear, lasting, plain, save_settings  # noqa: E402

__all__ = ["CHECKPOINTS", "STYLE", "Log", "Parser", "Stopped", "UserError", "check", "clear", "explained", "inline",
           "lasting", "plain", "run_script", "save_settings", "sentence", "table"]
