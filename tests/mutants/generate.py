"""Generates mutants: every operator at every node of the files in `targets.py`."""

from __future__ import annotations

import ast
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from .mutant import GateError, Generated
from .operators import OPERATORS
from .source import Source


def generate(root: Path, targets: Iterable[tuple[str, str]]) -> list[Generated]:
    """Return the mutants of the files that match a target, each file at its first match.

    A target is a glob and the tests to run first. Raise GateError if one has no file of its own.
    """
    found: dict[str, list[Generated]] = {}
    for glob, tests in targets:
        paths = tuple(f"tests/{test}" for test in tests.split())
        files = [path.relative_to(root).as_posix() for path in sorted(root.glob(glob))]
        new = [file for file in files if file not in found]
        if not new:
            raise GateError(f"targets: expected files that match {glob}, got none")
        for file in new:
            text = (root / file).read_text("utf-8")
            found[file] = list(mutants_of(file, text, paths))
    return [mutant for mutants in found.values() for mutant in mutants]


def mutants_of(file: str, text: str, tests: tuple[str, ...] = ()) -> Iterator[Generated]:
    """Yield the mutants of one file.

    A mutant is named by its module, its function, its operator and the count within both, so
    its name does not change with what stands elsewhere: `losses.MSE.bwd:drop-term:2`.
    """
    source = Source(text)
    module = _module(file)
    counts: Counter[tuple[str, str]] = Counter()
    seen = set()
    for node, scope in source.nodes():
        start = source.span(node)[0]
        old = source.text(node)
        for operator, function in OPERATORS.items():
            for new in function(node, source):
                bug = (start, old, ast.dump(_parse(new)))
                if bug in seen or bug[2] == ast.dump(_parse(old)):
                    continue
                seen.add(bug)
                counts[scope, operator] += 1
                where = ".".join(filter(None, (module, scope)))
                name = f"{where}:{operator}:{counts[scope, operator]}"
                why = f"{_short(old)} → {_short(new)}"
                yield Generated(name, file, why, tests, operator, scope, start, old, new)


def sample(mutants: Sequence[Generated], count: int) -> list[Generated]:
    """Return `count` mutants, spread over functions and operators, in their order.

    The next is always one of the function and operator that are chosen least so far; the name's
    checksum decides between equals, so the choice is the same each time.
    """
    if count >= len(mutants):
        return list(mutants)
    rest = sorted(mutants, key=lambda mutant: zlib.crc32(mutant.name.encode()))
    used: Counter[str] = Counter()
    chosen = set()
    for _ in range(count):
        best = min(rest, key=lambda m: used[f"in {m.scope}"] + used[f"by {m.operator}"])
        rest.remove(best)
        used.update((f"in {best.scope}", f"by {best.operator}"))
        chosen.add(best.name)
    return [mutant for mutant in mutants if mutant.name in chosen]


def _module(file: str) -> str:
    """Return a module's name without the package's: "layers.conv" for funcnet/layers/conv.py."""
    parts = PurePosixPath(file).with_suffix("").parts
    return ".".join(parts[1:-1] if parts[-1] == "__init__" else parts[1:])


def _parse(text: str) -> ast.AST:
    """Parse the text of a node; an index like `:, 0` and a keyword's parts parse only in place."""
    try:
        return ast.parse(text)
    except SyntaxError:
        return ast.parse(f"x[{text}]")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}…"
