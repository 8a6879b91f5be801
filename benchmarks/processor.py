"""Importing this makes the processor the device of this process and of those it starts, also where there is a GPU.

DeepSpeed looks for its device when it is first imported, and reports the outcome on standard output, where results go.
A script imports this module before anything that imports DeepSpeed.
"""

from __future__ import annotations

import os

os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
