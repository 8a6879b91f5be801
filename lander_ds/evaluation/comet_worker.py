"""Scores segments with unbabel-comet. It is run by the interpreter that has that package, not by this project's:

    python -I comet_worker.py CHECKPOINT BATCH_SIZE DEVICE DTYPE

A line of standard input is a JSON list of samples, `{"src": ..., "mt": ..., "ref": ...}`, and the line of standard output
that answers it the list of their scores. It ends with its input. Nothing of this project is imported here.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """See the docstring of the module."""
    checkpoint, batch_size, device, dtype = sys.argv[1:]
    # Libraries write to standard output as well, some when they are imported: that goes to standard error.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch  # noqa: PLC0415
    from comet import load_from_checkpoint  # noqa: PLC0415

    model = load_from_checkpoint(checkpoint)
    if dtype == "float16":
        model.half()
    gpus = int(device == "cuda" or (device == "auto" and torch.cuda.is_available()))
    for line in sys.stdin:
        prediction = model.predict(
            json.loads(line), batch_size=int(batch_size), gpus=gpus, progress_bar=False
        )
        replies.write(json.dumps(prediction.scores) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
