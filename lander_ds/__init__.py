"""LANDeR-DS: detect, route and selectively fine-tune language-aware FFN neurons for machine translation."""

from lander_ds.common import without_mlflow
from lander_ds.version import __version__

__all__ = ["__version__"]

without_mlflow.install()
