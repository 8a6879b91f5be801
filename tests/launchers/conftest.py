"""The launchers' Python modules lie beside the scripts, not in a package."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "launchers"))
