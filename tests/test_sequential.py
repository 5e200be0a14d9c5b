"""Sequential: composition, nesting, indexing, the right key and residual for each layer."""

import sys
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_properties import close, make, same
from users_layers import Noise

import funcnet as fn
from funcnet.layers.activations import InPlace
from funcnet.testing import check_vjp, strategies

NET = fn.Sequential(
    fn.Conv2d(4, 2, stride=2), fn.ReLU(), fn.UpsampleConv2d(3), fn.Sigmoid(), fn.Upsample2d(2)
)


@fn.register_node
@dataclass(frozen=True)
class Pair(fn.Layer):
    """A combinator of one's own: two layers in a tuple, one after the other."""

    layers: tuple[fn.Layer, ...]

    def _pair(self):
        return fn.Sequential(*self.layers)

    def init(self, key, shape, *, dtype=None, device=None):
        return self._pair().init(key, shape, dtype=dtype, device=device)

    def out_shape(self, shape):
        return self._pair().out_shape(shape)

    def fwd(self, params, x, *, key=None):
        return self._pair().fwd(params, x, key=key)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        return self._pair().bwd(params, residuals, grad, input_grad=input_grad)


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
    close(second.apply(params[cut:], middle), net.apply(params, x))
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


@pytest.mark.parametrize(
    "error", [RuntimeError, ValueError, TypeError, ZeroDivisionError, KeyError]
)
def test_errors_of_any_kind_name_the_position(error):
    @dataclass(frozen=True)
    class Failing(Noise):
        def fwd(self, params, x, *, key=None):
            raise error("out of luck")

    net = fn.Sequential(fn.ReLU(), fn.Sequential(head=Failing()))
    with pytest.raises(error, match="out of luck") as caught:
        net.apply(((), {"head": ()}), torch.zeros(1, 3))
    if issubclass(error, (RuntimeError, ValueError, TypeError)):
        assert str(caught.value) == "layer 1: head: out of luck"
    elif hasattr(caught.value, "add_note"):  # from Python 3.11 on
        assert caught.value.__notes__ == ["raised in head", "raised in layer 1"]


def test_what_a_layer_makes_against_its_promise_has_to_fit_the_next():
    @dataclass(frozen=True)
    class Narrow(Noise):
        def out_shape(self, shape):
            assert shape == (2, 4, 4)
            return shape

        def fwd(self, params, x, *, key=None):
            return x[:, :1].clone(), None

    x, conv = torch.ones(3, 2, 4, 4), fn.Conv2d(2, 1)
    message = r"expected x of shape \(N, 2, H, W\), got \(3, 1, 4, 4\)"
    for before in ([], [fn.ReLU()]):
        fits = fn.Sequential(*before, Narrow(), fn.ReLU())
        refused = fn.Sequential(*before, Narrow(), conv, fn.ReLU())
        assert torch.equal(fits.apply(((),) * len(fits), x), x[:, :1])
        assert torch.equal(fits.fwd(((),) * len(fits), x)[0], x[:, :1])
        params = refused.init(fn.key(0), (2, 4, 4))
        for run in (refused.apply, refused.fwd):
            with pytest.raises(ValueError, match=rf"^layer {len(before) + 1}: .*: {message}"):
                run(params, x)


def test_errors_that_write_their_own_message_keep_it():
    class CodedError(ValueError):
        def __str__(self):
            return f"code {self.args[0]}"

    class Failing(Noise):
        def fwd(self, params, x, *, key=None):
            if self.error is CodedError:
                raise CodedError(7)
            b"\xff".decode()

    for error, args in ((CodedError, (7,)), (UnicodeDecodeError, ("utf-8", b"\xff", 0, 1))):
        Failing.error = error
        with pytest.raises(error) as caught:
            fn.Sequential(fn.ReLU(), Failing()).apply(((), ()), torch.zeros(1, 3))
        assert caught.value.args[: len(args)] == args
        if hasattr(caught.value, "add_note"):  # from Python 3.11 on
            assert caught.value.__notes__ == ["raised in layer 1"]


def test_it_is_a_sequence():
    assert len(NET) == 5
    assert NET[1] == fn.ReLU()
    assert NET[-1] == fn.Upsample2d(2)
    assert NET[1:3] == fn.Sequential(fn.ReLU(), fn.UpsampleConv2d(3))
    assert list(NET) == [NET[i] for i in range(5)]
    assert fn.Sequential(*NET) == NET
    with pytest.raises(IndexError):
        NET[5]


