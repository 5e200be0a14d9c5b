"""Gives functions that are alive the code of another source of their module.

A bug inside a function can then be planted where the module has been imported already. A bug in the
body of a module or class cannot: that has run.
"""

from __future__ import annotations

import gc
from types import CodeType, FunctionType
from typing import NamedTuple

_RUNS_LATER = 0x1
"""The flag (CO_OPTIMIZED) of a function's code, which the body of a module or class lacks."""


def swap(file: str, old: str, new: str) -> bool:
    """Give the functions of `file` the code of the source `new`; return whether that is the bug.

    False means that nothing has changed: the sources differ outside of functions, in a function
    that is gone, or in the variables of a function around.
    """
    pairs = _differing(compile(old, file, "exec"), compile(new, file, "exec"))
    if pairs is None:
        return False
    functions = _alive(file)
    found = [([f for f in functions if _is(f.__code__, pair.old)], pair) for pair in pairs]
    if not all(some or pair.inner for some, pair in found):
        return False
    if any(some and pair.old.co_freevars != pair.new.co_freevars for some, pair in found):
        return False
    for some, pair in found:
        for function in some:
            function.__code__ = pair.new
    return True


class _Pair(NamedTuple):
    """A function's code in two sources; `inner` if it is made whenever another function runs."""

    old: CodeType
    new: CodeType
    inner: bool


def _differing(old: CodeType, new: CodeType, inner: bool = False) -> list[_Pair] | None:
    """Return the functions inside that differ, or None if the body of a module or class does."""
    if not inner and _alone(old) != _alone(new):
        return None
    pairs = []
    for before, after in zip(_inside(old), _inside(new), strict=False):
        if _without_lines(before) == _without_lines(after):
            continue
        is_function = bool(before.co_flags & _RUNS_LATER)
        if is_function:
            pairs.append(_Pair(before, after, inner))
        deeper = _differing(before, after, inner or is_function)
        if deeper is None:
            return None
        pairs += deeper
    return pairs


def _inside(code: CodeType) -> list[CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _alone(code: CodeType) -> CodeType:
    """Return the code without that of what is inside, and without lines."""
    consts = tuple(None if isinstance(c, CodeType) else c for c in code.co_consts)
    return _without_lines(code.replace(co_consts=consts))


def _without_lines(code: CodeType) -> CodeType:
    consts = (_without_lines(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_consts=tuple(consts), co_firstlineno=1, co_linetable=b"")


def _alive(file: str) -> list[FunctionType]:
    things = (thing for thing in gc.get_objects() if type(thing) is FunctionType)
    return [function for function in things if function.__code__.co_filename == file]


def _is(code: CodeType, other: CodeType) -> bool:
    return code.co_firstlineno == other.co_firstlineno and code.co_name == other.co_name
