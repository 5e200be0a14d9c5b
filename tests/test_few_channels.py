"""Convolutions from many channels to few, and back."""

from unittest import mock

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_conv import with_method

import funcnet as fn
from funcnet.ops import few_channels, low_resolution
from funcnet.testing import check_vjp, strategies

EVERY = mock.patch.multiple(few_channels, _TIMES=0, _MUCH=0)
"""Serves whatever the numbers of channels, in both directions."""


def plain_layers():
    axis = st.integers(1, 4)
    return st.builds(
        fn.Conv2d,
        st.integers(1, 4),
        st.tuples(axis, axis),
        padding=st.one_of(st.sampled_from(["same", "valid"]), st.integers(0, 2)),
        bias=st.booleans(),
    ).filter(lambda layer: layer._window.is_plain)


def cases(dtype):
    shapes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
    return strategies.cases(
        plain_layers(),
        shapes=lambda layer: shapes.filter(lambda shape: strategies.takes(layer, shape)),
        dtypes=st.just(dtype),
    )


@given(case=cases(torch.float64), data=st.data())
def test_values_and_gradients_are_those_of_the_definition(case, data):
    layer, params, x = case
    grad = fn.normal(fn.key(1), layer.apply(params, x).shape, dtype=x.dtype)
    need = data.draw(st.sampled_from([{}, {"input_grad": False}, {"param_grad": False}]))
    unfold = with_method(layer, "unfold")
    expected = unfold.apply(params, x), unfold.vjp(params, x, grad, **need)
    with EVERY, mock.patch.object(few_channels, "convolve", wraps=few_channels.convolve) as spy:
        found = layer.apply(params, x), layer.vjp(params, x, grad, **need)
    assert spy.called or layer.kernel_size in (1, (1, 1))
    for ours, theirs in zip(optree.tree_leaves(found), optree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("layer", [fn.Conv2d(2, 3, padding=1), fn.Conv1d(3, 2, padding="same")])
def test_gradient(layer):
    shape = (3, 5, 4)[: len(layer._axes)]
    with EVERY:
        params = layer.init(fn.key(0), shape, dtype=torch.float64)
        check_vjp(layer, params, fn.normal(fn.key(1), (2, *shape), dtype=torch.float64))


@pytest.mark.parametrize("options", [{"groups": 2}, {"stride": 2}, {"dilation": 2}], ids=str)
def test_what_this_does_not_serve(options):
    layer, x = fn.Conv2d(4, 3, **options), fn.normal(fn.key(0), (2, 4, 7, 7), dtype=torch.float64)
    params = layer.init(fn.key(1), (4, 7, 7), dtype=torch.float64)
    unfold = with_method(layer, "unfold")
    y = unfold.apply(params, x)
    with EVERY:
        torch.testing.assert_close(layer.apply(params, x), y)
        torch.testing.assert_close(layer.vjp(params, x, y), unfold.vjp(params, x, y))


@pytest.mark.parametrize("channels", [(64, 1), (1, 64)], ids=["to few", "from few"])
def test_gradients_have_gradients(channels):
    """Of a network's gradient by x: twice through each way."""
    many, few = channels
    layer, size = fn.Conv2d(few, 3, padding=1, bias=False), (2, many, 4, 4)
    params = layer.init(fn.key(0), size[1:], dtype=torch.float64)
    x, grad, direction = (
        fn.normal(fn.key(i), shape, dtype=torch.float64)
        for i, shape in enumerate((size, (2, few, 4, 4), size))
    )

    def slope(weight, x, grad):
        dparams, dx = layer.vjp({"weight": weight}, x, grad)
        return (dx * direction).sum() + (dparams["weight"] ** 2).sum()

    inputs = [t.clone().requires_grad_() for t in (params["weight"], x, grad)]
    expected = torch.autograd.grad(slope(*inputs), inputs)
    with EVERY:
        found = torch.autograd.grad(slope(*inputs), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("layer", "shape", "serves"),
    [
        (fn.Conv2d(1, 3, padding=1), (32, 86, 85), "both"),
        (fn.Conv2d(2, 3, padding="same"), (64, 60, 61), "both"),
        (fn.Conv2d(64, 3), (2, 60, 61), "backward"),
        (fn.Conv2d(1, 3, padding=1), (31, 90, 90), "neither"),
        (fn.Conv2d(2, 3, padding=1), (63, 90, 90), "neither"),
        (fn.Conv2d(1, 3, padding=1), (32, 85, 85), "neither"),
        (fn.Conv2d(1, 1), (32, 300, 300), "neither"),
        (fn.Conv2d(1, 3, padding=3), (32, 90, 90), "neither"),
        (fn.Conv2d(1, 3, stride=(1, 2)), (32, 90, 90), "neither"),
        (fn.Conv2d(1, 3, dilation=2), (32, 90, 90), "neither"),
        (fn.Conv2d(2, 3, groups=2), (128, 90, 90), "neither"),
        (fn.Conv3d(1, 3), (32, 8, 35, 35), "neither"),
    ],
    ids=str,
)
def test_what_is_faster_so(layer, shape, serves):
    params = layer.init(fn.key(0), shape)
    x = fn.normal(fn.key(1), (1, *shape))
    spy = mock.patch.object(low_resolution, "convolve", wraps=low_resolution.convolve)
    gradients = mock.patch.object(low_resolution, "gradients", wraps=low_resolution.gradients)
    with spy as forward, gradients as backward:
        y, residuals = layer.fwd(params, x)
        assert forward.called == (serves == "both")
        forward.reset_mock()
        layer.bwd(params, residuals, y)
        assert backward.called == (serves == "both")
        assert forward.called == (serves == "backward")
