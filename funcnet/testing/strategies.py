"""Hypothesis strategies: layers with random hyperparameters, and tensors that fit them.

    layers()                one layer of the vocabulary: any of the next four
    conv2d()  upsample2d()  upsample_conv2d()  activations()
    networks()              Sequentials, nested ones and the empty one among them
    losses()
    cases(layers())         (layer, params, x) that fit together, of networks and one's own too
    loss_cases()            (loss, x, target)
    shapes(layer)           shapes of one example that a layer takes
    tensors(shape)          tensors of a shape, in any memory layout
    dtypes()                float64 and float32
    trees()                 nested dicts, lists, tuples, None, … of tensors
    invalid_layers()        (make, error, message): make() raises error with this message in it

Everything shrinks to the smallest network, kernel, channel count and size. The awkward cases are
always in reach: strides that leave a remainder, padding beyond the kernel's reach, dilation with
stride, groups, pictures of size 1, batches of 0, 1 and 3, expanded, strided and channels_last
tensors, exact zeros and ties. Numbers come from one drawn seed, so that drawing is fast.

    >>> from hypothesis import given
    >>> import funcnet as fn
    >>> from funcnet.testing import check_vjp, strategies
    >>> @given(strategies.layers())
    ... def test_repr_builds_the_layer(layer):
    ...     assert eval(f"fn.{layer!r}") == layer
    >>> @given(strategies.cases(strategies.layers()))
    ... def test_every_gradient_is_right(case):
    ...     layer, params, x = case
    ...     check_vjp(layer, params, x)

A strategy over a layer of one's own is a strategy for its hyperparameters; the shapes that it takes
are found by asking its `out_shape`, which refuses others by a ValueError:

    >>> from hypothesis import strategies as st
    >>> my_layers = st.builds(fn.Conv2d, st.integers(1, 4), st.integers(1, 3))
    >>> @given(strategies.cases(my_layers, dtypes=st.just(torch.float64)))
    ... def test_my_gradient_is_right(case):
    ...     check_vjp(*case)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "funcnet.testing.strategies needs hypothesis: pip install 'funcnet[test]'", name=error.name
    ) from error

from funcnet.combinators import Sequential
from funcnet.keys import key as make_key
from funcnet.layer import Layer, Shape, Tree
from funcnet.layers import Conv2d, ReLU, Sigmoid, Upsample2d, UpsampleConv2d
from funcnet.losses import MSE, Loss
from funcnet.testing.layouts import LAYOUTS, fits, laid_out
from funcnet.tree import register_node

Strategy: TypeAlias = st.SearchStrategy

_LARGEST_SIDE = 512
_MOST_CHANNELS = 12


# --- Layers


def layers() -> Strategy[Layer]:
    """Any layer of the vocabulary, with any hyperparameters."""
    return st.one_of(activations(), upsample2d(), conv2d(), upsample_conv2d())


def activations() -> Strategy[Layer]:
    """ReLU and Sigmoid."""
    return st.sampled_from([ReLU(), Sigmoid()])


def upsample2d(max_scale: int = 3) -> Strategy[Upsample2d]:
    """Upsample2d with any scale, or two."""
    return st.builds(Upsample2d, _sides(1, max_scale))


@st.composite
def conv2d(
    draw: st.DrawFn,
    max_channels: int = 4,
    max_kernel: int = 4,
    max_stride: int = 3,
    max_padding: int = 4,
    max_dilation: int = 3,
    groups: Strategy[int] | None = None,
    methods: Sequence[str] = ("auto", "unfold"),
) -> Conv2d:
    """Conv2d with any hyperparameters. `groups` are those it may have, by default any up to 3."""
    group_count = draw(st.sampled_from([1, 2, 3]) if groups is None else groups)
    multiples = [m for m in range(1, max_channels + 1) if m * group_count <= max_channels] or [1]
    kernel_size = draw(_sides(1, max_kernel))
    stride = draw(st.sampled_from([*_pairs(1, max_stride), *[kernel_size] * max_stride]))
    paddings = [*_pairs(0, max_padding), *["valid"] * 3]
    if stride == (1, 1):
        paddings += ["same"] * 10
    return Conv2d(
        group_count * draw(st.sampled_from(_repeated(multiples, max_channels))),
        kernel_size,
        stride=stride,
        padding=draw(st.sampled_from(paddings)),
        dilation=draw(_sides(1, max_dilation)),
        groups=group_count,
        bias=draw(st.booleans()),
        method=draw(st.sampled_from(methods)),
    )


def upsample_conv2d(
    max_channels: int = 4,
    max_kernel: int = 4,
    max_scale: int = 3,
    max_padding: int = 3,
    methods: Sequence[str] = ("auto", "unfold"),
) -> Strategy[UpsampleConv2d]:
    """UpsampleConv2d with any hyperparameters."""
    return st.builds(
        UpsampleConv2d,
        st.integers(1, max_channels),
        _sides(1, max_kernel),
        scale=_sides(1, max_scale),
        padding=st.sampled_from([*_pairs(0, max_padding), *["valid", "same"] * 4]),
        bias=st.booleans(),
        method=st.sampled_from(methods),
    )


@st.composite
def networks(draw: st.DrawFn, max_layers: int = 4, max_depth: int = 2) -> Sequential:
    """Sequentials of up to `max_layers` layers, some of them Sequentials, down to `max_depth`."""
    return _network(draw, _Channels(), max_layers, max_depth)


def losses() -> Strategy[Loss]:
    """MSE with any reduction."""
    return st.builds(MSE, st.sampled_from(["sum", "mean"]))


class _Channels:
    """How many channels the network has so far, None before a layer has settled it."""

    count: int | None = None


def _network(draw: st.DrawFn, channels: _Channels, max_layers: int, depth: int) -> Sequential:
    parts: list[Layer] = []
    for _ in range(draw(st.integers(0, max_layers))):
        kinds = ["activation", "conv", "upsample", "upsample_conv", *(["network"] if depth else [])]
        kind = draw(st.sampled_from(kinds))
        if kind == "network":
            parts.append(_network(draw, channels, 2, depth - 1))
            continue
        layer = draw(_part(kind, channels.count))
        channels.count = getattr(layer, "out_channels", channels.count)
        parts.append(layer)
    return Sequential(*parts)


def _part(kind: str, channels: int | None) -> Strategy[Layer]:
    """A layer that takes this many channels, and does not change sizes by much."""
    if kind == "activation":
        return activations()
    if kind == "upsample":
        return upsample2d(max_scale=2)
    if kind == "upsample_conv":
        return upsample_conv2d(max_channels=3, max_kernel=3, max_scale=2, max_padding=2)
    divisors = [d for d in (1, 2, 3) if channels is None or channels % d == 0]
    return conv2d(
        max_channels=3, max_kernel=3, max_stride=2, max_padding=2, max_dilation=2,
        groups=st.sampled_from(divisors),
    )  # fmt: skip


# --- Tensors


def dtypes() -> Strategy[torch.dtype]:
    """float64 and float32."""
    return st.sampled_from([torch.float64, torch.float32])


@st.composite
def shapes(draw: st.DrawFn, layer: Layer, max_extra: int = 3) -> Shape:
    """Shapes (C, H, W) of one example that a layer takes: up to `max_extra` above the smallest.

    Raises ValueError if the layer's out_shape refuses all that this knows how to try.
    """
    widest = _LARGEST_SIDE
    fitting = [c for c in range(1, _MOST_CHANNELS + 1) if takes(layer, (c, widest, widest))]
    if not fitting:
        raise ValueError(f"shapes: expected a layer that takes (C, H, W) for some C, got {layer}")
    channels = draw(st.sampled_from(_repeated(fitting[:3], 3)))
    least_height = _least(lambda height: takes(layer, (channels, height, widest)))
    least_width = _least(lambda width: takes(layer, (channels, widest, width)))
    extra = st.integers(0, max_extra)
    return channels, least_height + draw(extra), least_width + draw(extra)


def takes(layer: Layer, shape: Shape) -> bool:
    """Whether the layer's out_shape accepts the shape of one example."""
    try:
        layer.out_shape(shape)
    except (ValueError, TypeError):
        return False
    return True


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: Sequence[int] | Strategy[Shape] = (2, 3),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layouts: Sequence[str] = LAYOUTS,
    integers: bool | None = None,
) -> Tensor:
    """Tensors of a shape, or of one drawn from a strategy, in any of the `layouts`.

    Numbers are small integers, on which sums and products are exact, if `integers` is True, drawn
    from N(0, 1) if it is False, and either if it is None.
    """
    if isinstance(shape, st.SearchStrategy):
        shape = draw(shape)
    exact = draw(st.booleans()) if integers is None else integers
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    if exact:
        x = torch.randint(-3, 4, tuple(shape), generator=generator, device="cpu").to(dtype)
    else:
        double = torch.float64
        x = torch.randn(tuple(shape), generator=generator, dtype=double, device="cpu").to(dtype)
    fitting = [layout for layout in layouts if fits(layout, x.ndim)]
    return laid_out(x.to(device), draw(st.sampled_from(fitting)))


