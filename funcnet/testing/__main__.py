"""`python -m funcnet.testing`: every layer and loss in many random cases, and the worst errors.

A row is a layer or loss in one dtype; its columns are the cases run and, over all of them,

    autograd      the largest difference from autograd in float64, relative to the leaf's largest
    differences   the same of central differences along random directions
    taylor        the slowest power of the step with which Taylor's remainder fell (2 is right)
    rounding      the largest difference of the dtype itself from float64

A case that fails is shrunk. Its message is printed under the row, with the command that repeats it;
the exit status is then 1. The same `--seed` draws the same cases again, another one draws others.
`--import` imports a module that adds rows of its own to the registry.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import math
import random
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import optree
import torch

try:
    from hypothesis import HealthCheck, given, seed, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:
    sys.exit("python -m funcnet.testing needs hypothesis: pip install 'funcnet[test]'")

from funcnet.__main__ import show
from funcnet.keys import key as make_key
from funcnet.layer import Layer
from funcnet.testing import strategies
from funcnet.testing.check import Errors, inspect_vjp
from funcnet.testing.errors import GradientMismatch
from funcnet.testing.registry import LOSSES, REGISTRY, needs_key

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_HEADER = ("layer", "dtype", "cases", "autograd", "differences", "taylor", "rounding", "seconds")


@dataclass
class Score:
    """The outcome of the random cases of one layer in one dtype."""

    cases: int = 0
    errors: Errors = field(default_factory=Errors)
    seconds: float = 0.0
    failure: Exception | None = None
    case: tuple[Any, ...] | None = None  # the one that is checked


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 if every case passed, 1 if one failed or the table was not printed whole."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for module in options.modules:
        _import(module, parser)
    known = _known()
    for name in options.layer or ():
        if name not in known:
            parser.error(f"argument --layer: {_unknown(name, known)}")
    try:
        return 0 if _print_table(options, known) else 1
    except KeyboardInterrupt:
        _progress("")
        return 130  # as shells count it: 128 and the number of the signal
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        return 1


def _import(module: str, parser: argparse.ArgumentParser) -> None:
    """Import a module; the parser refuses one that is not there."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that it imports itself
        parser.error(f"argument --import: expected a module that can be imported, got {module!r}")


def _known() -> dict[str, Callable[..., strategies.Strategy[Any]]]:
    """A function that makes the strategy for cases, for the name of each layer and loss."""
    return {
        **{cls.__name__: partial(strategies.cases, strategies.layers(cls)) for cls in REGISTRY},
        "Sequential": partial(strategies.cases, _networks()),
        **{cls.__name__: partial(strategies.loss_cases, strategies.losses(cls)) for cls in LOSSES},
    }


def _networks() -> strategies.Strategy[Any]:
    """Networks: of any layers, behind one that takes integers, and with some that need a key."""
    takes_integers = [cls for cls, row in REGISTRY.items() if row.classes is not None]
    needs_key = [cls for cls, row in REGISTRY.items() if row.needs_key and row.classes is None]
    return st.one_of(
        strategies.networks(),
        strategies.networks(first=strategies.layers(*takes_integers)),
        strategies.networks(parts=strategies.layers() | strategies.layers(*needs_key)),
    )


def _print_table(
    options: argparse.Namespace, known: dict[str, Callable[..., strategies.Strategy[Any]]]
) -> bool:
    """Print a row for each layer and dtype. Returns whether every case passed."""
    passed = True
    if options.seed is None:
        options.seed = random.SystemRandom().getrandbits(32)
    show(_row(_HEADER))
    for name in options.layer or known:
        for dtype in options.dtype or ["float64", "float32"]:
            cases = known[name](
                dtypes=st.just(getattr(torch, dtype)),
                device=options.device,
                values=strategies.FINITE,
            )
            score = run(f"{name} {dtype}", cases, options.examples, options.seed)
            show(_row(_cells(name, dtype, score)))
            if score.failure is not None:  # at once: the rows to come may take hours
                show(f"\n{_told(score, score.failure)}\n\n{_command(name, dtype, options)}\n")
                passed = False
    return passed


