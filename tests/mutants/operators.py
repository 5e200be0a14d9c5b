"""The mutation operators: each makes one kind of bug at one node of a syntax tree.

An operator takes a node and its source, and yields the texts that may stand in the node's place.
Nodes that it has no bug for yield nothing, so every operator is offered every node.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from itertools import pairwise

from .source import Source

Operator = Callable[[ast.AST, Source], Iterator[str]]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SYMBOLS = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.MatMult: "@",
}
_PRODUCTS = (ast.Mult, ast.Div, ast.MatMult)
_SWAPPED = (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult)
_COMPARISONS = {
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
_ORDERS = (ast.Gt, ast.GtE, ast.Lt, ast.LtE)

_AXIS_KEYWORDS = {"dim", "dims", "dim0", "dim1", "axis", "start_dim", "end_dim"}
# The methods whose integers are all axes, and those of which only the first integer is one.
_AXES = _words(
    "sum mean amax amin max min all any argmax argmin softmax log_softmax logsumexp cumsum flatten "
    "squeeze unsqueeze transpose movedim flip size var std norm unbind cat stack"
)
_FIRST_AXIS = {"select", "narrow", "unflatten", "unfold", "index_select", "gather", "diff"}

_LIBRARIES = {"torch", "F", "math", "np"}
_COMMUTATIVE = _words("add mul maximum minimum max min logaddexp eq ne equal gcd lcm dot")
# What takes a tuple whose order does not count.
_UNORDERED = _words("isinstance issubclass set frozenset")
# The methods whose integers would not fit if one of them changed, and those where order counts.
_SHAPING_METHODS = {"permute", "reshape", "view", "expand"}
_ORDERED_METHODS = _SHAPING_METHODS | {"narrow", "unflatten", "unfold", "flatten"}

_PAIRS = [
    *(("tanh", "sigmoid"), ("tanh_backward", "sigmoid_backward"), ("softmax", "log_softmax")),
    *(("exp", "expm1"), ("log", "log1p"), ("sin", "cos"), ("sqrt", "square"), ("relu", "abs")),
    *(("min", "max"), ("minimum", "maximum"), ("amin", "amax"), ("argmin", "argmax")),
    *(("clamp_min", "clamp_max"), ("floor", "ceil"), ("any", "all"), ("cumsum", "cumprod")),
    *(("zeros", "ones"), ("zeros_like", "ones_like"), ("new_zeros", "new_ones")),
    *(("add", "sub"), ("add_", "sub_"), ("mul", "div"), ("mul_", "div_")),
]
_SIBLINGS = dict(_PAIRS) | {b: a for a, b in _PAIRS} | {"erf": "tanh", "softplus": "relu"}
_SIBLING_NAMES = {"min", "max", "any", "all"}

# The methods that may be left out, with any arguments. contiguous() may only where what follows
# can tell: elsewhere it costs time and changes no number.
_DROPPED_METHODS = _words(
    "clone copy detach conj abs neg square sqrt rsqrt reciprocal exp log t to type_as expand "
    "expand_as clamp clamp_min clamp_max flip transpose permute masked_fill replace"
)
_DROPPED_FUNCTIONS = {"list", "tuple", "dict", "sorted", "reversed", "abs"}
_DROPPED_ATTRIBUTES = {"T", "mT", "H", "mH"}

_NEEDS = {"need", "input_grad"}


def swap_operands(node: ast.AST, source: Source) -> Iterator[str]:
    """a - b → b - a, and so for every operation that does not commute, matrix products too."""
    match node:
        case ast.BinOp(left, op, right) if isinstance(op, _SWAPPED) and not _is_text(node):
            yield f"{source.atom(right)} {_SYMBOLS[type(op)]} {source.atom(left)}"


def drop_term(node: ast.AST, source: Source) -> Iterator[str]:
    """a + b → a, and b; one factor of a product, one part of a condition, one of max(a, b)."""
    match node:
        case ast.BinOp() if _is_text(node):
            return
        case ast.BinOp(left, ast.Add() | ast.Mult(), right):
            yield source.atom(left)
            yield source.atom(right)
        case ast.BinOp(left, ast.Sub(), right):
            yield source.atom(left)
            yield f"(-{source.atom(right)})"
        case ast.BinOp(left, ast.Div() | ast.FloorDiv() | ast.Mod() | ast.Pow()):
            yield source.atom(left)
        case ast.BoolOp(op, values):
            word = " and " if isinstance(op, ast.And) else " or "
            for dropped in values:
                yield word.join(source.atom(value) for value in values if value is not dropped)
        case ast.Call(ast.Name("max" | "min"), [_, _, *_] as args, []):
            for dropped in args:
                rest = [arg for arg in args if arg is not dropped]
                yield source.call(node, rest, ()) if len(rest) > 1 else source.atom(rest[0])


def flip_sign(node: ast.AST, source: Source) -> Iterator[str]:
    """a + b → a - b, -a → a, a * b → -(a * b), and `return torch.f(x)` → `return -torch.f(x)`."""
    match node:
        case ast.BinOp() if _is_text(node):
            return
        case ast.BinOp(left, ast.Add() | ast.Sub() as op, right):
            sign = "-" if isinstance(op, ast.Add) else "+"
            yield f"{source.atom(left)} {sign} {source.atom(right)}"
        case ast.BinOp(_, op, _) if isinstance(op, _PRODUCTS):
            if not isinstance(getattr(source.parent(node), "op", None), _PRODUCTS):
                yield f"(-({source.text(node)}))"
        case ast.UnaryOp(ast.USub(), operand) if not _is_int(operand):
            yield source.atom(operand)
        case ast.AugAssign(target, ast.Add() | ast.Sub() as op, value) if not _is_text(value):
            sign = "-" if isinstance(op, ast.Add) else "+"
            yield f"{source.text(target)} {sign}= {source.text(value)}"
        case ast.Call(func) if _library(func) and _is_tensor_result(node, source):
            yield f"-{source.text(node)}"


def sum_or_mean(node: ast.AST, source: Source) -> Iterator[str]:
    """.sum() ↔ .mean()."""
    match node:
        case ast.Attribute(value, "sum" | "mean" as name) if _is_called(node, source):
            yield f"{source.atom(value)}.{'mean' if name == 'sum' else 'sum'}"


def shift_axis(node: ast.AST, source: Source) -> Iterator[str]:
    """dim=1 → dim=0 and dim=2; of several axes, one is shifted or left out."""
    if isinstance(node, ast.Tuple) and _is_axis(node, source) and len(node.elts) > 1:
        for dropped in node.elts:
            yield _tuple(source.text(axis) for axis in node.elts if axis is not dropped)
    axis = _integer(node)
    if axis is None or _is_negated(node, source):
        return
    parent = source.parent(node)
    if isinstance(parent, ast.Tuple) and _is_axis(parent, source):
        others = {_integer(other) for other in parent.elts}
        yield from (str(near) for near in (axis - 1, axis + 1) if near not in others)
    elif _is_axis(node, source):
        yield from (str(near) for near in (axis - 1, axis + 1))


def off_by_one(node: ast.AST, source: Source) -> Iterator[str]:
    """n → n + 1 and n - 1, for integers that are no axes; 0 → 1; c → 2c for other numbers."""
    match node:
        case ast.Constant(float(c)):
            yield repr(2 * c) if c else "1.0"
            return
    n = _integer(node)
    if n is None or _is_negated(node, source) or next(shift_axis(node, source), None):
        return
    parent = source.parent(node)
    if isinstance(parent, ast.Call) and _name(parent.func) in _SHAPING_METHODS:
        return
    yield str(n + 1)
    if n != 0:
        yield str(n - 1)


def compare(node: ast.AST, source: Source) -> Iterator[str]:
    """> ↔ >= and < ↔ <=; == ↔ != and the like, unless the comparison is the whole condition."""
    if not isinstance(node, ast.Compare):
        return
    operands = [source.atom(operand) for operand in (node.left, *node.comparators)]
    whole = _is_condition(node, source)
    for changed, op in enumerate(node.ops):
        if whole and not isinstance(op, _ORDERS):
            continue
        words = [_COMPARISONS[type(o)][i == changed] for i, o in enumerate(node.ops)]
        rest = (f" {word} {operand}" for word, operand in zip(words, operands[1:], strict=True))
        yield operands[0] + "".join(rest)


def drop_check(node: ast.AST, source: Source) -> Iterator[str]:
    """`if …: raise` → `if False: raise`, and check_something(…) → pass."""
    match node:
        case ast.Expr(ast.Call(func)) if _name(func).lstrip("_").startswith("check"):
            yield "pass"
        case ast.expr() if _is_condition(node, source) and _guards(source.parent(node)):
            yield "False"


def drop_need(node: ast.AST, source: Source) -> Iterator[str]:
    """`x if need.input else None` → x and None, whatever is needed; need.input ↔ need.params."""
    match node:
        case ast.Attribute(ast.Name("need") as need, "input" | "params" as name):
            yield f"{need.id}.{'params' if name == 'input' else 'input'}"
    if _is_condition(node, source) and _asks_for_need(node):
        yield from ("True", "False")


def condition(node: ast.AST, source: Source) -> Iterator[str]:
    """Every other condition → True and False. A loop does not run forever."""
    if not _is_condition(node, source) or _asks_for_need(node):
        return
    parent = source.parent(node)
    if not _guards(parent):
        if not isinstance(parent, ast.While):
            yield "True"
        yield "False"


def flip_flag(node: ast.AST, source: Source) -> Iterator[str]:
    """True ↔ False, in calls and elsewhere."""
    match node:
        case ast.Constant(bool(flag)):
            yield str(not flag)


def drop_call(node: ast.AST, source: Source) -> Iterator[str]:
    """x.clone() → x, list(x) → x, x.mT → x."""
    match node:
        case ast.Call(ast.Attribute(value, name)) if name in _DROPPED_METHODS:
            yield source.atom(value)
        case ast.Call(ast.Attribute(value, "contiguous")):
            match source.parent(node):
                case ast.Return() | ast.Attribute(attr="view"):
                    yield source.atom(value)
        case ast.Call(ast.Name(name), [arg], []) if name in _DROPPED_FUNCTIONS:
            yield source.atom(arg)
        case ast.Attribute(value, name) if name in _DROPPED_ATTRIBUTES:
            yield source.atom(value)


def drop_argument(node: ast.AST, source: Source) -> Iterator[str]:
    """f(x, key=key) → f(x): the function takes its default, which of `strict` is False."""
    match node:
        case ast.Call(args=args, keywords=keywords):
            for dropped in keywords:
                if dropped.arg is not None and source.text(dropped) != "strict=False":
                    yield source.call(node, args, [k for k in keywords if k is not dropped])


def swap_arguments(node: ast.AST, source: Source) -> Iterator[str]:
    """torch.f(a, b) → torch.f(b, a), and x.permute(0, 2, 1) → x.permute(2, 0, 1)."""
    match node:
        case ast.Call(func, args, keywords) if _name(func) not in _COMMUTATIVE:
            if _library(func) or _name(func) in _ORDERED_METHODS:
                for swapped in _swaps(args, source):
                    yield source.call(node, swapped, keywords)


def swap_elements(node: ast.AST, source: Source) -> Iterator[str]:
    """(a, b) → (b, a), for results, arguments, indices and what is assigned to."""
    if not isinstance(node, ast.Tuple) or _is_axis(node, source):
        return
    match source.parent(node):
        case ast.Compare() | ast.For() | ast.comprehension() | ast.ExceptHandler():
            return
        case ast.Call(func) if _name(func) in _UNORDERED:
            return
        case ast.Subscript():
            for swapped in _swaps(node.elts, source):
                yield ", ".join(map(source.text, swapped))
        case _:
            for swapped in _swaps(node.elts, source):
                yield _tuple(map(source.text, swapped))


def sibling(node: ast.AST, source: Source) -> Iterator[str]:
    """torch.tanh → torch.sigmoid, min → max, floor → ceil, add_ → sub_."""
    match node:
        case ast.Attribute(value, name) if name in _SIBLINGS and _is_called(node, source):
            yield f"{source.atom(value)}.{_SIBLINGS[name]}"
        case ast.Name(name) if name in _SIBLING_NAMES and _is_called(node, source):
            yield _SIBLINGS[name]


def drop_statement(node: ast.AST, source: Source) -> Iterator[str]:
    """x.add_(y) → pass, and x += y → pass."""
    match node:
        case ast.Expr(ast.Call(func)) if not _name(func).lstrip("_").startswith("check"):
            yield "pass"
        case ast.AugAssign():
            yield "pass"


OPERATORS: dict[str, Operator] = {
    function.__name__.replace("_", "-"): function
    for function in (
        swap_operands,
        drop_term,
        flip_sign,
        sum_or_mean,
        shift_axis,
        off_by_one,
        compare,
        drop_check,
        drop_need,
        condition,
        flip_flag,
        drop_call,
        drop_argument,
        swap_arguments,
        swap_elements,
        sibling,
        drop_statement,
    )
}


def _name(func: ast.AST) -> str:
    """Return the last part of a function's name: "sum" for x.sum."""
    match func:
        case ast.Name(name) | ast.Attribute(attr=name):
            return name
    return ""


