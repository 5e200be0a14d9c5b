"""Linear: PyTorch's numbers for any layout, its parameters as it draws them, and its errors."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import funcnet as fn
from funcnet.initializers import Constant, Normal, Zeros
from funcnet.testing import check_vjp, strategies


@given(st.data())
def test_value_and_gradients_in_any_layout(data):
    shape = data.draw(st.sampled_from([(2, 3), (1, 3), (0, 3), (2, 4, 3), (2, 0, 3), (2, 1, 2, 3)]))
    layer = fn.Linear(data.draw(st.integers(1, 4)), bias=data.draw(st.booleans()))
    x = data.draw(strategies.tensors(shape, torch.float64))
    grad = data.draw(strategies.tensors((*shape[:-1], layer.out_features), torch.float64))
    params = layer.init(fn.key(0), shape[1:], dtype=torch.float64)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    inputs = [x.contiguous().requires_grad_(), *leaves.values()]
    y = F.linear(inputs[0], **leaves)
    dx, *expected = torch.autograd.grad(y, inputs, grad)
    torch.testing.assert_close(layer.apply(params, x), y)
    dparams, own_dx = layer.vjp(params, x, grad)
    torch.testing.assert_close(own_dx, dx)
    torch.testing.assert_close(list(dparams.values()), expected)


@given(strategies.cases(strategies.layers(fn.Linear), integers=True, dtypes=st.just(torch.float32)))
def test_exact_on_integers(case):
    """⟨y, g⟩ = ⟨x, dx⟩ + ⟨b, db⟩ and ⟨W, dW⟩ = ⟨x, dx⟩, bit for bit."""
    layer, params, x = case
    y = layer.apply(params, x)
    grad = torch.arange(y.numel()).reshape(y.shape).remainder(5).sub(2).float()
    dparams, dx = layer.vjp(params, x, grad)
    of_x = (x * dx).sum()
    assert (params["weight"] * dparams["weight"]).sum() == of_x
    of_b = (params["bias"] * dparams["bias"]).sum() if layer.bias else 0
    assert (y * grad).sum() == of_x + of_b


@given(strategies.cases(strategies.layers(fn.Linear)))
def test_gradients(case):
    check_vjp(*case)


def test_drawn_as_torch_draws_them():
    params = fn.Linear(300).init(fn.key(0), (7, 400))
    assert list(params) == ["weight", "bias"]
    assert params["weight"].shape == (300, 400)
    for leaf in params.values():
        assert leaf.abs().max() <= 0.05
        assert leaf.std() == pytest.approx(0.05 / 3**0.5, rel=0.1)
    assert list(fn.Linear(3, bias=False).init(fn.key(0), (2,))) == ["weight"]
    assert fn.Linear(300).init(fn.key(0), (0, 400))["bias"].equal(params["bias"])


def test_drawn_as_it_is_told():
    layer = fn.Linear(30, weight_init=Normal(std=2.0), bias_init=Zeros())
    params = layer.init(fn.key(0), (40,))
    assert params["weight"].std() == pytest.approx(2, rel=0.1)
    assert not params["bias"].any()
    namespace = vars(fn) | {"Normal": Normal, "Zeros": Zeros}
    assert eval(repr(layer), namespace) == layer
    with pytest.raises(TypeError, match="Linear: expected weight_init to be an initialiser or No"):
        fn.Linear(3, weight_init=torch.nn.init.zeros_)


def test_features_of_nothing():
    assert not fn.Linear(2).init(fn.key(0), (0,))["bias"].any()  # as in torch
    layer = fn.Linear(2, bias_init=Constant(3.0))
    params = layer.init(fn.key(0), (0,))
    assert layer.apply(params, torch.zeros(4, 0)).tolist() == [[3, 3]] * 4
    dparams, dx = layer.vjp(params, torch.zeros(4, 0), torch.ones(4, 2))
    assert dx.shape == (4, 0)
    assert dparams["bias"].tolist() == [4, 4]


def test_bfloat16_is_close():
    layer = fn.Linear(64)
    params = layer.init(fn.key(0), (256,), dtype=torch.bfloat16)
    x, grad = fn.normal(fn.key(1), (32, 256)), fn.normal(fn.key(2), (32, 64))
    dparams, dx = layer.vjp(params, x.bfloat16(), grad.bfloat16())
    exact = {name: leaf.double() for name, leaf in params.items()}
    expected, expected_dx = layer.vjp(exact, x.bfloat16().double(), grad.bfloat16().double())
    for ours, true in [(dx, expected_dx), *zip(dparams.values(), expected.values(), strict=True)]:
        assert (ours - true).abs().max() <= 2**-8 * true.abs().max()


def test_refusals():
    layer = fn.Linear(3)
    params = layer.init(fn.key(0), (4,))
    with pytest.raises(
        ValueError, match=re.escape("Linear(3): expected x of shape (N, …, 4), got (")
    ):
        layer.apply(params, torch.zeros(2, 5))
    with pytest.raises(
        ValueError, match=re.escape("expected the shape of one example, (…, C), got")
    ):
        layer.init(fn.key(0), ())
    with pytest.raises(ValueError, match="expected x of shape"):
        layer.apply(params, torch.zeros(4))
    with pytest.raises(ValueError, match="Linear: expected out_features >= 1, got 0"):
        fn.Linear(0)
    with pytest.raises(TypeError, match="Linear: expected bias to be True or False, got 5"):
        fn.Linear(3, 5)