def _told(score: Score, failure: Exception) -> str:
    """The message of a failure, with the place and the case of an exception of the layer's own."""
    if isinstance(failure, GradientMismatch):
        return str(failure)
    place = traceback.extract_tb(failure.__traceback__)[-1]
    told = f"{type(failure).__name__}: {failure}\n  in {place.filename}, line {place.lineno}"
    if score.case is None:  # it was raised while a case was drawn
        return told
    layer, *trees = score.case
    given: Any = tuple(trees)
    leaves = [x for x in optree.tree_leaves(given) if isinstance(x, torch.Tensor)]
    return f"{told}, of {', '.join(map(str, (layer, *(tuple(x.shape) for x in leaves))))}"


def _unknown(name: str, known: Iterable[str]) -> str:
    """The message about a name that is not a layer's or loss's, with names that look like it."""
    names = {other.lower(): other for other in known}
    close = [names[match] for match in difflib.get_close_matches(name.lower(), names)]
    hint = f"did you mean {' or '.join(close)}?" if close else "help('funcnet') lists all"
    return f"expected a layer or a loss, got {name!r}; {hint}"


def _command(name: str, dtype: str, options: argparse.Namespace) -> str:
    """The command that draws the cases of a row again."""
    words = ["--layer", name, "--dtype", dtype]
    words += ["--seed", str(options.seed), "--examples", str(options.examples)]
    if options.device != "cpu":
        words += ["--device", options.device]
    for module in options.modules:
        words += ["--import", module]
    return f"To repeat it: python -m funcnet.testing {shlex.join(words)}"


def run(title: str, cases: strategies.Strategy[Any], examples: int, number: int) -> Score:
    """`check_vjp` in many random cases, which follow from a seed, the `number`."""
    score = Score()

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def check(case: tuple[Any, Any, Any]) -> None:
        score.cases, score.case = score.cases + 1, case
        _progress(f"{title}: case {score.cases} of about {examples}")
        key = make_key(0) if isinstance(case[0], Layer) and needs_key(case[0]) else None
        score.errors.merge(inspect_vjp(*case, key=key))
        score.case = None

    start = time.perf_counter()
    try:
        check()
    except Exception as failure:  # whatever it is, it belongs in the table
        score.failure = failure
    score.seconds = time.perf_counter() - start
    _progress("")
    return score


def _progress(line: str) -> None:
    """Write over the last line of a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{line}")
        sys.stderr.flush()


def _cells(name: str, dtype: str, score: Score) -> tuple[str, ...]:
    if score.failure is not None:
        numbers = ["FAILED", "", "", ""]
    else:
        errors = score.errors
        taylor = "exact" if math.isinf(errors.taylor) else f"{errors.taylor:.2f}"
        rounding = "" if dtype == "float64" else f"{errors.rounding:.1e}"
        numbers = [f"{errors.autograd:.1e}", f"{errors.differences:.1e}", taylor, rounding]
    return (name, dtype, f"{score.cases:,}", *numbers, f"{score.seconds:.1f}")


def _row(cells: Sequence[str]) -> str:
    left, right = cells[:2], cells[2:]
    return f"{left[0]:<20}{left[1]:<10}" + "".join(f"{cell:>12}" for cell in right)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m funcnet.testing",
        description="Check the gradient of every layer in many random cases.",
    )
    parser.add_argument(
        "--examples", type=_positive, default=100, metavar="N", help="cases a layer (100)"
    )
    parser.add_argument(
        "--layer",
        action="extend",
        nargs="+",
        metavar="LAYER",
        help="only these, such as Conv2d (all)",
    )
    parser.add_argument(
        "--dtype",
        action="extend",
        nargs="+",
        choices=_DTYPES,
        metavar="DTYPE",
        help="only these (float64 and float32)",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="the same cases for the same number (at random)"
    )
    parser.add_argument(
        "--import",
        dest="modules",
        action="extend",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="import these first, for rows of your own in the registry",
    )
    parser.add_argument("--device", type=_device, default="cpu", help="cpu, cuda, … (cpu)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of cases >= 1, got {text!r}")
    return int(text)


def _device(text: str) -> str:
    try:
        torch.zeros((), device=text).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"expected a device, got {text!r}: {reason}") from None
    return text


if __name__ == "__main__":
    sys.exit(main())