def _library(func: ast.AST) -> bool:
    """Whether a function is named by its library, as in torch.ops.aten.f."""
    while isinstance(func, ast.Attribute):
        func = func.value
        if isinstance(func, ast.Name):
            return func.id in _LIBRARIES
    return False


def _is_called(node: ast.AST, source: Source) -> bool:
    parent = source.parent(node)
    return isinstance(parent, ast.Call) and parent.func is node


def _is_tensor_result(node: ast.AST, source: Source) -> bool:
    """Whether a function that promises a tensor returns this node."""
    parent = source.parent(node)
    if not isinstance(parent, ast.Return):
        return False
    while not isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)):
        parent = source.parent(parent)
    return parent.returns is not None and "Tensor" in source.text(parent.returns)


def _is_text(node: ast.AST) -> bool:
    """Whether an operation has a str among its operands."""
    return any(
        isinstance(part, ast.JoinedStr)
        or (isinstance(part, ast.Constant) and isinstance(part.value, (str, bytes)))
        for part in (node, getattr(node, "left", None), getattr(node, "right", None))
    )


def _is_int(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int


def _integer(node: ast.AST) -> int | None:
    """Return the integer that a literal is, a negative one too."""
    match node:
        case ast.UnaryOp(ast.USub(), ast.Constant(int(n))):
            return -n
        case ast.Constant(int(n)) if type(n) is int:
            return n
    return None


def _is_negated(node: ast.AST, source: Source) -> bool:
    """Whether a literal is the 1 of -1."""
    parent = source.parent(node)
    return isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.USub)