class FittingCase(NamedTuple):
    """A layer with parameters and an input that fit it."""

    layer: Layer
    params: Tree
    x: Tensor


class FittingLossCase(NamedTuple):
    """A loss with two tensors of one shape."""

    loss: Loss
    x: Tensor
    target: Tensor


_any_layers, _any_dtypes, _any_losses = layers, dtypes, losses  # below, arguments hide the names


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
) -> FittingCase:
    """(layer, params, x) that fit together, of any layers; by default of any layer or network.

    `shapes` gives the shapes of one example, or makes such a strategy from a layer. Parameters are
    the layer's own `init`, or small integers where `integers` is True.
    """
    layer = draw(st.one_of(_any_layers(), networks()) if layers is None else layers)
    shape = draw(shapes if isinstance(shapes, st.SearchStrategy) else shapes(layer))
    batch = draw(st.sampled_from([1, 2, 3, 0]) if batches is None else batches)
    dtype = draw(_any_dtypes() if dtypes is None else dtypes)
    x = draw(tensors((batch, *shape), dtype, device, layouts, integers))
    params = layer.init(make_key(draw(st.integers(0, 2**16))), shape, dtype=dtype, device=device)
    if integers:
        params = optree.tree_map(lambda leaf: (leaf * 8).round().clamp(-3, 3), params)
    return FittingCase(layer, params, x)


