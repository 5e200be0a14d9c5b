"""Sequential: composition, nesting, indexing, the right key and residual for each layer."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_properties import close, make, same

import funcnet as fn
from funcnet.testing import check_vjp, strategies

NET = fn.Sequential(
    fn.Conv2d(4, 2, stride=2), fn.ReLU(), fn.UpsampleConv2d(3), fn.Sigmoid(), fn.Upsample2d(2)
)


@dataclass(frozen=True)
class Noise(fn.Layer):
    """Adds numbers drawn from its key; without one it adds nothing."""

    def init(self, key, shape, *, dtype=None, device=None):
        return ()

    def out_shape(self, shape):
        return tuple(shape)

    def fwd(self, params, x, *, key=None):
        return (x.clone() if key is None else x + fn.normal(key, x.shape, dtype=x.dtype)), None

    def bwd(self, params, residuals, grad, *, input_grad=True):
        return (), grad.clone() if input_grad else None


@dataclass(frozen=True)
class Spy(Noise):
    """Counts how often dx is asked of it."""

    asked: ClassVar[list[bool]] = []

    def bwd(self, params, residuals, grad, *, input_grad=True):
        self.asked.append(input_grad)
        return super().bwd(params, residuals, grad, input_grad=input_grad)


@given(strategies.cases(strategies.networks()))
def test_nesting_changes_nothing_but_the_tree(case):
    net, params, x = case
    nested = fn.Sequential(net, fn.Sequential())
    y, grad = net.apply(params, x), fn.normal(fn.key(0), net.apply(params, x).shape, dtype=x.dtype)
    assert same(nested.apply((params, ()), x), y)
    dparams, dx = net.vjp(params, x, grad)
    assert same(nested.vjp((params, ()), x, grad), ((dparams, ()), dx))


@given(strategies.cases(strategies.networks()), st.data())
def test_cutting_anywhere_is_composition(case, data):
    net, params, x = case
    cut = data.draw(st.integers(0, len(net)))
    first, second = net[:cut], net[cut:]
    middle = first.apply(params[:cut], x)
    assert same(second.apply(params[cut:], middle), net.apply(params, x))
    grad = fn.normal(fn.key(0), net.apply(params, x).shape, dtype=x.dtype)
    dsecond, dmiddle = second.vjp(params[cut:], middle, grad)
    dfirst, dx = first.vjp(params[:cut], x, dmiddle)
    close(net.vjp(params, x, grad), ((*dfirst, *dsecond), dx))


def test_by_hand():
    params, x, grad = make(NET, (3, 6, 4), dtype=torch.float64)
    values = [x]
    for layer, layer_params in zip(NET, params, strict=True):
        values.append(layer.apply(layer_params, values[-1]))
    assert torch.equal(NET.apply(params, x), values[-1])
    dx, dparams = grad, []
    for layer, layer_params, value in reversed(list(zip(NET, params, values[:-1], strict=True))):
        layer_dparams, dx = layer.vjp(layer_params, value, dx)
        dparams.insert(0, layer_dparams)
    close(NET.vjp(params, x, grad), (tuple(dparams), dx))


def test_layers_draw_different_parameters():
    net = fn.Sequential(*[fn.Conv2d(2, 1)] * 3)
    params = net.init(fn.key(0), (2, 4, 4))
    assert not same(params[0], params[1])
    assert not same(params[1], params[2])
    assert same(params[2], net[2].init(fn.fold_in(fn.key(0), 2), (2, 4, 4)))


def test_every_layer_draws_from_its_own_key():
    net, x = fn.Sequential(Noise(), Noise()), torch.zeros(1, 3)
    y = net.apply(((), ()), x, key=fn.key(0))
    keys = [fn.fold_in(fn.key(0), i) for i in range(2)]
    assert torch.equal(y, fn.normal(keys[0], x.shape) + fn.normal(keys[1], x.shape))
    assert torch.equal(net.apply(((), ()), x), x)
    assert torch.equal(net.fwd(((), ()), x, key=fn.key(0))[0], y)


def test_the_empty_network_refuses_another_grad():
    for grad in (torch.zeros(7), torch.zeros(2, 3, dtype=torch.float64)):
        with pytest.raises((ValueError, TypeError), match=r"Sequential\(\): expected grad"):
            fn.Sequential().vjp((), torch.zeros(2, 3), grad)


def test_the_empty_network_is_the_identity():
    net, x = fn.Sequential(), torch.ones(2, 3)
    assert net.init(fn.key(0), (3,)) == ()
    assert net.out_shape((3,)) == (3,)
    y = net.apply((), x)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()
    dparams, dx = net.vjp((), x, 2 * x)
    assert dparams == ()
    assert torch.equal(dx, 2 * x)
    assert net.vjp((), x, x, input_grad=False) == ((), None)


def test_it_is_a_sequence():
    assert len(NET) == 5
    assert NET[1] == fn.ReLU()
    assert NET[-1] == fn.Upsample2d(2)
    assert NET[1:3] == fn.Sequential(fn.ReLU(), fn.UpsampleConv2d(3))
    assert list(NET) == [NET[i] for i in range(5)]
    assert fn.Sequential(*NET) == NET
    with pytest.raises(IndexError):
        NET[5]


def test_no_dx_is_asked_of_layers_below_the_first_with_parameters():
    net = fn.Sequential(Spy(), fn.Conv2d(1, 1), Spy())
    params, x, grad = make(net, (1, 2, 2))
    Spy.asked.clear()
    expected, _ = net.vjp(params, x, grad)
    assert Spy.asked == [True, True]
    Spy.asked.clear()
    dparams, dx = net.vjp(params, x, grad, input_grad=False)
    assert Spy.asked == [True]
    assert dx is None
    assert same(dparams, expected)


@pytest.mark.parametrize(
    "before", [fn.Conv2d(2, 1), fn.Upsample2d(1), fn.UpsampleConv2d(2), Noise()]
)
@pytest.mark.parametrize("activation", [fn.ReLU(), fn.Sigmoid()], ids=repr)
def test_writing_over_what_the_layer_before_made_is_not_seen(before, activation):
    """Activations in a Sequential work in place where they may; the numbers are the same."""
    net = fn.Sequential(before, activation, activation)
    params, x, grad = make(net, (2, 3, 3), dtype=torch.float64)
    kept = x.clone(), grad.clone()
    middle = before.apply(params[0], x)
    assert torch.equal(
        net.apply(params, x), activation.apply((), activation.apply((), middle.clone()))
    )
    dmiddle = fn.Sequential(activation, activation).vjp(((), ()), middle, grad)[1]
    close(net.vjp(params, x, grad)[1], before.vjp(params[0], x, dmiddle)[1])
    assert torch.equal(x, kept[0])
    assert torch.equal(grad, kept[1])


def test_repr_is_code():
    assert repr(fn.Sequential(fn.ReLU(), fn.Sequential())) == "Sequential(ReLU(), Sequential())"


def test_subclasses_of_layers_that_work_in_place():
    """What overrides a pass of ours is used as it is written, and nothing of its is written to."""

    @dataclass(frozen=True, repr=False)
    class Leaky(fn.ReLU):
        def fwd(self, params, x, *, key=None):
            return torch.where(x > 0, x, 0.1 * x), x

        def bwd(self, params, x, grad, *, input_grad=True):
            return (), torch.where(x > 0, grad, 0.1 * grad) if input_grad else None

    @dataclass(frozen=True, repr=False)
    class ConvTanh(fn.Conv2d):
        def fwd(self, params, x, *, key=None):
            z, kept = super().fwd(params, x)
            y = torch.tanh(z)
            return y, (kept, y)

        def bwd(self, params, residuals, grad, *, input_grad=True):
            kept, y = residuals
            return super().bwd(params, kept, grad * (1 - y * y), input_grad=input_grad)

    @dataclass(frozen=True, init=False, repr=False)
    class Doubled(fn.Sequential):
        def bwd(self, params, residuals, grad, *, input_grad=True):
            return super().bwd(params, residuals, 2 * grad, input_grad=input_grad)

    class Twice:
        """A mixin: what it overrides is in no body of a layer's class."""

        def fwd(self, params, x, *, key=None):
            y, residuals = super().fwd(params, x)
            return 2 * y, residuals

        def bwd(self, params, residuals, grad, *, input_grad=True):
            return super().bwd(params, residuals, 2 * grad, input_grad=input_grad)

    class TwiceReLU(Twice, fn.ReLU):
        pass

    x = fn.normal(fn.key(1), (2, 3, 6, 6), dtype=torch.float64)
    for after in (Leaky(), TwiceReLU(), fn.ReLU(), fn.Sigmoid()):
        for before in (fn.Conv2d(2, 3), ConvTanh(2, 3)):
            net = fn.Sequential(before, after)
            params = net.init(fn.key(0), (3, 6, 6), dtype=torch.float64)
            check_vjp(net, params, x)
            y = after.apply((), before.apply(params[0], x))
            torch.testing.assert_close(net.apply(params, x), y)
            assert (y.min() < 0) == (after == Leaky())
    inner = fn.Sequential(fn.Conv2d(2, 3))
    params = inner.init(fn.key(0), (3, 6, 6))
    target = torch.zeros(2, 2, 4, 4)
    _, (once,) = fn.value_and_grad(inner, fn.MSE())(params, x.float(), target)
    _, (twice,) = fn.value_and_grad(Doubled(*inner), fn.MSE())(params, x.float(), target)
    torch.testing.assert_close(twice["weight"], 2 * once["weight"])


def test_gradients_come_in_the_containers_of_params():
    class Params(NamedTuple):
        conv: Any
        relu: Any

    net = fn.Sequential(fn.Conv2d(2, 3), fn.ReLU())
    conv, relu = net.init(fn.key(0), (3, 6, 6))
    ordered = OrderedDict((name, conv[name]) for name in ("weight", "bias"))
    params = Params(ordered, relu)
    x = fn.normal(fn.key(1), (2, 3, 6, 6))
    _, grads = fn.value_and_grad(net, fn.MSE())(params, x, torch.zeros(2, 2, 4, 4))
    sgd = fn.SGD(0.1)
    updated, _ = sgd.step(params, grads, sgd.init(params))
    assert type(updated) is Params
    assert list(updated.conv) == ["weight", "bias"]
