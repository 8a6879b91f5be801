"""Print the subnet through which this host reaches another, such as 10.1.0.0/16.

usage: network.py HOST
"""

from __future__ import annotations

import sys
from ipaddress import ip_interface

from lander_ds.common.errors import LanderError
from lander_ds.distributed.discovery import address_towards, interfaces


def main(host: str) -> int:
    """Print; returns the exit code."""
    try:
        address = address_towards(host)
    except LanderError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    mask = next(actual.netmask for actual in interfaces() if actual.address == address)
    print(ip_interface(f"{address}/{mask}").network)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
