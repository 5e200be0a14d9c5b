"""Errors of a convolution stay below a multiple of the magnitudes that each output sums.

In floating-point arithmetic of precision ε, a sum of n products wᵢ·xᵢ, taken in any order, is off
by at most n·ε/2 · Σ |wᵢ|·|xᵢ|, to first order in ε (Higham, "Accuracy and stability of numerical
algorithms", 2002, section 3.1). A dark pixel is thus as exact beside a bright one as alone. So it
is for the gradients, which sum products of grad with w and with x.
"""

import dataclasses
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

import funcnet as fn
from funcnet.ops import karatsuba, low_resolution, phases, upsampling
from funcnet.ops import two_steps as two_steps_of
from funcnet.ops.window import padding_sides
from funcnet.testing import strategies

SIDES = st.integers(1, 6)
SHAPES = st.tuples(st.integers(1, 3), SIDES, SIDES)
LAYERS = strategies.layers(fn.UpsampleConv2d) | strategies.layers(fn.Conv2d)
MAGNITUDES = ["wide", "half bright", "huge", "huge grad"]


def two_steps(layer, weight, x):
    """The layer's y without bias, by torch."""
    if isinstance(layer, fn.UpsampleConv2d):
        x = x.repeat_interleave(layer.scale[0], 2).repeat_interleave(layer.scale[1], 3)
        stride, dilation, groups = 1, (1, 1), 1
    else:
        stride, dilation, groups = layer.stride, layer.dilation, layer.groups
    (top, bottom), (left, right) = padding_sides(layer.padding, layer.kernel_size, dilation)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, None, stride, 0, dilation, groups)


def exact(layer, weight, x, grad):
    """(y, dx, dweight) in float64."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    y = two_steps(layer, weight, x)
    return y.detach(), *torch.autograd.grad(y, (x, weight), grad.double())


def numbers(magnitude, shapes, generator):
    """x, weight and grad of the three shapes, whose entries differ by many orders of magnitude."""

    def wide(shape, least, most):
        exponents = torch.empty(shape).uniform_(least, most, generator=generator)
        return 10**exponents * torch.randn(shape, generator=generator).sign()

    x, weight, grad = (wide(shape, -8, 8) for shape in shapes)
    if magnitude == "half bright":
        x, weight = wide(shapes[0], -2, -1), wide(shapes[1], -1, 0)
        x[..., x.shape[-1] // 2 :] *= 1e7
    elif magnitude == "huge":
        x, weight = wide(shapes[0], 37.5, 38.5), wide(shapes[1], -4, -3)
    elif magnitude == "huge grad":
        x, weight, grad = (
            wide(shape, *ends)
            for shape, ends in zip(shapes, [(-4, -3), (-4, -3), (37.5, 38.5)], strict=True)
        )
    return x, weight, grad


def check(layer, shape, magnitude, seed):
    generator = torch.Generator().manual_seed(seed)
    weight_shape = layer._params(shape[1:])["weight"].shape
    shapes = shape, weight_shape, (shape[0], *layer.out_shape(shape[1:]))
    x, weight, grad = numbers(magnitude, shapes, generator)
    expected = exact(layer, weight, x, grad)
    sums = exact(layer, weight.abs(), x.abs(), grad.abs())
    ones = exact(layer, torch.ones(weight_shape), torch.ones(shape), torch.ones(shapes[2]))
    params = {"weight": weight}
    dparams, dx = layer.vjp(params, x, grad)
    found = layer.apply(params, x), dx, dparams["weight"]
    for ours, theirs, magnitudes, terms in zip(found, expected, sums, ones, strict=True):
        is_representable = magnitudes < torch.finfo(x.dtype).max
        bound = (terms + 1) * torch.finfo(x.dtype).eps / 2 * magnitudes
        assert ((ours - theirs).abs() <= bound)[is_representable].all()


@pytest.fixture(
    scope="module",
    autouse=True,
    params=[
        (low_resolution, low_resolution),
        (phases, low_resolution),
        (two_steps_of, two_steps_of),
    ],
    ids=["low", "phases", "two_steps"],
)
def of_any_size(request):
    """Let nothing depend on how large the images are, and take each way of upsampling."""
    forward, backward = request.param
    with (
        mock.patch.multiple(karatsuba, _MANY_PIXELS=0, _MANY_PRODUCTS=0),
        mock.patch.object(
            upsampling, "_fastest", side_effect=lambda *args: backward if args[-1] else forward
        ),
    ):
        yield


@given(LAYERS, SHAPES, st.sampled_from(MAGNITUDES), st.integers(0, 999))
def test_errors_are_local(layer, shape, magnitude, seed):
    channels = shape[0] * getattr(layer, "groups", 1)
    layer = dataclasses.replace(layer, bias=False, method="auto")
    try:
        layer.out_shape((channels, *shape[1:]))
    except ValueError:
        assume(False)
    check(layer, (2, channels, *shape[1:]), magnitude, seed)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_errors_are_local_at_scale_2(magnitude):
    check(fn.UpsampleConv2d(16, bias=False), (2, 4, 16, 16), magnitude, 0)
