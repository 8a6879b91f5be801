"""`python -m lander_ds` and `deepspeed --module lander_ds`."""

import sys

from lander_ds.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
