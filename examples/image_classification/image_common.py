"""What this example shares with the Wukong example: users' errors, reading pictures, fonts."""

import sys
from pathlib import Path

# At the end, so that a module of this folder comes before one of the same name there.
WUKONG = Path(__file__).resolve().parent.parent / "wukong"
sys.path.append(str(WUKONG))
import extras  # noqa: E402, F401
from data import DataError, load_image  # noqa: E402
from errors import Parser, UserError, explained, run_script  # noqa: E402
from pictures import CELL, GAP, chinese_font, fitting  # noqa: E402

__all__ = ["CELL", "GAP", "WUKONG", "DataError", "Parser", "UserError", "chinese_font", "explained", "fitting",
           "load_image", "run_script"]
