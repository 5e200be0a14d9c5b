"""`python -m funcnet inspect FILE` prints what a file of `funcnet.save` holds."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from funcnet.checkpoint import CheckpointError, inspect


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 1 for a file that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m funcnet", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("inspect", help="print names, dtypes, shapes, network, metadata")
    command.add_argument("file", metavar="FILE")
    file = parser.parse_args(arguments).file
    try:
        with suppress(BrokenPipeError):  # the reader of a pipe, such as `head`, has seen enough
            show(str(inspect(file)))
    except (CheckpointError, OSError) as error:
        print(f"funcnet inspect: {error}", file=sys.stderr)
        return 1
    return 0


def show(text: str) -> None:
    """Print a str and flush. Characters that the output's encoding lacks are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        # As it exits, Python would try once more to write what is left, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


if __name__ == "__main__":
    sys.exit(main())
