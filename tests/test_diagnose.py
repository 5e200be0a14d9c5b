"""The guess in the message of a wrong gradient names the mistake."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import funcnet as fn
from funcnet.testing import GradientMismatch, check_vjp


@dataclasses.dataclass(frozen=True)
class Spoilt(fn.Layer):
    """A layer whose gradients pass through `spoil(dparams, dx, params, x, grad)`."""

    layer: fn.Layer
    spoil: Callable[..., Any]

    def init(self, key, shape, *, dtype=None, device=None):
        return self.layer.init(key, shape, dtype=dtype, device=device)

    def out_shape(self, shape):
        return self.layer.out_shape(shape)

    def fwd(self, params, x, *, key=None):
        y, residuals = self.layer.fwd(params, x)
        return y, (x, residuals)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        x, residuals = residuals
        dparams, dx = self.layer.bwd(params, residuals, grad)
        dparams, dx = self.spoil(dparams, dx, params, x, grad)
        return dparams, dx if input_grad else None


def of_x(change):
    return lambda dparams, dx, params, x, grad: (dparams, change(dx, x, grad))


def of(name, change):
    return lambda dparams, dx, params, x, grad: ({**dparams, name: change(dparams, x, grad)}, dx)


def last_step(dparams, x, grad):
    return grad[:, -1].mT @ x[:, -1]


LINEAR, NORM = fn.Linear(4), fn.LayerNorm(elementwise_affine=False)
RMS = fn.RMSNorm(elementwise_affine=False)
SEQUENCE, VECTOR = (3, 5, 4), (3, 4)
CASES = [
    (LINEAR, SEQUENCE, of("weight", lambda d, x, g: d["weight"] / 15), "15: 3·5, sizes of y"),
    (LINEAR, SEQUENCE, of_x(lambda dx, x, g: dx * 5), "too large by a factor of 5: 5, a size of y"),
    (LINEAR, SEQUENCE, of_x(lambda dx, x, g: dx / 2), "√4, the root of a size of y"),
    (LINEAR, SEQUENCE, of("weight", last_step), "the last entry of axis 1 of y counts"),
    (LINEAR, SEQUENCE, of("bias", lambda d, x, g: g[0].sum(0)), "only the first example counts"),
    (NORM, VECTOR, of_x(lambda dx, x, g: dx + g.mean(-1, keepdim=True)), "constant along axis 1"),
    (NORM, (3, 6), of_x(lambda dx, x, g: dx + x - x.mean(1, True)), "a multiple of 1 and of x"),
    (RMS, (3, 6), of_x(lambda dx, x, g: dx + g[:, :1] * x), "a multiple of x"),
    (
        LINEAR,
        VECTOR,
        lambda d, dx, p, x, g: ({**d, "weight": d["weight"] + g[0, :, None] * p["weight"]}, dx),
        r"a multiple of params\['weight'\]: the part along the normalised params\['weight'\]",
    ),
    (fn.Tanh(), VECTOR, of_x(lambda dx, x, g: dx * (1 + 2e-6)), r"a factor of 1\+2\.0e-06"),
    (fn.Tanh(), VECTOR, of_x(lambda dx, x, g: g.clone()), "grad itself: the slope is missing"),
    (fn.Tanh(), VECTOR, of_x(lambda dx, x, g: dx.abs()), "its sign is lost"),
    (fn.Tanh(), VECTOR, of_x(lambda dx, x, g: dx.clamp(-0.2, 0.2)), r"it is clipped to ±0\.2"),
    (fn.Tanh(), VECTOR, of_x(lambda dx, x, g: dx * (x - x) / (x - x)), "a division by 0"),
    (
        fn.ChannelAffine(),
        (3, 4, 5),
        of("weight", lambda d, x, g: d["bias"].clone()),
        r"it is the gradient for params\['bias'\]",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "shape", "spoil", "guess"), CASES, ids=[c[3] for c in CASES])
def test_the_guess_names_the_mistake(layer, shape, spoil, guess):
    layer = Spoilt(layer, spoil)
    params = layer.init(fn.key(0), shape[1:], dtype=torch.float64)
    with pytest.raises(GradientMismatch) as caught:
        check_vjp(layer, params, fn.normal(fn.key(1), shape, dtype=torch.float64))
    assert caught.value.guess is not None
    assert re.search(guess, caught.value.guess)
    assert "numeric         nan" not in str(caught.value)


def middle_entry(dx, x, grad):
    dx = dx.clone()
    dx.view(-1)[dx.abs().flatten().argsort()[5]] *= 0.9
    return dx


def rounded_in_each_row(dparams, x, grad):
    dx = dparams["weight"].clone()
    dx[0, 0] *= 1 + 1.5e-6
    dx[0, 1:] *= 1 + 6e-7
    return dx


UNNAMED = [
    (fn.Tanh(), of_x(middle_entry), "clipped"),
    (LINEAR, of("weight", rounded_in_each_row), "factors along axis"),
]


@pytest.mark.parametrize(("layer", "spoil", "guess"), UNNAMED, ids=[c[2] for c in UNNAMED])
def test_no_guess_at_what_larger_entries_or_the_last_digits_rule_out(layer, spoil, guess):
    layer = Spoilt(layer, spoil)
    params = layer.init(fn.key(0), (4,), dtype=torch.float64)
    with pytest.raises(GradientMismatch) as caught:
        check_vjp(layer, params, fn.normal(fn.key(1), VECTOR, dtype=torch.float64))
    assert guess not in (caught.value.guess or "")


def test_the_guilty_layer_of_a_network_is_named():
    class Wrong(fn.Linear):
        def _bwd(self, params, x, dy, need):
            dparams, dx = super()._bwd(params, x, dy, need)
            return {**dparams, "bias": -dparams["bias"]} if need.params else None, dx

    inner = fn.Residual(fn.Sequential(fn.Tanh(), Wrong(4)))
    net = fn.Sequential(fn.Linear(4), inner, fn.Linear(2))
    params = net.init(fn.key(0), (4,), dtype=torch.float64)
    with pytest.raises(GradientMismatch) as caught:
        check_vjp(net, params, fn.normal(fn.key(1), (3, 4), dtype=torch.float64))
    assert "alone           layer 1.1 is wrong: Wrong(4): the gradient for params['bias']" in str(
        caught.value
    )
