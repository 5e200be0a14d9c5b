"""Code that replays a case."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

import funcnet
from funcnet.keys import key as make_key
from funcnet.keys import normal
from funcnet.testing.check.case import Case, LossCase, make_case

_MOST_LITERAL = 400


Fails: TypeAlias = Callable[[Case, bool], bool]
"""Whether a case fails, and by what costs little where the second argument says `quickly`."""


def snippet(case: Case, fails: Fails, limits: str = "") -> str:
    """Code that raises the same again, with `limits` as further arguments of `check_vjp`.

    It draws its tensors from keys if such a case fails too, the smallest batch first. Otherwise it
    spells them out if they have few entries, or takes them from the exception.
    """
    drawable = not case.is_loss and case.key is None and isinstance(case.x, Tensor)
    drawn = _drawn(case, fails) if drawable and _is_source(case.layer) else None
    entries = sum(x.numel() for x in case.inputs.values())
    lines = ["import torch", "import funcnet as fn", "from funcnet.testing import check_vjp"]
    trees = (case.target if isinstance(case, LossCase) else case.params, case.x)
    spelled = entries <= _MOST_LITERAL and _is_builtin(trees) and _is_source(case.layer)
    if drawn is None and not spelled:
        x, key = ("x, error.target", "") if case.is_loss else ("params, x", ", key=error.key")
        lines += [
            "# The tensors are not spelled out: catch the exception as `error`.",
            "layer, params, x, grad = error.layer, error.params, error.x, error.grad",
            f"check_vjp(layer, {x}, grad=grad{key}{limits})",
        ]
        return "\n".join(lines)
    source = _source(case.layer)
    if "<" in source:  # the default repr of a class is not code
        source = "error.layer  # catch the exception as `error`"
    lines += [*_import_of(case.layer), f"layer = {source}"]
    if drawn is None:
        return "\n".join([*lines, *_literally(case, limits)])
    shape, dtype, on = tuple(drawn.x.shape), drawn.x.dtype, _on(drawn.x.device)
    lines += [
        f"params = layer.init(fn.key(0), {shape[1:]}, dtype={dtype}{on})",
        f"x = fn.normal(fn.key(1), {shape}, dtype={dtype}{on})",
        f"check_vjp(layer, params, x{limits})",
    ]
    return "\n".join(lines)


def _drawn(case: Case, fails: Fails) -> Case | None:
    """A failing case of the same shapes, drawn from keys."""
    if not case.x.ndim:
        return None
    batch = len(case.x)
    counts = sorted({min(1, batch), min(2, batch), batch})
    found = [_drawn_of(case, count) for count in counts]
    cases = [drawn for drawn in found if drawn is not None]
    quick = next((drawn for drawn in cases if fails(drawn, True)), None)
    if quick is not None or not (cases and fails(cases[-1], False)):
        return quick  # what does not fail at its own size seldom does in a smaller batch
    return next((drawn for drawn in cases[:-1] if fails(drawn, False)), cases[-1])


def _drawn_of(case: Case, count: int) -> Case | None:
    """A batch of so many, drawn from keys."""
    shape, device = (count, *case.x.shape[1:]), case.x.device
    try:
        params = case.layer.init(make_key(0), shape[1:], dtype=case.dtype, device=device)
        x = normal(make_key(1), shape, dtype=case.dtype, device=device)
        drawn = make_case(case.layer, params, x, None, None)
    except Exception:  # a user's init may not work with a key, and the snippet is optional
        return None
    is_alike = optree.tree_structure(params) == optree.tree_structure(case.params)
    return drawn if is_alike else None


def _literally(case: Case, limits: str) -> list[str]:
    key = "" if case.key is None else f", key=fn.{case.key!r}"
    name, tree = ("target", case.target) if isinstance(case, LossCase) else ("params", case.params)
    lines = [f"x = {_spelled(case.x)}", f"{name} = {_spelled(tree)}"]
    arguments = "layer, x, target" if case.is_loss else "layer, params, x"
    lines.append(f"grad = {_literal(case.grad)}")
    return [*lines, f"check_vjp({arguments}, grad=grad{key}{limits})"]


def _spelled(tree: Any) -> str:
    """Code that makes a tree of tensors."""
    return repr(optree.tree_map(lambda leaf: _Code(_literal(leaf)), tree))


class _Code(str):
    """Code that is its own repr, so that the repr of a tree of it is code."""

    __repr__ = str.__str__


def _is_builtin(tree: Any) -> bool:
    """Whether a tree is made of tuples, lists, dicts and None alone."""
    if type(tree) in (tuple, list):
        return all(map(_is_builtin, tree))
    if type(tree) is dict:
        return all(map(_is_builtin, tree.values()))
    return tree is None or isinstance(tree, (Tensor, int, float, str))


def _literal(x: Any) -> str:
    if not isinstance(x, Tensor):
        return repr(x)
    values = re.sub(r"\b(inf|nan)\b", r"torch.\1", repr(x.tolist()))
    shaped = f".reshape({tuple(x.shape)})" if not x.numel() else ""
    return f"torch.tensor({values}, dtype={x.dtype}{_on(x.device)}){shaped}"


def _on(device: torch.device) -> str:
    """The argument that puts a tensor on a device."""
    return "" if device.type == "cpu" else f', device="{device}"'


def _source(layer: Any) -> str:
    """The layer's repr, without the names of functions that its classes are defined in."""
    return re.sub(r"[\w.]*<locals>\.", "", repr(layer))


def _is_source(layer: Any) -> bool:
    """Whether the layer's code, with its imports, makes the same layer again.

    A class or function that is defined in a function cannot be imported: the reader has it.
    """
    if "<" in _source(layer):
        return True
    names: dict[str, Any] = {"torch": torch, "fn": funcnet}
    names.update((name, getattr(funcnet, name)) for name in funcnet.__all__)
    names.update((cls.__name__, cls) for cls in _classes(layer))
    try:
        return bool(eval(_source(layer), names) == layer)
    except Exception:  # a repr need not be code
        return False


def _import_of(layer: Any) -> list[str]:
    named = set(re.findall(r"\w+", _source(layer))) & set(funcnet.__all__)
    lines = [f"from funcnet import {', '.join(sorted(named))}"] if named else []
    for cls in sorted(_classes(layer), key=str):
        importable = cls.__module__ != "__main__" and "<locals>" not in cls.__qualname__
        if importable and cls.__module__.split(".")[0] not in ("funcnet", "builtins", "torch"):
            lines.append(f"from {cls.__module__} import {cls.__name__}")
    return lines


def _classes(value: Any) -> set[type]:
    """The classes of a layer and of what its fields hold."""
    if isinstance(value, (tuple, list)):
        held = list(value)
    elif isinstance(value, dict):
        held = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        held = [getattr(value, f.name) for f in fields(value) if f.repr]
    else:
        return {type(value)} if isinstance(value, Enum) else set()
    own = {type(value)} if type(value) not in (tuple, list, dict) else set()
    return own.union(*map(_classes, held))
