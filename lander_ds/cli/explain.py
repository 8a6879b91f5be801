"""`lander config --explain`. Imports nothing heavy."""

from __future__ import annotations

import argparse

from lander_ds.common import console
from lander_ds.config.explain import as_markdown, as_text, explain


def run(arguments: argparse.Namespace) -> None:
    """Print what recipe keys mean."""
    keys = explain(arguments.explain)
    console.write_line(as_markdown(keys) if arguments.markdown else as_text(keys))
