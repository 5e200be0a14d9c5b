"""ReLU and Sigmoid: right at zeros, infinities and NaN, and to the last places everywhere."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcnet as fn
from funcnet.testing import strategies

INF, NAN = math.inf, math.nan
ANY_SHAPE = st.lists(st.integers(0, 4), max_size=5)
FLOATS = st.floats(width=32)


def gradient(layer, x, grad=None):
    grad = torch.ones_like(x) if grad is None else grad
    return layer.vjp((), x, grad)[1]


@given(ANY_SHAPE, st.data())
@pytest.mark.parametrize("layer", [fn.ReLU(), fn.Sigmoid()], ids=repr)
def test_any_rank_and_layout(layer, shape, data):
    x = data.draw(strategies.tensors(shape, data.draw(strategies.dtypes())))
    grad = data.draw(strategies.tensors(shape, x.dtype))
    y, dx = layer.apply((), x), gradient(layer, x, grad)
    assert y.shape == dx.shape == x.shape
    function = torch.relu if layer == fn.ReLU() else torch.sigmoid
    torch.testing.assert_close(y, function(x))
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(dx, torch.autograd.grad(function(leaf), leaf, grad)[0])


def test_relu_at_its_kink_and_beyond():
    x = torch.tensor([-INF, -1.0, -0.0, 0.0, 1e-38, 2.0, INF])
    assert fn.ReLU().apply((), x).tolist() == [0, 0, 0, 0, pytest.approx(1e-38), 2, INF]
    assert gradient(fn.ReLU(), x).tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_relu_keeps_nan():
    assert fn.ReLU().apply((), torch.tensor([NAN])).isnan().all()


@given(st.lists(FLOATS, min_size=1), st.lists(FLOATS, min_size=1))
def test_relu_lets_grad_pass_where_x_is_positive(xs, grads):
    size = min(len(xs), len(grads))
    x, grad = torch.tensor(xs[:size]), torch.tensor(grads[:size])
    known = ~x.isnan()
    expected = torch.where(x > 0, grad, torch.zeros_like(grad))
    dx = gradient(fn.ReLU(), x, grad)
    assert torch.equal(dx[known].nan_to_num(7), expected[known].nan_to_num(7))


def test_sigmoid_far_out():
    x = torch.tensor([-INF, -1000.0, -80.0, 0.0, 80.0, 1000.0, INF])
    for dtype in (torch.float32, torch.float64):
        y = fn.Sigmoid().apply((), x.to(dtype))
        assert y[[0, 1, 3, 5, 6]].tolist() == [0, 0, 0.5, 1, 1]
        assert float(y[2]) == pytest.approx(math.exp(-80), rel=1e-5)
        dx = gradient(fn.Sigmoid(), x.to(dtype))
        assert dx.isfinite().all()
        assert dx[[0, 1, 3, 5, 6]].tolist() == [0, 0, 0.25, 0, 0]


@given(st.floats(-700, 700))
def test_sigmoid_to_the_last_places(x):
    y = fn.Sigmoid().apply((), torch.tensor(x, dtype=torch.float64))
    expected = 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
    assert float(y) == pytest.approx(expected, rel=1e-14)
    dx = gradient(fn.Sigmoid(), torch.tensor(x, dtype=torch.float64))
    assert float(dx) == pytest.approx(expected * (1 - float(y)), rel=1e-14, abs=1e-300)


@given(st.floats(-50, 50))
def test_sigmoid_is_odd_about_a_half(x):
    x = torch.tensor(x, dtype=torch.float64)
    layer = fn.Sigmoid()
    torch.testing.assert_close(layer.apply((), x) + layer.apply((), -x), torch.ones_like(x))
    torch.testing.assert_close(gradient(layer, x), gradient(layer, -x), rtol=1e-9, atol=1e-15)


def test_activations_are_values():
    assert fn.ReLU() == fn.ReLU() != fn.Sigmoid()
    assert repr(fn.ReLU()) == "ReLU()"
    assert fn.ReLU().init(fn.key(0), (3, 4)) == ()
    assert fn.Sigmoid().out_shape((3, 4)) == (3, 4)
