"""Import this first to import `mindpet_lite.formats` without what the package itself imports, MindSpore above all."""
from __future__ import annotations

import sys
import types
from pathlib import Path

package = types.ModuleType("mindpet_lite")
package.__path__ = [str(Path(__file__).parents[1] / "mindpet_lite")]
sys.modules["mindpet_lite"] = package
