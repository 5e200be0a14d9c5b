"""`python -m funcnet inspect FILE` prints what a file of `funcnet.save` holds."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from funcnet.checkpoint import CheckpointError, inspect


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 if all went well, 1 for a file that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m funcnet", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("inspect", help="print names, dtypes, shapes, network, metadata")
    command.add_argument("file", metavar="FILE")
    file = parser.parse_args(arguments).file
    try:
        _print(escaped(str(inspect(file))))
    except (CheckpointError, OSError) as error:
        print(f"funcnet inspect: {error}", file=sys.stderr)
        return 1
    return 0


def escaped(text: str) -> str:
    """The text with what the output's encoding lacks, as that of a file may, escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _print(text: str) -> None:
    """Print a str. The reader of a pipe, such as `head`, may close it before the end."""
    try:
        print(text, flush=True)
    except OSError as error:
        # As it exits, Python would try once more to write what is left, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


if __name__ == "__main__":
    sys.exit(main())
