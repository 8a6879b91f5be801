"""DeepSpeed's autotuning, which nothing here uses, imports MLflow wherever that is installed: more than a second in every
process. It is told that there is none; everybody else gets it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTOTUNER = "deepspeed.autotuning.autotuner"


class WithoutMlflow(MetaPathFinder):
    """Finds nothing, and refuses MLflow to the autotuner."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None: others may look.

        Raises:
            ModuleNotFoundError: the autotuner is being imported and asks for MLflow.
        """
        if fullname == "mlflow":
            autotuner = sys.modules.get(AUTOTUNER)
            if autotuner is not None and getattr(autotuner.__spec__, "_initializing", False):
                raise ModuleNotFoundError("not for DeepSpeed's autotuning", name=fullname)
        return None


def install() -> None:
    """From now on."""
    if not any(isinstance(finder, WithoutMlflow) for finder in sys.meta_path):
        sys.meta_path.insert(0, WithoutMlflow())