NAMED = fn.Sequential(
    stem=fn.Conv2d(4, 3, padding=1),
    act=fn.ReLU(),
    head=fn.Sequential(fn.Sigmoid(), fn.Conv2d(1, 1)),
)


def test_layers_by_name():
    assert len(NAMED) == 3
    assert NAMED.names == ("stem", "act", "head")
    assert NAMED["act"] == NAMED[1] == fn.ReLU()
    assert NAMED[:2] == fn.Sequential(stem=NAMED["stem"], act=fn.ReLU())
    assert NAMED[2:]["head"] == NAMED["head"]
    assert NAMED[:0] == fn.Sequential()
    assert list(NAMED) == [NAMED[name] for name in NAMED.names]
    assert fn.Sequential(*NAMED) != NAMED
    assert repr(NAMED[1:2]) == "Sequential(act=ReLU())"
    with pytest.raises(KeyError, match="Sequential of 3 layers: expected a name among 'stem',"):
        NAMED["tail"]
    with pytest.raises(KeyError, match="Sequential of 1 layer: expected a position, as its layers"):
        fn.Sequential(fn.ReLU())["tail"]
    for net, position in ((NAMED, 3), (NAMED, -4), (fn.Sum(fn.ReLU()), 9)):
        with pytest.raises(IndexError, match=f"layers?: expected a position in it, got {position}"):
            net[position]
    with pytest.raises(TypeError, match="layers: expected a position or a name, got None"):
        NAMED[None]
    # The names of the constructor's own arguments are as good as others.
    names = ("self", "cls", "layers", "names", "arguments", "named")
    for kind in (fn.Sequential, fn.Sum, fn.Concat):
        odd = kind(**dict.fromkeys(names, fn.ReLU()))
        assert odd.names == names
        assert eval(repr(odd), dict(vars(fn))) == odd


def test_params_of_layers_by_name(tmp_path):
    params, x, grad = make(NAMED, (2, 3, 3), dtype=torch.float64)
    assert list(params) == ["stem", "act", "head"]
    by_position, in_order = fn.Sequential(*NAMED), tuple(params.values())
    assert same(in_order, by_position.init(fn.key(3), (2, 3, 3), dtype=torch.float64))
    assert torch.equal(NAMED.apply(params, x), by_position.apply(in_order, x))
    dparams, dx = NAMED.vjp(params, x, grad)
    assert list(dparams) == ["stem", "act", "head"]
    assert same((tuple(dparams.values()), dx), by_position.vjp(in_order, x, grad))
    ordered = OrderedDict(params)
    assert type(NAMED.vjp(ordered, x, grad)[0]) is OrderedDict
    check_vjp(NAMED, params, x)
    path = tmp_path / "net"
    fn.save_model(path, NAMED, params)
    net, loaded = fn.load_model(path)
    assert (net, list(loaded)) == (NAMED, list(params))
    info = fn.inspect(path)
    assert sorted(info.shapes)[-2:] == ["stem.bias", "stem.weight"]
    assert "Sequential(\n    stem=Conv2d(" in str(info)


def test_other_layers_in_the_same_place():
    for net in (NET, NAMED):
        assert replace(net) == net
        other = net._with_children([fn.ReLU()] * len(net))
        assert (len(other), other.names) == (len(net), net.names)
        assert set(other) == {fn.ReLU()}
    assert replace(NET, layers=(fn.ReLU(),)) == fn.Sequential(fn.ReLU())
    assert replace(NET[:1], names=("a",)) == fn.Sequential(a=NET[0])
    with pytest.raises(TypeError, match="Sequential: expected a name for each layer, or none"):
        replace(NAMED, layers=(fn.ReLU(),))
    other = replace(NAMED, head=fn.ReLU(), act=fn.Sigmoid())
    assert other == fn.Sequential(stem=NAMED["stem"], act=fn.Sigmoid(), head=fn.ReLU())
    assert replace(fn.Concat(a=fn.ReLU(), b=fn.ReLU(), dim=2), a=fn.Sigmoid(), dim=3) == fn.Concat(
        a=fn.Sigmoid(), b=fn.ReLU(), dim=3
    )
    with pytest.raises(TypeError, match="expected head to be a Layer, got 3"):
        replace(NAMED, head=3)
    with pytest.raises(TypeError, match="expected layers to be a Layer"):
        replace(NAMED, tail=fn.ReLU())


