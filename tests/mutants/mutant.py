"""A mutant: one planted bug, written by hand or generated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple


class GateError(Exception):
    """The gate cannot judge: a bug cannot be planted, or the suite fails without one."""


@dataclass(frozen=True)
class Mutant(ABC):
    """A bug in `file`. `tests` run first; the whole suite runs if they pass."""

    name: str
    file: str
    why: str
    tests: tuple[str, ...]

    @abstractmethod
    def planted(self, source: str) -> str:
        """Return the source of the file with the bug. Raise GateError if it does not apply."""


@dataclass(frozen=True)
class Written(Mutant):
    """A bug written by hand: `old`, which stands once in the file, becomes `new`."""

    old: str
    new: str

    def planted(self, source: str) -> str:
        found = source.count(self.old)
        if found != 1:
            raise GateError(f"{self.name}: expected its old text once in {self.file}, got {found}×")
        return source.replace(self.old, self.new)


@dataclass(frozen=True)
class Generated(Mutant):
    """A bug made by an operator: the bytes from `start`, which are `old`, become `new`."""

    operator: str
    scope: str
    start: int
    old: str
    new: str

    def planted(self, source: str) -> str:
        data, old = source.encode(), self.old.encode()
        end = self.start + len(old)
        if data[self.start : end] != old:
            raise GateError(f"{self.name}: {self.file} has changed since it was read")
        return (data[: self.start] + self.new.encode() + data[end:]).decode()


class Row(NamedTuple):
    """A bug written by hand, in the file of its group."""

    name: str
    old: str
    new: str
    why: str


def in_file(file: str, tests: str, *rows: Row) -> tuple[Written, ...]:
    """Return the bugs of one file, which the same tests are likely to find."""
    paths = tuple(f"tests/{test}" for test in tests.split())
    return tuple(
        Written(row.name, f"funcnet/{file}", row.why, paths, row.old, row.new) for row in rows
    )
