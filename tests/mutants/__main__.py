"""The command: `python -m tests.mutants`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from .runner import GateError, Outcome, Verdict, gate
from .table import MUTANTS


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every bug is killed, 1 if one is not, 2 if the gate cannot judge."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description="Plant bugs in a copy of funcnet, one at a time, and see the suite kill them.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="these bugs only")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the bugs and plant none")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"no such bug: {', '.join(sorted(unknown))}")
    if options.jobs < 1:
        parser.error(f"expected --jobs >= 1, got {options.jobs}")
    chosen = [mutant for mutant in MUTANTS if not options.names or mutant.name in options.names]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:<38} {mutant.file:<34} {mutant.why}")
        return 0
    start = time.monotonic()
    try:
        outcomes = gate(chosen, options.jobs, _report)
    except GateError as error:
        print(f"the gate cannot judge: {error}", file=sys.stderr)
        return 2
    return _summarize(outcomes, time.monotonic() - start)


def _report(outcome: Outcome) -> None:
    print(
        f"{outcome.verdict.value:<9}  {outcome.mutant.name:<38} {outcome.seconds:5.1f} s  "
        f"{outcome.detail}",
        flush=True,
    )


def _summarize(outcomes: Sequence[Outcome], seconds: float) -> int:
    alive = [outcome for outcome in outcomes if not outcome.killed]
    timed_out = sum(outcome.verdict is Verdict.TIMED_OUT for outcome in outcomes)
    note = f", {timed_out} of them by running out of time" if timed_out else ""
    print(f"killed {len(outcomes) - len(alive)} of {len(outcomes)}{note} in {seconds:.0f} s")
    for outcome in alive:
        mutant = outcome.mutant
        print(f"{outcome.verdict.value}: {mutant.name} ({mutant.file}): {mutant.why}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
