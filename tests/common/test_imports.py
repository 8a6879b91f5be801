"""What is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_deepspeed_does_not_import_mlflow_and_others_can() -> None:
    code = (
        "import sys, lander_ds, deepspeed; from deepspeed.autotuning import autotuner; "
        "assert 'mlflow' not in sys.modules and not autotuner.has_mlflow; "
        "import mlflow; assert mlflow.__version__"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