def test_a_subclass_whose_constructor_dataclass_writes():
    @dataclass(frozen=True, init=False)
    class Kept(fn.Sequential):
        width: int = 3

    @dataclass(frozen=True)
    class Stack(fn.Sequential):
        width: int = 3

    assert len(Kept(fn.ReLU(), fn.Linear(3))) == 2
    with pytest.raises(TypeError, match=r"^Stack: expected layers to be a tuple, got ReLU\(\): "):
        Stack(fn.ReLU(), fn.Linear(3))


def test_a_subclass_with_a_constructor_of_its_own():
    class Stack(fn.Sequential):
        def __init__(self, depth):
            super().__init__(*[fn.ReLU()] * depth)

    assert len(Stack(3)[:2]) == 2
    assert len(Stack(3)._with_children([fn.Sigmoid()] * 3)) == 3


@pytest.mark.parametrize("first", [fn.ReLU(), fn.Upsample2d(1)], ids=repr)
@pytest.mark.parametrize("last", [fn.ReLU(), fn.Upsample2d(1)], ids=repr)
def test_whether_y_and_dx_are_new_tensors(first, last):
    """Then the layers around a Sequential may write over them."""
    net = fn.Sequential(first, fn.Sigmoid(), last)
    assert net._fresh == (first != fn.ReLU() != last)
    outer = fn.Sequential(fn.Upsample2d(1), fn.ReLU(), net, fn.ReLU())
    params, x, grad = make(outer, (2, 3, 3), dtype=torch.float64)
    check_vjp(outer, params, x)
    _, residuals = outer.fwd(params, x)
    assert same(outer.bwd(params, residuals, grad), outer.bwd(params, residuals, grad))


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
    last = fn.Sequential(Spy(), Spy(), fn.Conv2d(1, 1))
    params, x, grad = make(last, (1, 2, 2))
    Spy.asked.clear()
    dparams, _ = last.vjp(params, x, grad, input_grad=False)
    assert Spy.asked == []
    assert same(dparams, last.vjp(params, x, grad)[0])


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


def test_nothing_is_written_over_under_vmap():
    """What is the same for all networks cannot hold what differs."""
    same_for_all = fn.AvgPool1d(1)
    net = fn.Sequential(same_for_all, fn.PositionalEmbedding(3), fn.ReLU(), same_for_all)
    params, x, grad = make(net, (3, 4), dtype=torch.float64)
    many = optree.tree_map(lambda leaf: torch.stack([leaf, -leaf]), params)

    def one(params):
        return net.apply(params, x), net.fwd(params, x)[0], *net.vjp(params, x, grad)

    each = [one(optree.tree_map(lambda leaf, i=i: leaf[i], many)) for i in range(2)]
    in_place = mock.patch.object(InPlace, "_bwd_", side_effect=AssertionError)
    with in_place, pytest.raises(AssertionError):
        one(params)
    with in_place:
        mapped = torch.func.vmap(one)(many)
    close(mapped, optree.tree_map(lambda *ys: torch.stack(ys), *each))


@pytest.mark.parametrize("activation", [fn.ReLU(), fn.Sigmoid(), fn.Dropout(0.5)], ids=str)
def test_the_first_layer_does_not_write_over_x(activation):
    net = fn.Sequential(activation, fn.ReLU(), fn.Linear(3))
    params = net.init(fn.key(0), (4,))
    x, grad = fn.normal(fn.key(1), (5, 4)), fn.normal(fn.key(2), (5, 3))
    x_before, grad_before = x.clone(), grad.clone()
    net.apply(params, x, key=fn.key(3))
    net.vjp(params, x, grad, key=fn.key(3))
    assert torch.equal(x, x_before)
    assert torch.equal(grad, grad_before)


