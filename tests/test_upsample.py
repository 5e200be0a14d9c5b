"""Upsample2d: copies forward, sums of copies backward."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import funcnet as fn
from funcnet.testing import strategies

CASES = strategies.cases(strategies.layers(fn.Upsample2d))


@given(CASES)
def test_value_is_that_of_torch(case):
    layer, params, x = case
    y = layer.apply(params, x)
    if len(x):
        assert torch.equal(y, F.interpolate(x, scale_factor=layer.scale, mode="nearest"))
    assert torch.equal(y[:, :, :: layer.scale[0], :: layer.scale[1]], x)


@given(strategies.cases(strategies.layers(fn.Upsample2d), integers=True), st.integers(0, 99))
def test_adjoint_is_exact(case, seed):
    """⟨up(x), g⟩ = ⟨x, dx(g)⟩, in integers, so bit for bit."""
    layer, params, x = case
    y = layer.apply(params, x)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randint(-3, 4, y.shape, generator=generator).to(x.dtype)
    dparams, dx = layer.vjp(params, x, grad)
    assert dparams == ()
    assert (x * dx).sum() == (y * grad).sum()


@given(CASES)
def test_gradient_of_ones_counts_the_copies(case):
    layer, params, x = case
    grad = x.new_ones(()).expand(layer.apply(params, x).shape)
    _, dx = layer.vjp(params, x, grad)
    assert (dx == layer.scale[0] * layer.scale[1]).all()


def test_height_and_width_are_not_mistaken():
    y = fn.Upsample2d((1, 3)).apply((), torch.tensor([[[[1.0], [2.0]]]]))
    assert y.tolist() == [[[[1, 1, 1], [2, 2, 2]]]]
    _, dx = fn.Upsample2d((2, 1)).vjp(
        (), torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 2], [3, 4]]]])
    )
    assert dx.tolist() == [[[[4, 6]]]]


@pytest.mark.parametrize("scale", [(1, 41), (41, 1)])
def test_copies_by_a_scale_that_float32_cannot_divide_by(scale):
    """41 · (1/41) is below 1 in float32: PyTorch's kernel takes the pixel before."""
    x = fn.normal(fn.key(0), (1, 2, 3, 3))
    y = fn.Upsample2d(scale).apply((), x)
    assert torch.equal(y, x.repeat_interleave(scale[0], 2).repeat_interleave(scale[1], 3))


@pytest.mark.parametrize("scale", [2, 3])
def test_the_result_of_a_single_pixel_is_new_memory(scale):
    x = torch.ones(1, 1, 1, 1)
    y = fn.Upsample2d(scale).apply((), x)
    y.zero_()
    assert x.item() == 1


@pytest.mark.parametrize("scale", [2, 3])
def test_a_rectifier_that_follows_leaves_x_alone(scale):
    """In a Sequential the rectifier writes over what the layer before hands on."""
    x = -torch.ones(1, 1, 1, 1)
    y = fn.Sequential(fn.Upsample2d(scale), fn.ReLU()).apply(((), ()), x)
    assert y.sum() == 0
    assert x.item() == -1


def test_pictures_without_pixels():
    layer = fn.Upsample2d(2)
    for shape in ((2, 0, 3, 3), (2, 1, 0, 3)):
        x = torch.zeros(shape)
        y = layer.apply((), x)
        assert layer.vjp((), x, y)[1].shape == shape
