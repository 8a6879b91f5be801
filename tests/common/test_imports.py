"""What is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_ranks_wait_for_no_library_that_other_stages_need() -> None:
    """Each takes seconds of every rank's start."""
    code = (
        "import sys, lander_ds.cli.stages, lander_ds.stages.detect, lander_ds.stages.train, lander_ds.stages.translate;"
        "print([name for name in ('datasets', 'pandas', 'matplotlib', 'peft') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


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
