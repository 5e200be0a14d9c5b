"""A module's text beside its syntax tree, so that one node can be replaced and the rest stays."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from itertools import accumulate

# The nodes whose text means the same wherever it stands.
_ATOMS = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.List, ast.Dict)
_TYPES = {"tuple", "list", "dict", "type", "Callable", "Literal", "Sequence", "Mapping"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Source:
    """A module, whose nodes know their text, their parents and the function they are in."""

    def __init__(self, text: str) -> None:
        self.tree = ast.parse(text)
        self._data = text.encode()
        lines = self._data.splitlines(keepends=True)
        self._starts = [0, *accumulate(map(len, lines))]
        self._parents = {
            child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)
        }

    def parent(self, node: ast.AST) -> ast.AST:
        return self._parents[node]

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Return where the node's text begins and ends, in bytes."""
        begin = self._starts[node.lineno - 1] + node.col_offset
        return begin, self._starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        begin, end = self.span(node)
        return self._data[begin:end].decode()

    def atom(self, node: ast.AST) -> str:
        """Return the node's text, in parentheses unless it binds as tightly without."""
        text = self.text(node)
        is_number = isinstance(node, ast.Constant) and not text.startswith(("'", '"'))
        return text if isinstance(node, _ATOMS) or is_number else f"({text})"

    def call(
        self, node: ast.Call, args: Iterable[ast.expr], keywords: Iterable[ast.keyword]
    ) -> str:
        """Return the text of a call of the same function with other arguments."""
        return f"{self.text(node.func)}({', '.join(map(self.text, [*args, *keywords]))})"

    def nodes(self) -> Iterator[tuple[ast.AST, str]]:
        """Yield every node that runs, with the qualified name of its function or class.

        Docstrings, annotations, types, imports, decorators, what is raised, f-strings, `__all__`,
        abstract methods and what only a type checker reads are left out, with all they hold.
        """
        yield from self._below(self.tree, ())

    def _below(self, node: ast.AST, scope: tuple[str, ...]) -> Iterator[tuple[ast.AST, str]]:
        for child in _children(node):
            if _never_runs(child):
                continue
            named = isinstance(child, (*_FUNCTIONS, ast.ClassDef))
            inner = (*scope, child.name) if named else scope
            if hasattr(child, "lineno"):
                yield child, ".".join(inner)
            yield from self._below(child, inner)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the children of a node, without annotations and decorators."""
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list"):
            yield from (v for v in (value if isinstance(value, list) else [value]) if _is_node(v))


def _is_node(value: object) -> bool:
    return isinstance(value, ast.AST)


def _never_runs(node: ast.AST) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Raise() | ast.JoinedStr():
            return True
        case ast.Expr(value=ast.Constant()):  # a docstring
            return True
        case ast.FunctionDef(body=[ast.Expr(value=ast.Constant())]):  # an abstract method, a stub
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name.startswith("__") and name.endswith("__")
        case ast.Subscript(value=ast.Name(id=name)):
            return name in _TYPES
    return False
