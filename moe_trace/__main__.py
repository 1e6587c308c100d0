"""Entry point of `python -m moe_trace`."""

import sys

from moe_trace.cli import main

if __name__ == "__main__":
    sys.exit(main())
