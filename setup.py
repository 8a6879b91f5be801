"""Only what pyproject.toml cannot say: wheels carry the DeepSpeed JSONs and the recipes, which stand beside the package."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHIPPED = {"ds_configs": "*.json", "recipes": "*.yaml"}
"""Directory -> what of it; `lander_ds/common/shipped.py` finds them."""


class BuildWithShipped(build_py):
    """The package, and `shipped/` in it."""

    def run(self) -> None:
        """Copy; an editable installation has them where they stand."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "lander_ds" / "shipped"
        shutil.rmtree(target, ignore_errors=True)
        for name, pattern in SHIPPED.items():
            for path in sorted((ROOT / name).rglob(pattern)):
                copy = target / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


setup(cmdclass={"build_py": BuildWithShipped})
