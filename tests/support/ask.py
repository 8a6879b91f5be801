"""A program that has `support.commands.preloaded` run its arguments as a `lander` command, and ends as that ends.

python ask.py SOCKET COMMAND ...
"""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Client

with Client(sys.argv[1]) as connection:
    connection.send((sys.argv[2:], os.getcwd()))
    code, output, errors = connection.recv()
sys.stdout.write(output)
sys.stderr.write(errors)
sys.exit(code)