def _is_axis(node: ast.AST, source: Source) -> bool:
    """Whether a literal, or a tuple of them, is passed as an axis."""
    literals = node.elts if isinstance(node, ast.Tuple) else [node]
    if any(_integer(literal) is None for literal in literals):
        return False
    match source.parent(node):
        case ast.keyword(name):
            return name in _AXIS_KEYWORDS
        case ast.Call(ast.Attribute() as func, args) if node in args:
            numbers = [arg for arg in args if _integer(arg) is not None or arg is node]
            return _name(func) in _AXES or (_name(func) in _FIRST_AXIS and numbers[0] is node)
    return False


def _is_condition(node: ast.AST, source: Source) -> bool:
    match source.parent(node):
        case ast.If(test) | ast.IfExp(test) | ast.While(test):
            return test is node
        case ast.comprehension(ifs=ifs):
            return node in ifs
    return False


def _guards(statement: ast.AST) -> bool:
    """Whether a statement does nothing but refuse."""
    return isinstance(statement, ast.If) and all(isinstance(s, ast.Raise) for s in statement.body)


def _asks_for_need(node: ast.AST) -> bool:
    names = (getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(node))
    return not _NEEDS.isdisjoint(names)


def _swaps(nodes: list[ast.expr], source: Source) -> Iterator[list[ast.expr]]:
    """Yield the nodes with two neighbours swapped, for all that differ."""
    for i, (a, b) in enumerate(pairwise(nodes)):
        starred = isinstance(a, ast.Starred) or isinstance(b, ast.Starred)
        if not starred and source.text(a) != source.text(b):
            yield [*nodes[:i], b, a, *nodes[i + 2 :]]


def _tuple(texts: Iterator[str]) -> str:
    parts = list(texts)
    return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"
