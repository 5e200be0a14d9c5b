"""MSE, and losses of one's own."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given

import funcnet as fn
from funcnet.testing import check_vjp, strategies
from funcnet.testing.registry import LOSSES


@given(strategies.loss_cases())
def test_gradient(case):
    check_vjp(*case)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@given(strategies.loss_cases())
def test_value_and_gradient_are_those_of_torch(case):
    loss, x, target = case
    leaf = x.clone().requires_grad_()
    expected = LOSSES[type(loss)].twin(loss)(leaf, target)
    torch.testing.assert_close(loss.apply(x, target), expected.detach(), equal_nan=True)
    if x.numel():
        (dx,) = torch.autograd.grad(expected, leaf, torch.tensor(-2.5, dtype=x.dtype))
        torch.testing.assert_close(loss.vjp(x, target, -2.5), dx)
        torch.testing.assert_close(loss.vjp(x, target, torch.tensor(-2.5, dtype=x.dtype)), dx)
    else:
        assert loss.vjp(x, target).shape == x.shape


def test_fwd_and_bwd_are_apply_and_vjp():
    x, target = fn.normal(fn.key(0), (3, 4)), fn.normal(fn.key(1), (3, 4))
    for loss in (fn.MSE(), fn.MSE("sum")):
        value, residuals = loss.fwd(x, target)
        assert value.shape == ()
        assert torch.equal(value, loss.apply(x, target))
        assert torch.equal(loss.bwd(residuals), loss.vjp(x, target))
        assert torch.equal(loss.bwd(residuals, 3.0), loss.vjp(x, target, 3.0))


def test_a_perfect_guess_costs_nothing():
    x = fn.normal(fn.key(0), (2, 3))
    assert fn.MSE().apply(x, x.clone()) == 0
    assert not fn.MSE().vjp(x, x.clone()).any()


def test_losses_are_values():
    assert fn.MSE() == fn.MSE("mean") != fn.MSE("sum")
    assert [repr(fn.MSE()), repr(fn.MSE("sum"))] == ["MSE()", "MSE(reduction='sum')"]
    assert hash(fn.MSE()) == hash(fn.MSE())


@dataclass(frozen=True)
class LogCosh(fn.Loss):
    """Σ log cosh(x − target): a loss of one's own is one class with fwd and bwd."""

    def fwd(self, x, target):
        return (x - target).cosh().log().sum(), x - target

    def bwd(self, residuals, grad=1.0):
        return residuals.tanh() * grad


def test_a_loss_of_ones_own():
    x, target = fn.normal(fn.key(0), (3, 4)), fn.normal(fn.key(1), (3, 4))
    check_vjp(LogCosh(), x, target)
    net = fn.Sequential(fn.Sigmoid())
    value, grads = fn.value_and_grad(net, LogCosh())(((),), x, target)
    assert value == LogCosh().apply(x.sigmoid(), target)
    assert grads == ((),)
