"""The `main` of a benchmark, called in this process, which has imported everything already."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from unittest.mock import patch


def run_script(main: Callable[[], int], *arguments: str) -> int:
    """Its exit code; variables and the handler of SIGTERM that it sets end with it."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with patch.dict(os.environ), patch.object(sys, "argv", [main.__module__, *arguments]):
            return main()
    finally:
        signal.signal(signal.SIGTERM, handler)