def test_a_long_repr_has_a_line_a_layer(tmp_path):
    block = fn.Sequential(*[fn.Conv2d(8, 1), fn.ReLU()] * 2)
    net = fn.Sequential(block, fn.Residual(block), Pair((block, block)), fn.Linear(4))
    inner = "Sequential(Conv2d(8, kernel_size=1), ReLU(), Conv2d(8, kernel_size=1), ReLU())"
    assert [line.strip() for line in repr(net).splitlines()] == [
        "Sequential(",
        f"{inner},",
        f"Residual({inner}),",
        "Pair(", "(",
        f"{inner},", f"{inner},",
        "),", "),",
        "Linear(4),",
        ")",
    ]  # fmt: skip
    assert "\n" not in repr(block)
    named = fn.Sequential(**{"a-b": net, "c": fn.Repeat(net, 2)})
    for code in (net, named, fn.value_and_grad(named, fn.MSE())):
        assert eval(repr(code), {**vars(fn), "Pair": Pair}) == code
    fn.save_model(tmp_path / "net", named, named.init(fn.key(0), (8, 4, 4)))
    shown = str(fn.inspect(tmp_path / "net")).split("architecture:")[1]
    assert max(line.count("Conv2d(") for line in shown.splitlines()) == 1
    assert shown.count("Conv2d(") == 16
    assert repr(named).count("Conv2d(") == 16


def test_repr_is_code():
    assert repr(fn.Sequential(fn.ReLU(), fn.Sequential())) == "Sequential(ReLU(), Sequential())"
    for name in ("stem", "a.b", "class"):
        net = fn.Sequential(**{name: fn.ReLU()})
        assert eval(repr(net), vars(fn).copy()) == net


def test_the_repr_of_a_layer_is_written_once():
    class Counted(fn.ReLU):
        def __repr__(self):
            written.append(self)
            return "ReLU()"

    written = []
    net = Counted()
    for _ in range(5):
        net = fn.Sequential(net)
    repr(net)
    assert len(written) == 1


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


def test_mathematics_of_a_subclass_is_not_passed_over_in_place():
    """A layer that writes over its x or grad does so by its own formula, or not at all."""

    @dataclass(frozen=True)
    class Doubled(fn.ReLU):
        def _fwd(self, params, x, key):
            y, residuals = super()._fwd(params, x, key)
            return 2 * y, residuals

        def _bwd(self, params, residuals, dy, need):
            return super()._bwd(params, residuals, 2 * dy, need)

    class OverX(Doubled):
        def _fwd_(self, params, x, key):
            return self._fwd(params, x, key)

    class OverGrad(Doubled):
        def _bwd_(self, params, y, dy, need):
            return self._bwd(params, y, dy, need)

    class Negated(fn.Identity):
        def _fwd(self, params, x, key):
            return -x, None

        def _bwd(self, params, residuals, dy, need):
            return (), -dy

    @dataclass(frozen=True)
    class Straight(fn.Sigmoid):
        def _bwd(self, params, y, dy, need):
            return (), dy.clone()

    @dataclass(frozen=True)
    class Shifted(fn.ReLU):
        def apply(self, params, x, *, key=None):
            return super().apply(params, x, key=key) + 1

    conv = fn.Conv2d(3, 3)
    params = conv.init(fn.key(0), (3, 6, 6))
    x, grad = fn.normal(fn.key(1), (2, 3, 6, 6)), fn.normal(fn.key(2), (2, 3, 4, 4))
    for layer in (Doubled(), OverX(), OverGrad(), Negated(), Straight(), Shifted()):
        net = fn.Sequential(conv, layer, fn.Identity())
        between, kept = conv.fwd(params, x)
        assert torch.equal(net.apply((params, (), ()), x), layer.apply((), between))
        dparams, dx = conv.bwd(params, kept, layer.vjp((), between, grad)[1])
        (found, *_), found_dx = net.vjp((params, (), ()), x, grad)
        assert torch.equal(found_dx, dx)
        assert all(torch.equal(found[name], dparams[name]) for name in dparams)


def test_a_training_step_asks_little():
    """Checks and questions about global state would take most of a small network's step."""
    net = fn.Sequential(*[fn.Conv2d(8, 3, padding=1), fn.ReLU()] * 24)
    params, x, target = make(net, (8, 16, 16), batch=1)
    step, sgd = fn.value_and_grad(net, fn.MSE()), fn.SGD(0.1)
    calls, before = [], sys.getprofile()

    def train():
        sgd.step(params, step(params, x, target)[1], sgd.init(params))

    train()  # what is accepted is remembered
    sys.setprofile(lambda frame, event, _: event == "call" and calls.append(frame.f_code))
    try:
        train()
    finally:
        sys.setprofile(before)
    assert len(calls) <= 16 * len(net)


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
