"""The tests that run other libraries' models: `make integrations`. Elsewhere they are skipped."""
from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
# MindFormers writes its logs below the home folder, or here.
os.environ.setdefault("LOG_MF_PATH", "mindformers_logs")
