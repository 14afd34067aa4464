"""``python -m zero``: the command line; what the ranks of ``--nprocs`` run."""

from __future__ import annotations

import sys

from zero.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
