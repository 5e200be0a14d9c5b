"""Hypothesis strategies: layers with random hyperparameters, and tensors that fit them.

    layers()                any layer but Sequential, BatchNorm (needs a key) and Embedding (takes
                            integers); layers(Conv2d, ReLU) any of these
    networks()              Sequentials of such layers, nested ones and the empty one among them
    losses()                any loss; losses(MSE, L1) any of these
    cases(layers())         (layer, params, x) that fit together, of networks and one's own too
    loss_cases()            (loss, x, target)
    targets(loss, x)        targets that a loss takes beside x
    shapes(layer)           shapes of one example that a layer takes
    tensors(shape)          tensors of a shape, in any memory layout, of any kind of numbers
    integers(shape, 10)     int64 and int32 tensors of numbers below 10
    keys()                  keys
    dtypes()                float64 and float32
    trees()                 nested dicts, lists, tuples, None, … of tensors
    invalid_layers()        (make, error, message): make() raises error with this message in it

Layers, their settings and their shapes come from the registry. Everything shrinks to the smallest
network, kernel, channel count and size. The awkward cases are always in reach: strides that leave
a remainder, padding beyond the kernel's reach, dilation with stride, groups, images of size 1,
batches of 0, 1 and 3, expanded, strided and channels_last tensors, exact zeros and ties. Numbers
come from one drawn seed, so that drawing is fast.

    >>> from hypothesis import given, settings
    >>> import funcnet as fn
    >>> from funcnet.testing import check_vjp, strategies
    >>> @settings(deadline=None)
    ... @given(strategies.layers())
    ... def test_repr_builds_the_layer(layer):
    ...     assert eval(f"fn.{layer!r}") == layer
    >>> @settings(deadline=None)
    ... @given(strategies.cases(strategies.layers()))
    ... def test_every_gradient_is_right(case):
    ...     layer, params, x = case
    ...     check_vjp(layer, params, x)

A strategy over a layer of one's own is a strategy for its hyperparameters; the shapes that it takes
are found by asking its `out_shape`, which refuses others by a ValueError:

    >>> from hypothesis import strategies as st
    >>> my_layers = st.builds(fn.Conv2d, st.integers(1, 4), st.integers(1, 3))
    >>> @settings(deadline=None)
    ... @given(strategies.cases(my_layers, dtypes=st.just(torch.float64)))
    ... def test_my_gradient_is_right(case):
    ...     check_vjp(*case)
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import lru_cache, partial
from itertools import islice, product
from typing import Any, NamedTuple, TypeAlias, TypeVar

import optree
import torch
from torch import Tensor

try:
    from hypothesis import reject
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "funcnet.testing.strategies needs hypothesis: pip install 'funcnet[test]'", name=error.name
    ) from error

from funcnet.checks import name_of, shown
from funcnet.combinators import Sequential
from funcnet.fields import Number, OneOf, PerAxis, Whole, kinds
from funcnet.keys import Key
from funcnet.keys import key as make_key
from funcnet.layer import Layer, Shape, Tree
from funcnet.losses import Loss
from funcnet.testing.layouts import LAYOUTS, fits, laid_out
from funcnet.testing.registry import LOSSES, REGISTRY, LossRow, Row, draw_target
from funcnet.tree import register_node

Strategy: TypeAlias = st.SearchStrategy

_DRAWS = 8
"""The most layers drawn for a place in a network until one fits."""
_LARGEST = 4096
"""The most entries of an example in a random network."""


_Row = TypeVar("_Row", Row, LossRow)


# --- Layers


@st.composite
def layers(draw: st.DrawFn, *classes: type[Layer]) -> Layer:
    """Any layer that evaluates without a key and takes floating-point x, or any of these classes,
    with any hyperparameters."""
    row = _row_of(REGISTRY, draw(st.sampled_from(classes or _leaves())))
    try:
        return row.draw(lambda some: draw(st.sampled_from(list(some))))
    except ValueError:
        reject()


def _row_of(rows: Mapping[Any, _Row], cls: type) -> _Row:
    """The row of a class. Raises TypeError if there is none."""
    if not isinstance(cls, type) or cls not in rows:
        raise TypeError(f"strategies: expected a class in the registry, got {_instead(cls)}")
    return rows[cls]


def _expect_strategy(who: str, of: str, given: Any) -> None:
    """Raise TypeError unless this is a strategy, which Hypothesis does not look at."""
    if not isinstance(given, st.SearchStrategy):
        raise TypeError(f"{who}: expected a strategy of {of}, got {_instead(given)}")


def _instead(given: Any) -> str:
    """Describe what came, and the strategy that draws a layer, a loss or a class of such."""
    if isinstance(given, type):
        return f"{given.__name__}; st.builds({given.__name__}, …) draws one of your own"
    is_one = isinstance(given, (Layer, Loss))
    return f"{shown(given)}; st.just({shown(given)}) draws it" if is_one else shown(given)


def _leaves() -> tuple[type[Layer], ...]:
    """The classes drawn by default: they evaluate without a key and take floating-point x, so that
    they fit behind any other layer."""
    return tuple(
        cls
        for cls, row in REGISTRY.items()
        if not row.needs_key and row.classes is None and not issubclass(cls, Sequential)
    )


@st.composite
def networks(
    draw: st.DrawFn,
    max_layers: int = 4,
    max_depth: int = 2,
    parts: Strategy[Layer] | None = None,
    first: Strategy[Layer] | None = None,
) -> Sequential:
    """Sequentials of up to `max_layers` layers, some of them Sequentials, down to `max_depth`.

    The layers are any of `layers()` that fit each other, or what `parts` draws of them. `first`
    draws the layer in front: `layers(Embedding)` for networks that take integers.
    """
    shape = draw(st.sampled_from(_FIRST_SHAPES))
    parts = layers() if parts is None else parts
    _expect_strategy("networks", "layers", parts)
    if first is None:
        return _network(draw, parts, shape, max_layers, max_depth)[0]
    _expect_strategy("networks", "layers", first)
    head = _fitting(draw, first, shape)
    if head is None:
        reject()
    rest, _ = _network(draw, parts, head.out_shape(shape), max_layers - 1, max_depth)
    return Sequential(head, *rest)


_FIRST_SHAPES = ((2, 4, 4), (4, 8), (4,), (6, 5, 4), (3, 12))


def _network(
    draw: st.DrawFn, parts: Strategy[Layer], shape: Shape, max_layers: int, depth: int
) -> tuple[Sequential, Shape]:
    """A network that takes examples of `shape`, and the shape of one example of its y."""
    chosen: list[Layer] = []
    empty = draw(_rarely())
    for _ in range(0 if empty else draw(st.integers(min(1, max_layers), max_layers))):
        layer: Layer
        if depth and draw(st.integers(0, 4)) == 4:
            layer, out = _network(draw, parts, shape, 2, depth - 1)
        else:
            found = _fitting(draw, parts, shape)
            if found is None:
                continue
            layer, out = found, found.out_shape(shape)
        if 0 < math.prod(out) <= _LARGEST:
            chosen.append(layer)
            shape = out
    return Sequential(*chosen), shape


def _fitting(draw: st.DrawFn, parts: Strategy[Layer], shape: Shape) -> Layer | None:
    """A layer that takes examples of a shape; None if several draws find none."""
    for _ in range(_DRAWS):
        layer = draw(parts)
        if takes(layer, shape):
            return layer
    return None


@st.composite
def losses(draw: st.DrawFn, *classes: type[Loss]) -> Loss:
    """Any loss, or any of these classes, with any hyperparameters."""
    row = _row_of(LOSSES, draw(st.sampled_from(classes or tuple(LOSSES))))
    return row.draw(lambda some: draw(st.sampled_from(list(some))))


# --- Tensors


def dtypes() -> Strategy[torch.dtype]:
    """float64 and float32."""
    return st.sampled_from([torch.float64, torch.float32])


@st.composite
def shapes(draw: st.DrawFn, layer: Layer, max_extra: int = 3) -> Shape:
    """Shapes of one example that a layer takes, sizes up to `max_extra` choices above the least.

    Raises ValueError if the layer's out_shape refuses all that this knows how to try.
    """
    starts = _least_shapes(layer)
    if not starts:
        raise ValueError(
            f"shapes: expected a layer that takes some small shape, got {name_of(layer)}"
        )
    shape = draw(st.sampled_from(starts))
    for axis, least in enumerate(shape):
        others = [(*shape[:axis], n, *shape[axis + 1 :]) for n in range(least, least + 13)]
        fitting = [other for other in others if takes(layer, other)]
        shape = draw(st.sampled_from((fitting[: max_extra + 1] * 4)[: max(4, max_extra + 1)]))
    return shape


_SIZES = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 20, 27)
_LARGE = 512


@lru_cache(maxsize=4096)
def _least_shapes(layer: Layer) -> tuple[Shape, ...]:
    """The least shape that a layer takes of each rank, of images first.

    A layer that the registry does not know, or a network, may refuse elsewhere what `out_shape`
    accepts: of its shapes only the first is taken.
    """
    axes = layer._axes
    ranks = (3, 2, 1, 4, 0) if axes is None or "…" in axes else (len(axes),)
    found = (_least_shape(layer, rank) for rank in ranks)
    fitting = (shape for shape in found if shape is not None)
    is_known = type(layer) in REGISTRY and not layer._children()
    return tuple(fitting if is_known else islice(fitting, 1))


def _least_shape(layer: Layer, rank: int) -> Shape | None:
    """The least shape of a rank; of large images, only the channels are searched for."""
    large = ((channels, *(_LARGE,) * (rank - 1)) for channels in _SIZES if rank > 1)
    for shape in large:
        if takes(layer, shape):
            return _shrunk(layer, shape)
    sizes = _SIZES if rank < 4 else (1, 2, 3, 4, 6)
    candidates = sorted(product(sizes, repeat=rank), key=lambda shape: (sum(shape), shape))
    return next((shape for shape in candidates if takes(layer, shape)), None)


def _shrunk(layer: Layer, shape: Shape) -> Shape:
    """The shape with each size as small as the layer takes it, one axis after the other."""
    for axis in range(len(shape)):
        others = ((*shape[:axis], n, *shape[axis + 1 :]) for n in range(1, shape[axis] + 1))
        shape = next(other for other in others if takes(layer, other))
    return shape


def takes(layer: Layer, shape: Shape) -> bool:
    """Whether the layer's out_shape accepts the shape of one example."""
    try:
        return min(layer.out_shape(shape), default=1) > 0
    except (ValueError, TypeError, IndexError):
        return False


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: Sequence[int] | Strategy[Shape] = (2, 3),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layouts: Sequence[str] = LAYOUTS,
    integers: bool | None = None,
    values: Sequence[str] = ("normal", "integers"),
) -> Tensor:
    """Tensors of a shape, or of one drawn from a strategy, in any of the `layouts`.

    `values` names the kinds of numbers, among `VALUES`. `integers` True stands for small integers
    alone, on which sums and products are exact, and False for all other kinds.
    """
    if isinstance(shape, st.SearchStrategy):
        shape = draw(shape)
    if integers is not None:
        others = [kind for kind in values if kind != "integers"]
        values = ["integers"] if integers else others
    kind = draw(st.sampled_from(list(values)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = VALUES[kind](tuple(shape), generator).to(dtype)
    fitting = [layout for layout in layouts if fits(layout, x.ndim)]
    return laid_out(x.to(device), draw(st.sampled_from(fitting)))


def _normal(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _small_integers(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randint(-3, 4, shape, generator=generator, device="cpu").double()


def _infinite(shape: Shape, generator: torch.Generator) -> Tensor:
    x = _normal(shape, generator)
    return torch.where(x.abs() > 1.5, x.sign() * math.inf, x)


VALUES: dict[str, Callable[[Shape, torch.Generator], Tensor]] = {
    "normal": _normal,
    "integers": _small_integers,
    "tied": lambda shape, generator: (2 * _normal(shape, generator)).round() / 2,
    "constant": lambda shape, generator: _normal((1,) * len(shape), generator).expand(shape),
    "saturated": lambda shape, generator: 30 * _normal(shape, generator),
    "infinite": _infinite,
}
"""Kinds of numbers: N(0, 1), integers from −3 to 3, many ties, one number, some large enough to
saturate a sigmoid, and some infinite."""
FINITE = tuple(kind for kind in VALUES if kind != "infinite")
"""The kinds of numbers without infinite ones."""


@st.composite
def integers(
    draw: st.DrawFn,
    shape: Sequence[int] | Strategy[Shape],
    classes: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """int64 and int32 tensors of numbers from 0 to `classes` − 1."""
    if isinstance(shape, st.SearchStrategy):
        shape = draw(shape)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    x = torch.randint(classes, tuple(shape), generator=generator, device="cpu", dtype=dtype)
    return x.to(device)


class FittingCase(NamedTuple):
    """A layer with parameters and an input that fit it."""

    layer: Layer
    params: Tree
    x: Tensor


class FittingLossCase(NamedTuple):
    """A loss with x and a target that fit it."""

    loss: Loss
    x: Tensor
    target: Tensor


def keys() -> Strategy[Key]:
    """Keys from any seed."""
    return st.integers(0, 2**64 - 1).map(make_key)


# Below, arguments hide the names.
_any_layers, _any_dtypes, _any_losses, _any_integers = layers, dtypes, losses, integers


@st.composite
def cases(
    draw: st.DrawFn,
    layers: Strategy[Layer] | None = None,
    *,
    shapes: Strategy[Shape] | Callable[[Layer], Strategy[Shape]] = shapes,
    batches: Strategy[int] | None = None,
    dtypes: Strategy[torch.dtype] | None = None,
    device: torch.device | str = "cpu",
    layouts: Sequence[str] = LAYOUTS,
    integers: bool | None = None,
    values: Sequence[str] = ("normal", "integers"),
) -> FittingCase:
    """(layer, params, x) that fit together, of any layers; by default of any layer or network.

    `shapes` gives the shapes of one example, or makes such a strategy from a layer. Parameters are
    the layer's own `init`, or small integers where `integers` is True. `values` names the kinds of
    numbers in x, among `VALUES`; `FINITE` are all but infinite ones.
    """
    layers = st.one_of(_any_layers(), networks()) if layers is None else layers
    _expect_strategy("cases", "layers", layers)
    layer = draw(layers)
    shape = draw(shapes if isinstance(shapes, st.SearchStrategy) else shapes(layer))
    batch = draw(_batches() if batches is None else batches)
    if layer.couples_examples:  # a single value per channel has no variance
        batch = max(batch, 2 if layer._children() or math.prod(shape[1:]) == 1 else 1)
    dtype = draw(_any_dtypes() if dtypes is None else dtypes)
    classes = _classes(layer)
    if classes is None:
        x = draw(tensors((batch, *shape), dtype, device, layouts, integers, values))
    else:
        x = draw(_any_integers((batch, *shape), classes, device))
    params = layer.init(make_key(draw(st.integers(0, 2**16))), shape, dtype=dtype, device=device)
    if integers:
        params = optree.tree_map(lambda leaf: (leaf * 8).round().clamp(-3, 3), params)
    return FittingCase(layer, params, x)


def _batches() -> Strategy[int]:
    """1, 2 and 3, and rarely 0."""
    return st.tuples(_rarely(), st.integers(1, 3)).map(lambda drawn: 0 if drawn[0] else drawn[1])


def _rarely() -> Strategy[bool]:
    """True once in about 200 times; Hypothesis draws some numbers of a range more often."""
    return st.integers(0, 200).map(lambda n: n == 123)


def _classes(layer: Layer) -> int | None:
    """The number that x's integers are below, if the layer, or the first in it, takes integers."""
    row = REGISTRY.get(type(layer))
    if row is not None and row.classes is not None:
        return row.classes(layer)
    children = layer._children()
    return _classes(children[0][1]) if children else None


@st.composite
def loss_cases(
    draw: st.DrawFn,
    losses: Strategy[Loss] | None = None,
    *,
    dtypes: Strategy[torch.dtype] | None = None,
    device: torch.device | str = "cpu",
    layouts: Sequence[str] = LAYOUTS,
    values: Sequence[str] = ("normal", "integers"),
) -> FittingLossCase:
    """(loss, x, target) that fit together, with x of up to 4 axes."""
    losses = _any_losses() if losses is None else losses
    _expect_strategy("loss_cases", "losses", losses)
    loss = draw(losses)
    rank = LOSSES[type(loss)].rank if type(loss) in LOSSES else 0
    sizes = st.sampled_from([1, 2, 3, 4] * 4 + [0])  # of an empty x, little can be checked
    shape = draw(st.lists(sizes, min_size=rank, max_size=4))
    if rank:
        ignores_the_first = getattr(loss, "ignore_index", None) == 0
        shape[1] = max(shape[1], 2 if ignores_the_first else 1)  # at least one class that counts
    dtype = draw(_any_dtypes() if dtypes is None else dtypes)
    x = draw(tensors(shape, dtype, device, layouts, values=values))
    return FittingLossCase(loss, x, draw(targets(loss, x, layouts, values)))


@st.composite
def targets(
    draw: st.DrawFn,
    loss: Loss,
    x: Tensor,
    layouts: Sequence[str] = LAYOUTS,
    values: Sequence[str] = ("normal", "integers"),
) -> Tensor:
    """Targets that fit a loss and x, in any of the `layouts`; like x for a loss of one's own.

    `values` names the kinds of numbers of a target that may hold any, among `VALUES`.
    """
    row = LOSSES.get(type(loss))
    kind = draw(st.sampled_from(("numbers",) if row is None else row.targets(loss)))
    if kind == "numbers":
        return draw(tensors(tuple(x.shape), x.dtype, x.device, layouts, values=values))
    target = draw_target(kind, loss, x, draw(st.integers(0, 2**32 - 1)))
    fitting = [layout for layout in layouts if fits(layout, target.ndim)]
    return laid_out(target, draw(st.sampled_from(fitting)))


# --- Trees


@register_node
class Two(NamedTuple):
    """A namedtuple for trees."""

    first: Any
    second: Any


def trees(leaves: Strategy[Any] | None = None, max_leaves: int = 8) -> Strategy[Tree]:
    """Nested dicts with str and int keys, OrderedDicts, lists, tuples, namedtuples and None, empty
    ones too, with tensors, or what `leaves` draws, in them."""
    if leaves is None:
        leaves = tensors(st.lists(st.integers(0, 3), max_size=3).map(tuple))

    def nodes(children: Strategy[Any]) -> Strategy[Any]:
        some = st.lists(children, max_size=3)
        # optree sorts keys, which str and int ones allow only apart.
        named = st.one_of(
            st.dictionaries(st.text("ab.0", max_size=2), children, max_size=3),
            st.dictionaries(st.integers(0, 3), children, max_size=3),
        )
        return st.one_of(
            some,
            some.map(tuple),
            named,
            named.map(OrderedDict),
            st.builds(Two, children, children),
        )

    return st.recursive(st.one_of(leaves, st.none()), nodes, max_leaves=max_leaves)


# --- Invalid settings


class Invalid(NamedTuple):
    """`make()` raises `error` with a message that contains `message`."""

    make: Callable[[], Any]
    error: type[Exception]
    message: str


def invalid_layers() -> Strategy[Invalid]:
    """Settings that no layer takes, with the error that each must give."""
    return st.sampled_from(sorted(_invalid(), key=lambda invalid: invalid.message))


def _invalid() -> Iterator[Invalid]:
    """One hyperparameter after the other with each value that its kind refuses."""
    for cls, row in REGISTRY.items():
        good = row.draw(lambda some: some[0])
        required = [f.name for f in fields(cls) if f.init and f.default is MISSING]
        for name, kind in kinds(cls).items():
            for value, error, complaint in _refused(cls, kind):
                settings = {n: getattr(good, n) for n in required} | {name: value}
                message = f"{cls.__name__}: expected {name}{complaint}"
                yield Invalid(partial(cls, **settings), error, message)


def _refused(cls: type[Layer], kind: Any) -> Iterator[tuple[Any, type[Exception], str]]:
    """(value, error, complaint) of what a kind of hyperparameter refuses."""
    if isinstance(kind, (Whole, PerAxis)):
        yield from ((wrong, TypeError, f" to be an int, got {wrong}") for wrong in (1.5, True))
        if kind.least is not None:
            small = kind.least - 1
            yield small, ValueError, f" >= {kind.least}, got {small}"
    if isinstance(kind, PerAxis):
        count = len(cls._axes or "") - 1
        yield (kind.least,) * (count - 1) + (small,), ValueError, f" >= {kind.least}, got {small}"
        many = (1,) * (count + 1)
        yield many, ValueError, " to be an int or "
        if kind.words:
            yield "full", ValueError, " to be an int, "
    elif isinstance(kind, OneOf):
        wrong = 1 if isinstance(kind.choices[0], bool) else "other"
        error = TypeError if wrong == 1 else ValueError
        yield wrong, error, " to be "
        yield None, error, " to be "
    elif isinstance(kind, Number):
        yield "1", TypeError, " to be a number, got '1'"
        yield True, TypeError, " to be a number, got True"
        is_bounded = kind.most < math.inf
        limits = f" in [{kind.least:g}, {kind.most:g}], got "
        for number in (math.nan, math.inf, -math.inf):
            yield number, ValueError, limits if is_bounded else " to be finite"
        if kind.least > -math.inf:
            yield kind.least - 1, ValueError, limits if is_bounded else " to be finite and >= "
        if is_bounded:
            yield kind.most + 1, ValueError, limits
