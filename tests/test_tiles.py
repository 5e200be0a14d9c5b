"""Upsampling convolutions tile by tile: the same numbers as of the whole."""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_upsample_conv import BY_PHASES, arguments, reference
from test_upsample_conv import two_steps as layers_of

import funcnet as fn
from funcnet.ops import low_resolution, phases, processor, tiles, two_steps, upsampling
from funcnet.ops.need import Need
from funcnet.ops.window import Window
from funcnet.testing import strategies

LAYERS = strategies.layers(fn.UpsampleConv2d)
SIDES = st.integers(4, 9)  # room for every kernel
CASES = strategies.cases(
    LAYERS,
    shapes=st.tuples(st.integers(1, 3), SIDES, SIDES),
    batches=st.integers(1, 3),
    dtypes=st.just(torch.float64),
)


WAYS = pytest.mark.parametrize(
    "way",
    [
        low_resolution,
        BY_PHASES,
        two_steps,
    ],
    ids=["low", "phases", "two_steps"],
)


@contextmanager
def small_tiles(most, slack):
    """At most so many entries a tile, and images of `slack` tiles cut."""
    with (
        mock.patch.multiple(low_resolution, _CHUNK_ENTRIES=most, _FEW_ENTRIES=0),
        mock.patch.multiple(phases, _CHUNK_ENTRIES=most),
        mock.patch.multiple(two_steps, _CHUNK_ENTRIES=most),
        mock.patch.multiple(tiles, _SLACK=slack),
    ):
        yield


@WAYS
@given(case=CASES, most=st.integers(1, 300), slack=st.integers(0, 2))
def test_tiles_make_the_whole(way, case, most, slack):
    layer, params, x = case
    x, weight, scale, window = arguments(layer, params, x)
    with small_tiles(most, slack):
        y = way.convolve(x, weight, params.get("bias"), scale, window)
        grad = fn.normal(fn.key(1), y.shape, dtype=x.dtype)
        found = way.gradients(x, weight, grad, scale, window, Need())
    torch.testing.assert_close(y, reference(layer, params, x), rtol=1e-11, atol=1e-11)
    (_, dparams), dx = layers_of(layer).vjp(((), params), x, grad)
    torch.testing.assert_close(found, (dparams["weight"], dx), rtol=1e-10, atol=1e-10)


@given(CASES, st.integers(1, 300), st.integers(0, 2))
def test_outputs_are_in_one_tile_each(case, most, slack):
    layer, params, x = case
    x, _, scale, window = arguments(layer, params, x)
    count = torch.zeros(len(x), 1, *layer.out_shape(x.shape[1:])[1:])
    with mock.patch.multiple(tiles, _SLACK=slack):
        for tile in tiles.cut(x, scale, window, 9, most):
            count[tile.target] += 1
            height, width = x[tile.source].shape[2:]
            sizes = tile.window.count((scale[0] * height, scale[1] * width))
            assert sizes == count[tile.target].shape[2:]
    assert (count == 1).all()


@WAYS
def test_tiles_that_see_nothing_but_padding(way):
    x, weight = fn.normal(fn.key(0), (2, 3, 4, 5)), fn.normal(fn.key(1), (2, 3, 1, 1))
    window = Window((1, 1), sides=((3, 3), (3, 3)))
    whole = way.convolve(x, weight, None, (2, 2), window)
    gradients = way.gradients(x, weight, whole, (2, 2), window, Need())
    with small_tiles(1, 0):
        torch.testing.assert_close(way.convolve(x, weight, None, (2, 2), window), whole)
        found = way.gradients(x, weight, whole, (2, 2), window, Need())
    torch.testing.assert_close(found, gradients)


@WAYS
def test_tiles_lie_in_memory_as_the_whole_does(way):
    x, window = fn.normal(fn.key(0), (2, 3, 6, 7)), fn.UpsampleConv2d(20)._window
    weight = fn.normal(fn.key(1), (20, 3, 3, 3))
    whole = way.convolve(x, weight, None, (2, 2), window)
    _, dx = way.gradients(x, weight, whole, (2, 2), window, Need())
    assert whole.is_contiguous(memory_format=torch.channels_last)
    with small_tiles(300, 0):
        y = way.convolve(x, weight, None, (2, 2), window)
        _, found = way.gradients(x, weight, whole, (2, 2), window, Need())
    assert (y.stride(), found.stride()) == (whole.stride(), dx.stride())


def test_the_sum_over_tiles_is_in_float32(monkeypatch):
    """In bfloat16 it would stop growing at 256."""
    monkeypatch.setattr(processor, "HAS_BFLOAT16", True)
    x = grad = torch.ones(300, 1, 1, 1, dtype=torch.bfloat16)
    with small_tiles(1, 1):
        case = x, x[:1], grad, (1, 1), Window((1, 1)), Need()
        dweight, _ = low_resolution.gradients(*case)
    assert dweight.tolist() == [[[[300.0]]]]


@WAYS
def test_autograd_and_vmap_go_through_tiles(way, monkeypatch):
    monkeypatch.setattr(upsampling, "_fastest", lambda *_: way)
    layer = fn.UpsampleConv2d(17, bias=False)
    weight = layer.init(fn.key(0), (2, 6, 7), dtype=torch.float64)["weight"]
    xs = fn.normal(fn.key(1), (2, 2, 2, 6, 7), dtype=torch.float64)
    grad = fn.normal(fn.key(2), (2, 17, 12, 14), dtype=torch.float64)

    def apply(x):
        return layer.apply({"weight": weight}, x)

    def dx(x):
        return layer.vjp({"weight": weight}, x, grad)[1]

    whole = torch.stack([apply(x) for x in xs]), torch.stack([dx(x) for x in xs])
    with small_tiles(2000, 1):
        torch.testing.assert_close(torch.func.vmap(apply)(xs), whole[0])
        torch.testing.assert_close(torch.func.vmap(dx)(xs), whole[1])
        assert torch.autograd.gradcheck(apply, (xs[0].requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("side", [512, 2048])
def test_tiles_are_nearly_square_and_as_large_as_asked(side):
    x, window = torch.empty(1).expand(1, 8, side, side), fn.UpsampleConv2d(8)._window
    sizes = [x[tile.source].shape[2:] for tile in tiles.cut(x, (2, 2), window, 72, 2**18)]
    assert len(sizes) > 1
    for height, width in sizes:
        assert height * width * 72 < 1.3 * 2**19
        assert 0.5 < height / width < 2