@st.composite
def loss_cases(
    draw: st.DrawFn,
    losses: Strategy[Loss] | None = None,
    *,
    dtypes: Strategy[torch.dtype] | None = None,
    device: torch.device | str = "cpu",
    layouts: Sequence[str] = LAYOUTS,
) -> FittingLossCase:
    """(loss, x, target) with tensors of up to 4 axes."""
    loss = draw(_any_losses() if losses is None else losses)
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = draw(_any_dtypes() if dtypes is None else dtypes)
    x = draw(tensors(shape, dtype, device, layouts))
    return FittingLossCase(loss, x, draw(tensors(shape, dtype, device, layouts)))


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
    sizes = {"out_channels": 1, "kernel_size": 1, "padding": 0}
    return st.one_of(
        _bad_numbers(Conv2d, {**sizes, "stride": 1, "dilation": 1, "groups": 1}),
        _bad_numbers(UpsampleConv2d, {**sizes, "scale": 1}),
        _bad_numbers(Upsample2d, {"scale": 1}),
        _bad_options(),
        _bad_groups(),
    )


@st.composite
def _bad_numbers(draw: st.DrawFn, cls: type[Layer], least: dict[str, int]) -> Invalid:
    """One number too small, not an int, or not as many as there should be."""
    good: dict[str, Any] = {
        name: 1 for name in ("out_channels", "kernel_size", "scale") if name in least
    }
    name = draw(st.sampled_from(sorted(least)))
    small = draw(st.integers(-3, least[name] - 1))
    choices: list[tuple[Any, type[Exception], str]] = [
        (small, ValueError, f" >= {least[name]}, got {small}"),
        (1.5, TypeError, " to be an int, got 1.5"),
        (True, TypeError, " to be an int, got True"),
        (None, TypeError, " to be an int, got None"),
    ]
    if name not in ("out_channels", "groups"):
        choices.append(((1, small), ValueError, f" >= {least[name]}, got {small}"))
        choices.append(((1, 2, 3), ValueError, " to be an int or a pair of ints, got (1, 2, 3)"))
    value, error, complaint = draw(st.sampled_from(choices))
    message = f"{cls.__name__}: expected {name}{complaint}"
    return Invalid(lambda: cls(**{**good, name: value}), error, message)


