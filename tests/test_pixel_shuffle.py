"""PixelShuffle and PixelUnshuffle: numbers in other places, and back."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import funcnet as fn
from funcnet.testing import strategies

shuffles = pytest.mark.parametrize("cls", [fn.PixelShuffle, fn.PixelUnshuffle])


@given(strategies.cases(strategies.layers(fn.PixelShuffle)))
def test_value_is_torchs_and_gradient_is_the_inverse(case):
    shuffle, _, x = case
    unshuffle = fn.PixelUnshuffle(shuffle.upscale_factor)
    y = shuffle.apply((), x)
    assert torch.equal(y, F.pixel_shuffle(x, shuffle.upscale_factor))
    assert torch.equal(unshuffle.apply((), y), x)
    assert torch.equal(shuffle.vjp((), x, y)[1], x)
    assert torch.equal(unshuffle.vjp((), y, x)[1], y)


@shuffles
@given(st.integers(1, 3), st.sampled_from([0, 1, 2]))
def test_any_batch_in_both_directions(cls, r, batch):
    """torch's backward pass of pixel_shuffle fails on a batch of 0."""
    layer = cls(r)
    x = torch.zeros(batch, 2 * r * r, 3 * r, 2 * r)
    y = layer.apply((), x)
    assert y.shape == (batch, *layer.out_shape(x.shape[1:]))
    assert layer.vjp((), x, y)[1].shape == x.shape


@shuffles
@pytest.mark.parametrize("r", [1, 2])
def test_results_are_copies(cls, r):
    """Of one pixel, and where r is 1, every reshaping would do with a view."""
    layer = cls(r)
    for shape in [(1, r * r, r, r), (2, 2 * r * r, 2 * r, r)]:
        x = torch.ones(shape)
        y = layer.apply((), x)
        layer.vjp((), x, y)[1].zero_()
        assert (y == 1).all()
        y.zero_()
        assert (x == 1).all()


def test_by_hand():
    x = torch.arange(8.0).reshape(1, 8, 1, 1)
    y = fn.PixelShuffle(2).apply((), x)
    assert y.tolist() == [[[[0, 1], [2, 3]], [[4, 5], [6, 7]]]]


def test_what_does_not_fit_is_refused_with_sizes():
    for layer, message, shape in [
        (fn.PixelShuffle(2), "expected channels that 2² = 4 divides, got 6", (6, 2, 3)),
        (fn.PixelUnshuffle(2), "expected height and width that 2 divides, got 4 and 3", (1, 4, 3)),
    ]:
        message = re.escape(f"{layer}: {message} in the shape {shape}")
        with pytest.raises(ValueError, match=f"^{message}"):
            layer.out_shape(shape)
        with pytest.raises(ValueError, match=f"^{message}"):
            layer.apply((), torch.zeros(2, *shape))
    with pytest.raises(ValueError, match="PixelShuffle: expected upscale_factor >= 1, got 0"):
        fn.PixelShuffle(0)
    with pytest.raises(ValueError, match=re.escape("expected x of shape (N, C, H, W), got (4, 2)")):
        fn.PixelUnshuffle(2).apply((), torch.zeros(4, 2))
