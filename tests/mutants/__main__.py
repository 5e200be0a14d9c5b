"""The command: `python -m tests.mutants`."""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence

from .equivalent import EQUIVALENT
from .generate import generate, sample
from .mutant import GateError, Generated, Mutant
from .operators import OPERATORS
from .runner import ROOT, Outcome, Verdict, gate
from .targets import TARGETS
from .written import WRITTEN


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if every bug is killed, 1 if one is not, 2 if the gate cannot judge."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"expected --jobs >= 1, got {options.jobs}")
    if options.per_file is not None and options.per_file < 1:
        parser.error(f"expected --per-file >= 1, got {options.per_file}")
    unknown = set(options.operators or ()) - set(OPERATORS)
    if unknown:
        parser.error(f"expected operators among {', '.join(OPERATORS)}; got {', '.join(unknown)}")
    start = time.monotonic()
    try:
        generated = generate(ROOT, TARGETS)
        check_equivalent(EQUIVALENT, generated)
        chosen = choose(generated, WRITTEN, options)
        if not chosen:
            parser.error("no such bug")
        if options.list:
            for mutant in chosen:
                print(f"{mutant.name:<60} {mutant.why}")
            return 0
        outcomes = gate(chosen, options.jobs, _report, EQUIVALENT, options.quick)
    except GateError as error:
        print(f"the gate cannot judge: {error}", file=sys.stderr)
        return 2
    return summarize(outcomes, time.monotonic() - start)


def choose(
    generated: Sequence[Generated], written: Sequence[Mutant], options: argparse.Namespace
) -> list[Mutant]:
    """Return the mutants that the command asks for."""
    by_file = defaultdict(list)
    for mutant in () if options.written else generated:
        if not options.operators or mutant.operator in options.operators:
            by_file[mutant.file].append(mutant)
    mutants: list[Mutant] = []
    if not options.generated and not options.operators:
        mutants += written
    for group in by_file.values():
        mutants += sample(group, options.per_file or len(group)) if not options.names else group
    return [
        mutant
        for mutant in mutants
        if (not options.files or fnmatch.fnmatch(mutant.file, options.files))
        and (not options.names or any(fnmatch.fnmatch(mutant.name, n) for n in options.names))
    ]


def check_equivalent(equivalent: Iterable[str], generated: Iterable[Generated]) -> None:
    """Raise GateError if a mutant is listed as equivalent that is not generated."""
    unknown = sorted(set(equivalent) - {mutant.name for mutant in generated})
    if unknown:
        raise GateError(f"equivalent.py: there is no mutant {', '.join(unknown)}")


def summarize(outcomes: Sequence[Outcome], seconds: float) -> int:
    """Print `killed k of n` and what is wrong, and return the exit code."""
    judged = [o for o in outcomes if o.verdict is not Verdict.EQUIVALENT]
    alive = [outcome for outcome in judged if not outcome.killed]
    notes = [f"{len(outcomes) - len(judged)} equivalent"] if len(outcomes) > len(judged) else []
    timed_out = sum(outcome.verdict is Verdict.TIMED_OUT for outcome in outcomes)
    notes += [f"{timed_out} of them by running out of time"] if timed_out else []
    killed = f"killed {len(judged) - len(alive)} of {len(judged)}"
    print(f"{', '.join([killed, *notes])}, in {seconds:.0f} s")
    for outcome in alive:
        mutant = outcome.mutant
        print(f"{outcome.verdict.value}: {mutant.name} ({mutant.file}): {mutant.why}")
    return 1 if alive else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants",
        description="Plant bugs in a copy of funcnet, one at a time, and see the suite kill them.",
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="these bugs only; * stands for anything")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--generated", action="store_true", help="only bugs made by operators")
    kinds.add_argument("--written", action="store_true", help="only bugs written by hand")
    add("--files", metavar="GLOB", help="only bugs in these files, as in 'funcnet/layers/*'")
    add("--operators", nargs="+", metavar="OPERATOR", help="only bugs made by these operators")
    add("--per-file", type=int, metavar="N", help="at most so many generated bugs of each file")
    add("--jobs", type=int, default=2, help="how many at a time (%(default)s)")
    add("--quick", action="store_true", help="do not try the whole suite on what survives")
    add("--list", action="store_true", help="print the bugs and plant none")
    return parser


def _report(outcome: Outcome) -> None:
    print(
        f"{outcome.verdict.value:<10}  {outcome.mutant.name:<58} {outcome.seconds:5.1f} s  "
        f"{outcome.detail}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