@st.composite
def _bad_options(draw: st.DrawFn) -> Invalid:
    cls = draw(st.sampled_from([Conv2d, UpsampleConv2d]))
    name, value, error = draw(
        st.sampled_from(
            [
                ("bias", 1, TypeError),
                ("bias", None, TypeError),
                ("method", "fast", ValueError),
                ("method", None, ValueError),
                ("padding", "full", ValueError),
            ]
        )
    )
    return Invalid(lambda: cls(1, 1, **{name: value}), error, f"{cls.__name__}: expected {name}")


@st.composite
def _bad_groups(draw: st.DrawFn) -> Invalid:
    """Groups that do not divide the channels, and "same" with a stride."""
    groups = draw(st.integers(2, 5))
    out_channels = groups * draw(st.integers(0, 3)) + draw(st.integers(1, groups - 1))
    channels = groups * draw(st.integers(0, 3)) + draw(st.integers(1, groups - 1))
    stride = draw(_sides(1, 3).filter(lambda pair: pair != (1, 1)))
    not_dividing_outputs = Invalid(
        lambda: Conv2d(out_channels, 1, groups=groups),
        ValueError,
        f"Conv2d: expected groups to divide out_channels={out_channels}, got groups={groups}",
    )
    not_dividing_inputs = Invalid(
        lambda: Conv2d(groups, 1, groups=groups).out_shape((channels, 8, 8)),
        ValueError,
        f"expected channels that groups={groups} divides, got {channels}",
    )
    same_with_stride = Invalid(
        lambda: Conv2d(1, 1, stride=stride, padding="same"),
        ValueError,
        'Conv2d: expected stride 1 with padding="same", got',
    )
    choices = st.sampled_from([not_dividing_outputs, not_dividing_inputs, same_with_stride])
    chosen: Invalid = draw(choices)
    return chosen


def _sides(least: int, most: int) -> Strategy[tuple[int, int]]:
    """(height, width), as often alike as not."""
    return st.sampled_from(_pairs(least, most))


def _pairs(least: int, most: int) -> list[Any]:
    """All pairs, the simplest first, those alike several times.

    One choice from a list, because Hypothesis thinks fewer choices simpler than smaller numbers.
    """
    sides = range(least, most + 1)
    squares = [(n, n) for n in sides]
    others = [(m, n) for m in sides for n in sides if m != n]
    return squares + sorted(others, key=max) + squares * (len(sides) - 1)


def _repeated(values: list[int], count: int) -> list[int]:
    """At least `count` of the values, so that there is always a choice of as many."""
    return (values * count)[: max(count, len(values))]


def _least(fits: Callable[[int], bool]) -> int:
    return next((n for n in range(1, _LARGEST_SIDE) if fits(n)), _LARGEST_SIDE)
